"""Exercise 8: stay what you were (Sec. 3.2, T3 and its self-distillation)."""

import copy
import math
from pathlib import Path

import torch
from torch import nn

from exercises.checks.tools import demand, gradients, same, same_shape, some_of_each, states
from parts.adversary import Discriminator
from parts.dcae import PixelDecoder
from parts.words import WordTokenizer
from world.language import WORDS

TITLE, MINUTES = "Stay what you were", 40
CUT = {"tokenizer.py": ["frozen_copy", "self_distillation", "tokenizer_losses"]}
PREDICT = ["PSNR and understanding after T3 of 390 steps with λ_s = 0, 0.05 and 1: two numbers each, and why?",
           "L_s binds f_v. What would become of the pictures, what of the answers, if it bound z_s?",
           "What is L_s at the first step of T3? And what would it be ever after, if E_s' were no copy?"]
ANSWERS = ["On this world, T3 of 390 steps, means of five --reseeds: with λ_s = 0 30.9 dB and 0.34 of the answers "
           "right, with 0.05 29.3 dB and 0.98, with 1 27.3 dB and 0.98: what the anchor costs and what it keeps.",
           "Not measured. What the LLM reads is f_v: nothing would hold that, so expect answers as without L_s. The "
           "pictures are drawn from z_s and z_p, and one of the two would be held where T2 left it.",
           "0. And 0 for ever: an alias moves along."]
ABOUT = """`frozen_copy` gives E_s', called like the encoder: E_s'(images). L_s, L_p, L_f and L_mse are means of squared
differences; the targets, E_p'(I) and E_s'(I), get no gradient. L_p is left out where the tokenizer has no pixel stream,
L_gan, `discriminator.generator_loss`, where there is no discriminator yet; its own step comes later, so it is left as
it was, as is all else: modes, what trains, torch's gradient mode. Losses are not weighed yet. The source computes L_gan
in float32, outside autocast; no check asks for it."""

SIZES = dict(side=16, patch=2, vision_width=16, vision_layers=2, vision_heads=2, d=24, llm_layers=3, llm_heads=2,
             llm_kv_heads=1, llm_mlp=20, k=2, p=8, pixel_layers=1, pixel_heads=2, stream_blocks=1,
             ae_widths=(8, 16, 32), ae_depths=(0, 1, 1), ae_decoder_depths=(0, 1, 1), queries=4, connector_layers=2,
             condition_width=12, c=16, dit_layers=2, dit_heads=1, dit_cross_heads=2, align_block=1, align_hidden=16,
             gan_width=8, gan_start=0.0, lr=tuple(1e-3 * (i + 1) for i in range(9)),
             weight_decay=tuple(0.01 * (i + 1) for i in range(9)))
TERMS = ("L_mse", "L_lpips", "L_p", "L_f", "L_s", "L_gan")


# ---------------------------------------------------------------- what is judged, in small


def move(module: nn.Module, much: float = 0.1) -> nn.Module:
    """Changes every weight, in its place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(much * torch.randn_like(parameter))
    return module


def pictures(b: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, side, side) * 2 - 1


class OneWay(nn.Module):
    """In the place of L_lpips: which of the two pictures is the copy, matters."""

    def forward(self, images, targets):
        return (1.5 * images - 0.7 * targets.detach()).abs().mean()


VISION = dict(side=16, patch=2, width=12, layers=1, heads=2, mlp_ratio=2, d=10)


def vision_of(version, **changes):
    return move(version.tokenizer.VisionEncoder(**VISION | changes), 0.3)


def decoder_of() -> PixelDecoder:
    return PixelDecoder(p=4, widths=(8, 16, 32), depths=(0, 1, 1), vit_stages=1)


def tokenizer_of(version, variant: str = "dual"):
    vision = version.tokenizer.VisionEncoder(**VISION)
    return move(version.tokenizer.Tokenizer(vision, decoder_of(), 10, 4, 1, 2, 1, variant), 0.3)


def around(tokenizer) -> dict:
    """What `tokenizer_losses` is given beside pictures and weights."""
    target = torch.randn(3, 16, 4)
    return dict(target_latent=lambda: target, perceptual=OneWay(), discriminator=move(Discriminator(4, 2)),
                encoder_before=move(copy.deepcopy(tokenizer.vision)).requires_grad_(False))


def leaves(value: torch.Tensor) -> list:
    """All that a backward from here gives a gradient."""
    found, todo, seen = [], [value.grad_fn], {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            todo += [one for one, _ in node.next_functions]
    return found


def wanted(tokenizer, images, given: dict) -> dict:
    """Every term, by the paper's words."""
    f_v = tokenizer.features(images)
    latents = tokenizer.latents(f_v)
    copies, target = tokenizer.decode(latents.fused, images.shape[-1]), given["target_latent"]()
    mean_square = lambda a, b: ((a - b) ** 2).sum() / a.numel()
    found = {"L_mse": mean_square(copies, images), "L_lpips": given["perceptual"](copies, images),
             "L_f": mean_square(latents.fused, target), "L_s": mean_square(f_v, given["encoder_before"](images)),
             "L_gan": -given["discriminator"](copies).mean()}
    return found | ({} if latents.pixel is None else {"L_p": mean_square(latents.pixel, target)})


def model_of(version, **changes):
    model = version.spar.SPAR(version.spar.make_config(**SIZES | changes), WordTokenizer(WORDS))
    return move(model, 0.02)


def begun(version, **changes):
    """A model before T3's first step, its stage in progress, and what `train.prepare` gave."""
    model, train = model_of(version, **changes), version.train
    stage = train.stage_named("T3")
    extras = train.prepare(model, stage)
    demand(callable(extras.encoder_before),
           f"frozen_copy returns a {type(extras.encoder_before).__name__}: E_s' is asked as the encoder is")
    return model, train.begin(train.StepModule(model, stage, extras)), extras


# ---------------------------------------------------------------- claims: L_s


def square(own, real):
    """L_s is the mean of the squared differences, of all tokens and all their channels"""
    for b, n, d in ((3, 5, 7), (4, 4, 4), (1, 2, 3)):
        for size in (0.1, 1.0, 30.0):
            f_v, before = torch.randn(b, n, d), torch.randn(b, n, d)
            f_v = before + size * (f_v - before)
            if size == 1.0:  # not in one piece
                f_v, before = (x.mT.contiguous().mT for x in (f_v, before))
            total = math.fsum((float(f_v[i, j, k]) - float(before[i, j, k])) ** 2
                              for i in range(b) for j in range(n) for k in range(d))
            value = own.tokenizer.self_distillation(f_v.clone(), before.clone())
            same_shape(value, (), "self_distillation")
            same(value / size**2, torch.tensor(total / (b * n * d) / size**2), "self_distillation", 1e-3)
    demand(abs(float(own.tokenizer.self_distillation(f_v, f_v.clone()))) < 1e-5 * float(f_v.square().mean()),
           "L_s of equal tokens is not 0")


def pull(own, real):
    """its gradient pulls the tokens of the encoder back to what they were"""
    f_v, before = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7)
    value = own.tokenizer.self_distillation(f_v, before)
    demand(value.requires_grad, "L_s has no gradient for the encoder: f_v is detached")
    gradient, = torch.autograd.grad(value, f_v)
    same(gradient * f_v.numel(), 2 * (f_v.detach() - before), "the gradient of L_s for f_v, times b n d", 1e-4)


# ---------------------------------------------------------------- claims: the losses of T1 to T3


def asked_for(own, real):
    """the losses are those that are asked for, and of these none whose stream or adversary is missing"""
    for variant in ("dual", "semantic-only", "pixel-only"):
        tokenizer, images = tokenizer_of(own, variant), pictures()
        given = around(tokenizer)
        for names, missing in ((("L_mse",), ("perceptual", "encoder_before", "discriminator")),
                               (("L_mse", "L_lpips", "L_p"), ("encoder_before", "discriminator")),
                               (("L_mse", "L_p"), ("perceptual", "encoder_before", "discriminator")),
                               (("L_mse", "L_f"), ("perceptual", "encoder_before", "discriminator")),
                               (("L_mse", "L_f", "L_gan"), ("perceptual", "discriminator")),
                               (("L_mse", "L_s"), ("perceptual", "discriminator")),
                               (("L_p",), ("perceptual", "encoder_before", "discriminator")),
                               (("L_s",), ("perceptual", "discriminator")),
                               (("L_mse", "L_s", "L_gan"), ()), (("L_mse", "L_f", "L_lpips"), ()), (TERMS, ())):
            weights = {name: 0.3 + i for i, name in enumerate(names)}
            asked = dict(weights)
            out = own.tokenizer.tokenizer_losses(tokenizer, images, weights,
                                                 **given | {name: None for name in missing})
            demand(isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], dict),
                   "tokenizer_losses returns no pair of losses and reconstruction")
            there = set(names) - ({"L_gan"} if "discriminator" in missing else set())
            there -= {"L_p"} if variant == "semantic-only" else set()
            demand(set(out[0]) == there, f"asked for {', '.join(names)} of a {variant} tokenizer"
                   f"{', no adversary' * ('discriminator' in missing)}: got {', '.join(sorted(out[0]))}")
            demand(weights == asked, "tokenizer_losses changes the weights that it is given")


def terms(own, real):
    """each term compares what the paper says with what it says"""
    for variant in ("dual", "semantic-only", "pixel-only"):
        tokenizer, images = tokenizer_of(own, variant), pictures()
        given = around(tokenizer)
        seen = images.clone()
        weights = {name: 0.3 + i for i, name in enumerate(TERMS)}
        before = states(tokenizer, given["discriminator"])
        losses, copies = own.tokenizer.tokenizer_losses(tokenizer, images, weights, **given)
        demand(states(tokenizer, given["discriminator"]) == before, "tokenizer_losses leaves the tokenizer or the "
               "discriminator frozen, or in another mode: what trains next finds it so")
        right = wanted(tokenizer, seen, given)
        for name in right:
            demand(name in losses, f"{name} is missing")
            same_shape(losses[name], (), name)
            same(losses[name], right[name], f"{name} of a {variant} tokenizer", 1e-4)
        same(copies, tokenizer(seen)[0], "the reconstruction that tokenizer_losses returns", 1e-4)
        same(images, seen, "the pictures, after tokenizer_losses read them")


def reach(own, real):
    """each term moves what it should: L_s the encoder and its projector, and no stream"""
    for variant in ("dual", "pixel-only"):
        tokenizer, images = tokenizer_of(own, variant), pictures()
        given = around(tokenizer)
        losses, _ = own.tokenizer.tokenizer_losses(tokenizer, images, dict.fromkeys(TERMS, 1.0), **given)
        names, parameters = zip(*tokenizer.named_parameters())
        for name, value in wanted(tokenizer, images, given).items():
            right = gradients(value, parameters)
            demand(name in losses, f"{name} is missing")
            largest = max(float(g.abs().max()) for g in right)
            for key, one, other in zip(names, gradients(losses[name], parameters), right):
                same(one / largest, other / largest, f"the gradient of {name} for {key}, over the largest", 1e-3)


def other_sides(own, real):
    """pictures of another side than the encoder's own will do, and a decoder of another factor than its tokens'"""
    for patch, side, shown in ((2, 16, 24), (3, 12, 12), (3, 12, 24)):
        vision, decoder = vision_of(own, side=side, patch=patch), decoder_of()
        tokenizer = move(own.tokenizer.Tokenizer(vision, decoder, 10, 4, 1, 2, 1), 0.3)
        target = [torch.empty(3, (shown // (2 * patch)) ** 2, 4)]
        given = around(tokenizer) | {"target_latent": lambda: target[0]}
        for _ in range(2):  # and other pictures at the next step
            images, target[0] = pictures(side=shown), torch.randn_like(target[0])
            losses, copies = own.tokenizer.tokenizer_losses(tokenizer, images, dict.fromkeys(TERMS, 1.0), **given)
            right = wanted(tokenizer, images, given)
            right["L_s"] = own.tokenizer.self_distillation(tokenizer.features(images), given["encoder_before"](images))
            for name, value in right.items():
                demand(name in losses, f"{name} is missing")
                same(losses[name], value, f"{name} of pictures of {shown}², tokens of {2 * patch}² pixels", 1e-4)
            same(copies, tokenizer(images)[0], f"the reconstruction of pictures of {shown}²", 1e-4)


def as_it_was(own, real):
    """modes, what trains, and torch's own switches are left as they were"""
    tokenizer, images = tokenizer_of(own), pictures()
    given = around(tokenizer)
    parts = tokenizer, given["discriminator"]
    some_of_each(*parts)
    before = states(*parts)
    own.tokenizer.frozen_copy(tokenizer.vision)
    demand(states(*parts) == before, "frozen_copy leaves the encoder in another mode, or other weights training")
    numbers = {key: value.clone() for key, value in given["discriminator"].state_dict().items()}
    own.tokenizer.tokenizer_losses(tokenizer, images, dict.fromkeys(TERMS, 1.0), **given)
    demand(all(value.equal(numbers[key]) for key, value in given["discriminator"].state_dict().items()),
           "tokenizer_losses moves the discriminator, whose own step comes later")
    demand(states(*parts) == before, "tokenizer_losses leaves the tokenizer or the discriminator in another mode, or "
           "others of their weights training")
    with torch.no_grad():
        losses, _ = own.tokenizer.tokenizer_losses(tokenizer, images, dict.fromkeys(TERMS, 1.0), **given)
        demand(not torch.is_grad_enabled() and not any(value.requires_grad for value in losses.values()),
               "tokenizer_losses switches gradients on where they are off")


# ---------------------------------------------------------------- claims: the copy


def every_picture(own, real):
    """E_s' is what the encoder was, for any pictures, however often both are asked and wherever the encoder goes"""
    for options in ({}, {"imagenet": True}):
        vision = vision_of(own, **options)
        was, before = copy.deepcopy(vision), own.tokenizer.frozen_copy(vision)
        for b, side in ((3, 16), (3, 16), (2, 24)):
            images = pictures(b, side)
            with torch.no_grad():
                same(before(images), was(images), "what E_s' says once the encoder has moved", 1e-5)
            move(vision, 1.0)
            for _ in range(3):
                vision(images)
        with torch.no_grad():
            same(own.tokenizer.frozen_copy(vision)(images), vision(images), "what a later copy says", 1e-5)


def targets(own, real):
    """no gradient reaches the targets: not E_p'(I), nor E_s', whatever it is made of"""
    tokenizer, images = tokenizer_of(own), pictures()
    target, before = torch.randn(3, 16, 4, requires_grad=True), own.tokenizer.frozen_copy(tokenizer.vision)
    move(tokenizer.vision)
    given = around(tokenizer) | {"target_latent": lambda: 1.0 * target, "encoder_before": before}
    losses, _ = own.tokenizer.tokenizer_losses(tokenizer, images, dict.fromkeys(TERMS, 1.0), **given)
    for name in ("L_p", "L_f"):
        demand(not gradients(losses[name], [target])[0].any(), f"{name} has a gradient for its target, E_p'(I)")
    ours = {id(parameter) for parameter in tokenizer.parameters()}
    demand({id(leaf) for leaf in leaves(losses["L_s"])} <= ours, "L_s has a gradient for weights of E_s'")
    with torch.no_grad():
        held = before(images)
    names, parameters = zip(*tokenizer.vision.named_parameters())
    right = gradients(own.tokenizer.self_distillation(tokenizer.features(images), held), parameters)
    largest = max(float(g.abs().max()) for g in right)
    for name, one, other in zip(names, gradients(losses["L_s"], parameters), right):
        same(one / largest, other / largest, f"the gradient of L_s for the encoder's {name}, over the largest", 1e-3)


def stays(own, real):
    """E_s' is a copy: it stays when the encoder moves"""
    model, now, extras = begun(own)
    images = pictures()
    with torch.no_grad():
        at_first = model.tokenizer.features(images)
        same(extras.encoder_before(images), at_first, "what E_s' says before the first step", 1e-5)
        for part in (model.tokenizer.vision.projector, model.tokenizer.vision.layers, model.tokenizer.vision):
            move(part)
            after = extras.encoder_before(images)
            same(after, at_first, "E_s' moved with the encoder: it shares weights with it; what it says", 1e-5)
        demand((model.tokenizer.features(images) - at_first).abs().max() > 1e-3, "the encoder cannot move any more")


def first_steps(own, real):
    """L_s is 0 at the first step, and above 0 once the encoder has moved"""
    model, now, extras = begun(own, lambda_gan=0.0, lambda_s=0.7)
    images, values = pictures(), []
    at_first = model.tokenizer.features(images).detach()
    for step in range(2):
        moved = ((model.tokenizer.features(images).detach() - at_first) ** 2).mean()
        losses, _ = now.module({"images": images}, now.loss_weights, False)
        demand("L_s" in losses, "L_s is missing in T3")
        values.append(losses["L_s"].item())
        demand(not step or values[1] != 0, "L_s stays 0 though the encoder moves: E_s' moves along")
        same(losses["L_s"], moved, f"L_s before step {step + 1}", 1e-4)
        if step:
            demand(moved > 1e-3, "the encoder does not move in T3")
            demand(abs(values[-1] / float(moved) - 1) < 1e-2, f"L_s is {values[-1]:.2g}, the mean square of what the "
                                                               f"encoder has moved is {float(moved):.2g}")
        now.optimizer.zero_grad()
        sum(now.loss_weights[name] * value for name, value in losses.items()).backward()
        now.set_rate(10, 100)
        now.optimizer.step()
    demand(abs(values[0]) < 1e-5, f"L_s is {values[0]:.2g} at the first step, when the encoder is what it was")


def no_gradient(own, real):
    """no gradient reaches E_s'; the encoder gets its own"""
    model, now, extras = begun(own, lambda_s=0.7)
    move(model.tokenizer.vision)
    losses, _ = now.module({"images": pictures()}, now.loss_weights, False)
    demand(losses["L_s"] > 0, "L_s is 0 though the encoder has moved since T3 began: E_s' was copied too late")
    losses["L_s"].backward()
    before = extras.encoder_before
    for parameter in before.parameters() if isinstance(before, nn.Module) else ():
        demand(parameter.grad is None or parameter.grad.abs().max() == 0, "L_s has a gradient for E_s'")
    for name, parameter in model.tokenizer.vision.named_parameters():
        demand(parameter.grad is not None, f"L_s has no gradient for the encoder's {name}")


def apart(own, real):
    """E_s' is no part of the model, and the encoder stays as it was: it still trains"""
    vision = tokenizer_of(own).vision
    before = states(vision)
    own.tokenizer.frozen_copy(vision)
    demand(states(vision) == before, "frozen_copy has frozen the encoder too, or changed its mode")
    for frozen in (False, True):
        model = model_of(own, freeze_encoder=frozen)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        stage = own.train.stage_named("T3")
        extras = own.train.prepare(model, stage)
        after = dict(model.named_parameters())
        demand(list(after) == list(before), "frozen_copy has added weights to the model, or taken some from it")
        demand(all(after[name].equal(before[name]) for name in before), "frozen_copy has changed weights of the model")
        now = own.train.begin(own.train.StepModule(model, stage, extras))
        trained = {id(p) for group in now.optimizer.param_groups for p in group["params"]}
        ours = {id(p) for p in model.tokenizer.parameters()}
        demand(trained <= ours, "the optimizer of T3 holds weights that are not the tokenizer's")
        held = {id(p) for p in model.tokenizer.vision.parameters()} <= trained
        demand(held != frozen, "the encoder does not train in T3" if not frozen else "a frozen encoder trains")


def where(own, real):
    """E_s' lives where the encoder lives"""
    with torch.device("meta"):
        vision = own.tokenizer.VisionEncoder(**VISION)
    before = own.tokenizer.frozen_copy(vision)
    held = [*before.parameters(), *before.buffers()] if isinstance(before, nn.Module) else []
    demand({x.device.type for x in held} <= {"meta"}, "E_s' is not on the encoder's device")
    answer = before(torch.zeros(1, 3, 16, 16, device="meta"))
    demand(answer.device.type == "meta", f"E_s' answers on {answer.device.type}, the encoder is on meta")


def curves(pen, corner: tuple[int, int], title: str, lines: dict[str, list[float]], size=(300, 180)) -> None:
    """A small plot: label -> values from the first step to the last, all on one scale from 0."""
    from plumbing.pictures import INK, LINES, PALE, font
    (x0, y0), (w, h) = corner, size
    top = max(max(values) for values in lines.values()) or 1.0
    pen.text((x0, y0 - 20), f"{title} (top {top:.3g})", INK, font())
    pen.rectangle((x0, y0, x0 + w, y0 + h), outline=PALE)
    for i, (label, values) in enumerate(lines.items()):
        points = [(x0 + w * step / max(1, len(values) - 1), y0 + h * (1 - value / top))
                  for step, value in enumerate(values)]
        pen.line(points, LINES[i % len(LINES)], 2)
        pen.text((x0 + i * w // len(lines), y0 + h + 6), label, LINES[i % len(LINES)], font())


def picture(own, path: Path) -> Path:
    """What λ_s holds: how far tokens move in T3 of a tiny model, by your losses. What it costs: results/class.png"""
    from PIL import Image, ImageDraw

    from world.language import DrawnWorld
    torch.manual_seed(0)
    images, moved = DrawnWorld(16, 0).pictures(range(8)), {}
    model = model_of(own, lambda_gan=0.0)
    for weight in (0.0, 0.05, 1.0):
        model.config.lambda_s = weight
        one = copy.deepcopy(model)
        stage = own.train.stage_named("T3")
        now = own.train.begin(own.train.StepModule(one, stage, own.train.prepare(one, stage)))
        at_first, far = one.tokenizer.features(images).detach(), []
        for step in range(30):
            losses, _ = now.module({"images": images}, now.loss_weights, False)
            now.set_rate(step, 30)
            now.optimizer.zero_grad()
            sum(now.loss_weights[name] * value for name, value in losses.items()).backward()
            now.optimizer.step()
            far.append((one.tokenizer.features(images).detach() - at_first).square().mean().item())
        moved[f"lambda_s {weight:g}"] = far
    image = Image.new("RGB", (360, 260), "white")
    curves(ImageDraw.Draw(image), (30, 40), "how far f_v has moved (mean square)", moved)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


CLAIMS = [square, pull, asked_for, terms, reach, other_sides, as_it_was, stays, every_picture, first_steps, no_gradient,
          targets, apart, where]


def fingerprint(version) -> dict:

    def l_s():
        f_v, before = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7)
        value = version.tokenizer.self_distillation(f_v, before)
        return torch.cat([value.flatten(), *(g.flatten() for g in gradients(value, [f_v]))])

    def losses():
        tokenizer, images = tokenizer_of(version), pictures()
        weights = {name: 0.5 + i for i, name in enumerate(TERMS)}  # which are not to be multiplied yet
        values, copies = version.tokenizer.tokenizer_losses(tokenizer, images, weights, **around(tokenizer))
        parameters = list(tokenizer.parameters())
        return torch.cat([copies.flatten(), *(value.flatten() for name in sorted(values) for value in (
            values[name], sum(g.abs().sum() for g in gradients(values[name], parameters))))])

    def copied():
        vision, images = tokenizer_of(version).vision, pictures()
        before = version.tokenizer.frozen_copy(vision)
        with torch.no_grad():
            at_first = before(images)
            move(vision)
            return torch.cat([at_first.flatten(), before(images).flatten()])

    return {"frozen_copy": copied, "self_distillation": l_s, "tokenizer_losses": losses}
