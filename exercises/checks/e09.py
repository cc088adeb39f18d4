"""Exercise 9: be your own teacher (claim 2, Sec. 3.4)."""

import copy
import math
from typing import NamedTuple

import torch
from torch import nn

from exercises.checks.tools import demand, gradients, same, same_shape, some_of_each, states

TITLE, MINUTES = "Be your own teacher", 30
CUT = {"diffusion.py": ["alignment_loss", "DiT.through_blocks", "AlignmentHead.__init__", "unified_losses"]}
PREDICT = ["Which blocks of the DiT get a gradient from L_align alone? Does the tokenizer?",
           "What is L_align of features without any relation to the teacher's? What of a perfect student?",
           "Does it save steps here? What would you have to measure, to say so?"]
ANSWERS = ["Blocks 1 to align_block (2 of the toy's 4), with what leads into them. The tokenizer none: it teaches.",
           "About 0; −1.",
           "Not on the seeds of the claims study (results/README.md): to equal L_fm it saves about none. It takes both "
           "arms to the same L_fm and to equal drawing, several seeds, and the seconds that L_align costs."]
ABOUT = """`alignment_loss` gives the teacher no gradient, whoever calls it. φ_a is Linear, SiLU, Linear, SiLU,
Linear, all but the last `hidden` wide, made in this order, and each starts as torch starts it. In `unified_losses` the
teacher is the tokenizer's f'_v of the *clean* pictures wanted, or the external one's; the noises come in rounds of the
whole batch, `(draws b)`; requests stand before edits; what the tokenizer says, of targets and references, gets no
gradient. The losses are not weighed yet: `weights` says which are asked for. It, the batch and the DiT are left as they
were, modes too, with nothing kept on them. Without L_align there may be no f_v: `clean_latent` gives None beside z."""


# ---------------------------------------------------------------- what is judged, in small


def shaken(module: nn.Module) -> nn.Module:
    """With random weights throughout: some start at zero and would hide all else."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5))
    return module


def dits(own, real, **options):
    """A DiT of both versions with the same random weights."""
    sizes = dict(p=3, c=16, layers=4, heads=2, cross_heads=4, condition_width=10, align_block=2) | options
    theirs = shaken(real.diffusion.DiT(**sizes))
    ours = own.diffusion.DiT(**sizes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(b: int = 3, h: int = 2, w: int = 5, l: int = 7, draws: int = 1, p: int = 3, u: int = 10):
    """x_t, σ, condition, mask with padding"""
    mask = torch.rand(b, l) < 0.7
    mask[:, 0] = True
    return torch.randn(draws * b, p, h, w), torch.rand(draws * b), torch.randn(b, l, u), mask


def heads(own, real, c: int = 6, hidden: int = 9, d: int = 5):
    """φ_a of both versions with the same random weights. What is not about φ_a itself takes `real` twice."""
    theirs, ours = shaken(real.diffusion.AlignmentHead(c, hidden, d)), own.diffusion.AlignmentHead(c, hidden, d)
    shapes = [[tuple(p.shape) for p in head.parameters()] for head in (ours, theirs)]
    demand(shapes[0] == shapes[1], f"the weights of AlignmentHead({c}, {hidden}, {d}) have the shapes {shapes[0]}, "
                                   f"wanted {shapes[1]}")
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            mine.copy_(other)
    return ours, theirs


class Noted:
    """A function that notes what it is called with."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *given, **named):
        self.calls.append((*given, *named.values()))
        return self.function(*given, **named)


class World:
    """What `unified_losses` is given: parts with weights of their own, so that it shows where gradients go."""

    class Asked(NamedTuple):  # as mllm.Condition
        tokens: torch.Tensor
        mask: torch.Tensor
        weights: torch.Tensor | None = None

    l, u, p, d, c = 6, 10, 3, 8, 16

    def __init__(self, own, real, h: int = 2, w: int = 3):
        self.dit, self.right_dit = dits(own, real)
        self.head, self.right_head = heads(real, real, self.c, 12, self.d)
        self.queries = nn.Parameter(torch.randn(self.u))
        self.eye, self.into_latent = nn.Linear(3, self.d), nn.Linear(3, self.p)
        self.h, self.w = h, w
        self.features, self.clean_latent = Noted(self.see), Noted(self.latent)
        self.condition = Noted(self.ask)

    def see(self, images):
        """f_v `b n d` of pictures `b 3 h w`, a pixel for each token."""
        return self.eye(images.flatten(2).transpose(1, 2))

    def latent(self, images):
        z = self.into_latent(images.flatten(2).transpose(1, 2))
        return z.transpose(1, 2).unflatten(2, (self.h, self.w)), self.see(images)

    def ask(self, ids, mask, f_v=None):
        words = torch.sin(ids[..., None] * (1 + torch.arange(self.u))) * self.queries
        if f_v is not None:
            demand(len(f_v) == len(ids), f"condition gets {len(f_v)} reference pictures for {len(ids)} instructions")
            words = words + 3 * f_v.mean((1, 2))[:, None, None]
        return self.Asked(words, mask)

    def batch(self, words: int, edits: int, draws: int) -> dict:
        def texts(b, l):
            mask = torch.arange(l)[None] < torch.randint(2, l + 1, (b, 1))
            return torch.randint(1, 50, (b, l)), mask

        b, found = words + edits, {}
        if words:
            found["words"] = texts(words, self.l)
        if edits:
            found |= {"instructions": texts(edits, self.l + 3), "references": self.pictures(edits)}
        return found | {"images": self.pictures(b)}, b * draws

    def pictures(self, b: int):
        return torch.randn(b, 3, self.h, self.w)

    def trained(self) -> dict:
        parts = {"the queries": [self.queries], "the encoder": self.eye.parameters(),
                 "the tokenizer's latents": self.into_latent.parameters(), "φ_a": self.head.parameters()}
        parts |= {f"block {i} of the DiT": block.parameters() for i, block in enumerate(self.dit.blocks, 1)}
        parts["the rest of the DiT"] = [p for key, p in self.dit.named_parameters() if not key.startswith("blocks")]
        return {name: list(parameters) for name, parameters in parts.items()}


def case(own, real, words: int = 3, edits: int = 2, draws: int = 2, h: int = 2, w: int = 3):
    world = World(own, real, h, w)
    batch, rows = world.batch(words, edits, draws)
    batch["noise"] = own.diffusion.Noise(torch.rand(rows), torch.randn(rows, world.p, world.h, world.w))
    return world, batch


class Outsider(nn.Module):
    """A teacher from elsewhere."""

    def __init__(self, d: int):
        super().__init__()
        self.eye = shaken(nn.Linear(3, d))

    def forward(self, images):
        return self.eye(images.flatten(2).transpose(1, 2))


def losses_of(own, world, batch, weights=("L_fm", "L_align"), **more) -> dict:
    weights = {name: 0.1 + 3 * torch.rand(()).item() for name in weights}  # that weigh nothing yet
    out = own.diffusion.unified_losses(batch, weights, condition=world.condition,
                                       features=world.features, clean_latent=world.clean_latent, dit=world.dit,
                                       align_head=world.head, **more)
    demand(isinstance(out, dict), f"unified_losses returns a {type(out).__name__}, not losses by their symbols")
    return out


def cosines(projected, f_v) -> torch.Tensor:
    """`b n`: one for each token, by sums alone."""
    length = lambda x: (x * x).sum(-1).sqrt()
    return (projected * f_v).sum(-1) / (length(projected) * length(f_v))


def wanted(world, batch, teacher=None) -> dict:
    """Both terms, picture by picture and noise by noise; an edit's reference is asked as it should be."""
    parts = []
    if "words" in batch:
        parts += [world.ask(ids[None], mask[None]) for ids, mask in zip(*batch["words"])]
    if "instructions" in batch:
        parts += [world.ask(ids[None], mask[None], world.see(image[None]).detach())
                  for ids, mask, image in zip(*batch["instructions"], batch["references"])]
    sigma, epsilon = batch["noise"]
    images, squares, alike = batch["images"], [], []
    for row in range(len(sigma)):
        i = row % len(images)
        z, f_v = (x.detach() for x in world.latent(images[i:i + 1]))
        x_t = (1 - sigma[row]) * z + sigma[row] * epsilon[row]
        velocity, hidden = world.right_dit(x_t, sigma[row:row + 1], parts[i].tokens, parts[i].mask)
        squares.append((velocity - (epsilon[row] - z)) ** 2)
        alike.append(cosines(world.right_head(hidden), f_v if teacher is None else teacher(images[i:i + 1])))
    return {"L_fm": torch.cat(squares).mean(), "L_align": -torch.cat(alike).mean()}


def same_up_to_1(value, wanted, what: str) -> None:
    """−cos or 1 − cos: a constant moves no weight."""
    same_shape(value, (), what)
    error = value.item() - wanted.item()
    demand(math.isfinite(error) and min(abs(error), abs(error - 1)) < 2e-5,
           f"{what} is {value.item():.4f}, wanted {wanted.item():.4f}")


# ---------------------------------------------------------------- claims: the loss


def ends(own, real):
    """L_align is −1 for equal directions, 1 for opposite ones, whatever the lengths"""
    loss, zero = own.diffusion.alignment_loss, None
    for b, n, d in ((3, 5, 7), (4, 4, 4), (2, 3, 2)):
        f_v = nn.functional.normalize(torch.randn(b, n, d), dim=-1)
        lengths = lambda: torch.cat([torch.full((b, 1, 1), 0.1), torch.rand(b, n - 1, 1) * 9 + 0.1], 1)
        for what, sign in (("equal directions", 1), ("opposite directions", -1)):
            value = loss(sign * lengths() * f_v, lengths() * f_v)
            same_up_to_1(value, torch.tensor(-float(sign)), f"L_align of {what}")
            zero = value.item() + sign if zero is None else zero
            demand(abs(value.item() + sign - zero) < 1e-3,
                   "L_align of opposite directions is not 2 above that of equal ones")


def token_by_token(own, real):
    """it is the mean over all tokens of their cosines, each token by itself"""
    loss = own.diffusion.alignment_loss
    for b, n, d in ((3, 5, 7), (4, 4, 4), (1, 6, 2), (2, 1, 3)):
        projected, f_v = torch.randn(b, d, n).mT + 0.5, 3 * torch.randn(b, d, n).mT - 1  # not in one piece
        given = projected.clone(), f_v.clone()
        value = loss(projected, f_v)
        same_shape(value, (), "alignment_loss")
        demand(projected.equal(given[0]) and f_v.equal(given[1]), "alignment_loss changes what it is given")
        total = sum(float(projected[i, j] @ f_v[i, j] / projected[i, j].norm() / f_v[i, j].norm())
                    for i in range(b) for j in range(n))
        same_up_to_1(value, torch.tensor(-total / (b * n)), "alignment_loss")


def directions(own, real):
    """its gradient turns the student's tokens, and the teacher gets none"""
    for b, n, d in ((3, 5, 7), (4, 4, 4)):
        projected, f_v = torch.randn(b, n, d, requires_grad=True), torch.randn(b, n, d, requires_grad=True)
        value = own.diffusion.alignment_loss(projected, f_v)
        demand(value.requires_grad, "L_align has no gradient for the student")
        mine, teachers = gradients(value, [projected, f_v])
        right, = torch.autograd.grad(-cosines(projected, f_v).mean(), projected)
        same(mine * b * n, right * b * n, "the gradient of L_align for the student, times b n", 1e-4)
        demand(teachers.abs().max() == 0, "L_align has a gradient for the teacher: it would learn to be like the DiT")


# ---------------------------------------------------------------- claims: the head


def head_is(own, real):
    """φ_a is Linear, SiLU, Linear, SiLU, Linear, from the DiT's width to the teacher's"""
    for c, hidden, d, b, n in ((6, 9, 5, 2, 4), (4, 4, 4, 4, 4), (3, 2, 8, 1, 7)):
        ours, theirs = heads(own, real, c, hidden, d)
        x = torch.randn(b, n, c)
        same_shape(ours(x), (b, n, d), "φ_a(f_dit)")
        same(ours(x), theirs(x), "φ_a(f_dit)", 1e-4)
        demand(all(p.requires_grad for p in ours.parameters()), "a weight of φ_a does not train")
        new = own.diffusion.AlignmentHead(c, hidden, d)
        found = gradients(new(x.requires_grad_()).square().sum(), [x, *new.parameters()])
        demand(all(g.abs().max() > 0 for g in found), "a new φ_a hands on no gradient, or a part of it gets none: it "
                                                      "could not begin to learn")
        other, said = copy.deepcopy(ours), ours(x)
        with torch.no_grad():
            for weight in other.parameters():
                weight.zero_()
        demand(ours(x).equal(said) and not other(x).any(), "a copy of φ_a computes with the weights of the first")


# ---------------------------------------------------------------- claims: the DiT and what is read from it


def captured(own, real):
    """f_dit is what stands after align_block, whichever it is"""
    for layers, block in ((4, 1), (4, 2), (4, 3), (4, 4), (1, 1)):
        ours, theirs = dits(own, real, layers=layers, align_block=block)
        given = inputs()
        out = ours(*given)
        same_shape(out[1], (3, 10, 16), "f_dit")
        velocity, hidden = theirs(*given)
        same(out[1] / hidden.abs().max().item(), hidden / hidden.abs().max().item(),
             f"f_dit after block {block} of {layers}, over the largest", 1e-4)


def velocity_too(own, real):
    """and the velocity is what it was without: SANA's"""
    for options, shape in (({}, {}), ({"positions": True}, {}), ({}, {"draws": 2}),
                           ({"positions": True}, {"h": 4, "w": 2}), ({"p": 16}, {"p": 16}),
                           ({}, {"b": 4, "h": 4, "w": 4, "l": 4, "draws": 3})):
        ours, theirs = dits(own, real, **options)
        given = inputs(**shape)
        for arguments in (given, (*given[:3], None), given[:3]):
            right, got = theirs(*arguments)[0], ours(*arguments)[0]
            scale = right.abs().max().item()
            same(got / scale, right / scale, "the velocity, over the largest", 1e-4)


def who_learns(own, real):
    """L_align trains the blocks up to align_block, and none behind it"""
    for block in (1, 2, 3):
        ours, theirs = dits(own, real, align_block=block)
        head, _ = heads(real, real, 16, 9, 5)
        value = own.diffusion.alignment_loss(head(ours(*inputs())[1]), torch.randn(3, 10, 5))
        learn = lambda module: max(float(g.abs().max()) for g in gradients(value, list(module.parameters()))) > 0
        for number, one in enumerate(ours.blocks, 1):
            demand(learn(one) == (number <= block), f"block {number} gets {'no' if number <= block else 'a'} gradient "
                                                    f"from L_align, whose block is {block}")
        demand(learn(ours.embed) and learn(ours.caption) and learn(head),
               "L_align does not reach all of φ_a, the embedding and the condition")
        demand(not learn(ours.out), "L_align reaches the last layer of the DiT")


# ---------------------------------------------------------------- claims: both losses together


def both(own, real):
    """unified_losses gives L_fm and L_align of every picture at every noise"""
    for words, edits, draws, h, w in ((3, 2, 1, 2, 3), (1, 1, 1, 2, 2), (3, 2, 2, 2, 3), (3, 0, 3, 2, 3),
                                      (0, 4, 2, 3, 2), (2, 2, 4, 2, 2)):
        world, batch = case(own, real, words, edits, draws, h, w)
        with torch.no_grad():
            right, got = wanted(world, batch), losses_of(own, world, batch)
        demand(set(got) == {"L_fm", "L_align"}, f"asked for L_fm and L_align, got {', '.join(sorted(got))}")
        what = f"{words} requests and {edits} edits, " + (
            "one noise of each" if draws == 1 else f"{draws} noises of each, in rounds of the whole batch")
        same(got["L_fm"] / right["L_fm"], torch.ones(()), f"L_fm of {what}, over what is right", 2e-5)
        same_up_to_1(got["L_align"], right["L_align"], f"L_align of {what}")


def target(own, real):
    """the teacher sees the clean target, not the reference, and not the noise"""
    world, batch = case(own, real, 0, 4, 1)
    ids, mask = batch["instructions"]
    batch["instructions"] = ids, torch.ones_like(mask)
    with torch.no_grad():
        before = losses_of(own, world, batch)["L_align"]
        moved = {}
        for key in ("references", "images"):
            changed = batch | {key: torch.randn_like(batch[key])}
            right = wanted(world, changed)["L_align"]
            moved[key] = losses_of(own, world, changed)["L_align"]
            same_up_to_1(moved[key], right, f"L_align with other {key}")
    demand((moved["images"] - before).abs() > 1e-6, "L_align does not change with the target picture")
    for name, function in (("features", world.features), ("clean_latent", world.clean_latent)):
        for given in function.calls:
            demand(given[0].shape[1:] == (3, world.h, world.w), f"{name} is asked of something that is no picture")


def asked_for(own, real):
    """L_align is there only where it is asked for"""
    for with_f_v in (True, False):
        world, batch = case(own, real)
        right, z_alone = wanted(world, batch)["L_fm"], Noted(lambda images: (world.latent(images)[0], None))
        world.clean_latent = world.clean_latent if with_f_v else z_alone
        got = losses_of(own, world, batch, ("L_fm",))
        demand(set(got) == {"L_fm"}, f"asked for L_fm alone, got {', '.join(sorted(got))}")
        same(got["L_fm"] / right.detach(), torch.ones(()), "L_fm, asked for alone, over what is right", 2e-5)
        ours, theirs = (gradients(value, [world.queries, *dit.parameters()])
                        for value, dit in ((got["L_fm"], world.dit), (right, world.right_dit)))
        for one, other in zip(ours, theirs):
            scale = max(1e-3, other.abs().max().item())
            same(one / scale, other / scale, "a gradient of L_fm, asked for alone, over the largest", 2e-3)


def another_teacher(own, real):
    """an external teacher takes the tokenizer's place, on the pictures wanted"""
    world, batch = case(own, real)
    other = Outsider(world.d)
    got, right = losses_of(own, world, batch, external_teacher=other), wanted(world, batch, other)
    demand({"L_fm", "L_align"} <= set(got), f"with an external teacher: got {', '.join(sorted(got))}")
    share = got["L_fm"] / right["L_fm"].detach()
    same(share, torch.ones(()), "L_fm beside an external teacher, over what is right", 2e-5)
    same_up_to_1(got["L_align"], right["L_align"], "L_align of an external teacher")
    learning = [weight for weight in other.parameters() if weight.requires_grad]
    taught = learning and any(g.any() for g in gradients(got["L_align"], learning))
    demand(not taught, "L_align has a gradient for the external teacher")


def who_gets_a_gradient(own, real):
    """both terms train queries, DiT and φ_a as they should, and no part of the tokenizer"""
    world, batch = case(own, real)
    right_parts = world.trained()
    parameters = [p for part in right_parts.values() for p in part]
    copies = {id(p): q for one, other in ((world.dit, world.right_dit), (world.head, world.right_head))
              for p, q in zip(one.parameters(), other.parameters())}
    theirs = [copies.get(id(p), p) for p in parameters]
    got, right = losses_of(own, world, batch), wanted(world, batch)
    for name in ("L_fm", "L_align"):
        demand(name in got, f"{name} is missing")
        pairs = zip(gradients(got[name], parameters), gradients(right[name], theirs))
        for part, ours in right_parts.items():
            for _ in ours:
                one, other = next(pairs)
                scale = max(1e-3, other.abs().max().item())
                demand(other.abs().max() > 0 or one.abs().max() == 0, f"{name} has a gradient for {part}")
                same(one / scale, other / scale, f"the gradient of {name} for {part}, over the largest", 2e-3)


def as_it_was(own, real):
    """batch, weights, DiT and φ_a are left as they were, and so is torch's gradient mode"""
    world, batch = case(own, real)
    parts, weights = (world.dit, world.head), {"L_fm": 1.0, "L_align": 0.5}
    some_of_each(*parts)

    def found() -> list:
        held = [(sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
                for part in parts for module in part.modules()]
        return [states(*parts), held, sorted(batch)]

    before, asked = found(), dict(weights)
    kept = {key: copy.deepcopy(value) for key, value in batch.items()}
    for _ in range(2):
        own.diffusion.unified_losses(batch, weights, condition=world.condition, features=world.features,
                                     clean_latent=world.clean_latent, dit=world.dit, align_head=world.head)
        demand(weights == asked, "unified_losses changes the weights that it is given")
        whats = "modes or what trains", "hooks or attributes", "the batch's keys"
        for what, one, other in zip(whats, before, found()):
            demand(one == other, f"unified_losses leaves {what} otherwise than it found them")
    for key, value in kept.items():
        pairs = zip(batch[key], value) if isinstance(value, tuple) else [(batch[key], value)]
        demand(all(one.equal(other) for one, other in pairs), f"unified_losses changes the batch's {key}")
    with torch.no_grad():
        got = losses_of(own, world, batch, external_teacher=Outsider(world.d))
        demand(set(got) == {"L_fm", "L_align"}, f"with an external teacher: got {', '.join(sorted(got))}")
        demand(not torch.is_grad_enabled(), "unified_losses switches gradients on where they are off")


def picture(own, path):
    """Two arms of a tiny DiT, λ_a 0 and 0.5: L_fm, and how alike each place's token is to the teacher's."""
    from PIL import Image, ImageDraw

    from exercises.checks.e08 import curves
    from plumbing.pictures import INK, font
    from world.language import DrawnWorld
    torch.manual_seed(0)
    steps, images = 100, DrawnWorld(16, 0).pictures(range(64))
    eye = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.Flatten(2)).requires_grad_(False)
    see = lambda pictures: eye(pictures).transpose(1, 2)
    latent = lambda pictures: (2 * nn.functional.avg_pool2d(pictures, 4), see(pictures))
    smooth, maps = {}, []
    for weight in (0.0, 0.5):
        torch.manual_seed(1)
        dit = own.diffusion.DiT(3, 32, 4, 2, 2, 8, align_block=2, positions=True)
        head, words = own.diffusion.AlignmentHead(32, 32, 24), torch.ones(1, 1, 8)
        optimizer = torch.optim.AdamW([*dit.parameters(), *head.parameters()], 2e-3)
        asked = {"L_fm": 1.0} | ({"L_align": weight} if weight else {})
        ask = lambda ids, mask, f_v=None: World.Asked(words.expand(len(ids), 1, 8), mask)
        values = []
        for step in range(steps):
            chosen = torch.randint(64, (16,))
            noise = own.diffusion.Noise(torch.rand(32), torch.randn(32, 3, 4, 4))
            batch = {"words": (torch.ones(16, 1, dtype=torch.long), torch.ones(16, 1, dtype=torch.bool)),
                     "images": images[chosen], "noise": noise}
            losses = own.diffusion.unified_losses(batch, dict(asked), condition=ask, features=see,
                                                  clean_latent=latent, dit=dit, align_head=head)
            optimizer.zero_grad()
            sum(asked[name] * value for name, value in losses.items()).backward()
            optimizer.step()
            values.append(losses["L_fm"].item())
            if weight and step in (0, steps // 8, steps - 1):
                z, f_v = latent(images)
                sigma = torch.full((64,), 0.5)
                x_t = own.diffusion.add_noise(z, torch.randn_like(z), sigma)
                with torch.no_grad():
                    hidden = dit(x_t, sigma, words.expand(64, 1, 8))[1]
                    maps.append((step, cosines(head(hidden), f_v).mean(0).view(4, 4)))
        smooth[f"lambda_a {weight:g}"] = [sum(values[max(0, i - 15):i + 1]) / len(values[max(0, i - 15):i + 1])
                                     for i in range(steps)]
    image = Image.new("RGB", (740, 260), "white")
    pen = ImageDraw.Draw(image)
    curves(pen, (30, 40), "L_fm, smoothed over 16 steps", smooth)
    for place, (step, alike) in enumerate(maps):
        x0 = 370 + 120 * place
        pen.text((x0, 20), f"cos at step {step + 1}", INK, font())
        for row in range(4):
            for column in range(4):
                value = float(alike[row, column])
                shade = tuple(int(255 - max(0.0, value) * (255 - end)) for end in (20, 70, 150))
                x, y = x0 + 26 * column, 40 + 26 * row
                pen.rectangle((x, y, x + 24, y + 24), shade)
                pen.text((x + 2, y + 7), f"{value:.1f}", "white" if value > 0.35 else INK, font(9))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


CLAIMS = [ends, token_by_token, directions, head_is, captured, velocity_too, who_learns, both, target, asked_for,
          another_teacher, who_gets_a_gradient, as_it_was]


def fingerprint(version) -> dict:

    def loss():
        projected, f_v = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
        value = version.diffusion.alignment_loss(projected, f_v)
        return torch.cat([value.flatten(), *(g.flatten() for g in gradients(value, [projected, f_v]))])

    def head():
        return shaken(version.diffusion.AlignmentHead(6, 9, 5))(torch.randn(2, 4, 6)).flatten()

    def forward():
        dit = shaken(version.diffusion.DiT(3, 16, 4, 2, 4, 10, align_block=2))
        velocity, hidden = dit(*inputs())
        reached = [sum(g.abs().sum() for g in gradients(hidden.square().mean(), list(block.parameters())))
                   for block in dit.blocks]
        return torch.cat([velocity.flatten(), hidden.flatten(), torch.stack(reached)])

    def unified():
        world, batch = case(version, version)
        losses, teach = losses_of(version, world, batch), Outsider(world.d)
        parameters = [p for part in world.trained().values() for p in part]
        found = [losses_of(version, world, batch, external_teacher=teach)["L_align"]]
        found += [value for name in sorted(losses) for value in (losses[name], sum(
            g.abs().sum() for g in gradients(losses[name], parameters)))]
        return torch.stack(found)

    return {"alignment_loss": loss, "AlignmentHead.__init__": head, "DiT.through_blocks": forward,
            "unified_losses": unified}
