"""Train SPAR from nothing: nine stages, one loop.

    python train.py                          the toy preset on two CPU cores, all nine stages, then the evaluation
    python train.py --steps-scale 0.01       the same in a minute: a smoke test
    python train.py --plan                   what would be trained, with how many parameters, steps and pictures
    python train.py --fusion last --from runs/toy --out runs/last      an ablation, on the stages it does not touch

P1 to P3 make the three public models that the paper starts from; T1 to T3 are its tokenizer stages (Sec. 3.2), U1 to U3
its unified ones (Sec. 3.3). A stage is data (`STAGES`): what trains, on which batches, with which losses. The loop in
`train_stage` runs them all. A run folder holds config.json, log.jsonl, <stage>.pt, results.json and report/.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import DrawnWorld, draw
from diffusion import add_noise, alignment_loss, equally_long, flow_matching_loss, logit_normal_times
from muon import Muon
from spar import NAMES, SPAR, Config, load_stage, stage_names
from tokenizer import Discriminator, Perceptual

Losses = dict[str, Tensor]  # symbol -> value; the stage says the weights


@dataclass
class Helpers:
    """What a stage's losses need beside the model. None of it is part of the trained model."""

    world: DrawnWorld
    generator: torch.Generator  # noise, times, emptied prompts
    perceptual: Perceptual | None = None  # frozen E_p': features for L_lpips
    teacher: nn.Module | None = None  # frozen E_s': the encoder as it was (T3), or the external teacher (U2, U3)
    discriminator: Discriminator | None = None  # joins when its start step is reached
    adversary: torch.optim.Optimizer | None = None


# ---------------------------------------------------------------- losses, one function for each kind of stage


def language_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """P1: the next word, on answers and captions about pictures (L_lm) and on facts told in words alone (L_text)."""
    words, encode = model.words, model.words.encode
    images, talks = h.world.conversations(numbers)
    rows, said = [], []
    for talk in talks:
        row, own = model.before_answer(""), []
        own = [False] * len(row)
        for question, answer in talk:
            asked, reply = encode(question), encode(answer) + [words.eos_id]
            row, own = row + asked + reply, own + [False] * len(asked) + [True] * len(reply)
        rows.append(row)
        said.append(own)
    f_v = model.tokenizer.features(images.to(model.device))
    losses = {"L_lm": model.mllm.text_loss(*right_padded(model, rows, said), f_v)}
    if "L_text" in wanted:
        rows, said = [], []
        for given, reply in h.world.texts(numbers[::4]):
            asked, reply = model.before_answer(given, has_image=False), encode(reply) + [words.eos_id]
            rows.append(asked + reply)
            said.append([False] * len(asked) + [True] * len(reply))
        losses["L_text"] = model.mllm.text_loss(*right_padded(model, rows, said))
    return losses


def right_padded(model: SPAR, rows: list[list[int]], said: list[list[bool]]) -> tuple[Tensor, Tensor]:
    ids, mask = model.encode_rows(rows, left=False)
    return ids, torch.tensor([own + [False] * (mask.shape[1] - len(own)) for own in said], device=ids.device)


def autoencoder_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """P2: the pixel autoencoder reconstructs."""
    images = h.world.pictures(numbers).to(model.device)
    reconstruction = model.tokenizer.decode(model.pixel_encoder(images), images.shape[-1])
    return {"L_mse": (reconstruction - images).square().mean()}


def drawing_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """P3: the DiT learns to draw P2's latents from the LLM's text states, as SANA does."""
    requests = h.world.prompts(numbers)
    images = draw([request.scene for request in requests], h.world.side).to(model.device)
    with torch.no_grad():
        z = model.as_grid(model.pixel_encoder(images)) * model.latent_scale
    condition = model.mllm.text_condition(*model.encode_prompts(some_emptied([r.text for r in requests], model, h)))
    return {"L_fm": flow_losses(model, z, condition, h)[0]}


def tokenizer_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """T1 to T3: reconstruct; land on the pixel latents (L_p); stay what the encoder was (L_s); look real (L_gan)."""
    images = h.world.pictures(numbers).to(model.device)
    reconstruction, f_v, latents = model.tokenizer(images)
    losses = {"L_mse": (reconstruction - images).square().mean()}
    if "L_lpips" in wanted:
        losses["L_lpips"] = h.perceptual(reconstruction, images)
    if "L_p" in wanted and latents.pixel is not None:
        losses["L_p"] = (latents.pixel - model.pixel_encoder(images).detach()).square().mean()
    if "L_s" in wanted:
        with torch.no_grad():
            f_was = h.teacher(images)  # f'_v
        losses["L_s"] = (f_v - f_was).square().mean()
    if "L_gan" in wanted and h.discriminator is not None:
        h.adversary.zero_grad()
        h.discriminator.loss(images, reconstruction, model.config.lecam).backward()
        h.adversary.step()
        losses["L_gan"] = h.discriminator.generator_loss(reconstruction)
    return losses


def unified_losses(model: SPAR, numbers: range, wanted: dict, h: Helpers) -> Losses:
    """U1 to U3: draw (and edit) z_f through queries, router and connector; the tokenizer teaches the DiT (L_align)."""
    split = len(numbers) - round(len(numbers) * wanted["edits"])
    losses, parts = {}, []
    requests, edits = h.world.prompts(numbers[:split]), h.world.edits(numbers[split:])
    if requests:
        words = model.encode_prompts(some_emptied([request.text for request in requests], model, h))
        parts.append(model.mllm.condition(*words))
    if edits:
        sources = draw([edit.source for edit in edits], h.world.side).to(model.device)
        words = model.encode_prompts(some_emptied([edit.instruction for edit in edits], model, h))
        with torch.no_grad():
            reference, f_v = model.clean_latent(sources)
        parts.append(model.mllm.condition(*words, f_v))
    tokens, mask = (torch.cat(equally_long(*column)) for column in list(zip(*parts))[:2])
    targets = draw([r.scene for r in requests] + [edit.target for edit in edits], h.world.side).to(model.device)
    with torch.no_grad():
        z, f_v = model.clean_latent(targets)
        teacher = f_v if h.teacher is None else h.teacher(targets)  # f'_v of the clean target
    if edits and model.config.reference == "latent":
        reference = torch.cat([torch.zeros_like(z[:split]), reference])
    else:
        reference = None
    losses["L_fm"], hidden = flow_losses(model, z, (tokens, mask), h, reference)
    if "L_align" in wanted:
        losses["L_align"] = alignment_loss(model.align_head(hidden), teacher)
    return losses


def flow_losses(model: SPAR, z: Tensor, condition, h: Helpers, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> (L_fm, tokens inside the DiT) for clean latents z `b p h w` at random times."""
    sigma = logit_normal_times(len(z), h.generator).to(z.device)
    noise = torch.randn(z.shape, generator=h.generator).to(z.device)
    velocity, hidden = model.dit(add_noise(z, noise, sigma), sigma, condition[0], condition[1], reference)
    return flow_matching_loss(velocity, z, noise), hidden


def some_emptied(texts: list[str], model: SPAR, h: Helpers) -> list[str]:
    """# paper leaves open: the share of prompts emptied for classifier-free guidance; here 10 % (`drop_words`)."""
    emptied = torch.rand(len(texts), generator=h.generator) < model.config.drop_words
    return ["" if empty else text for text, empty in zip(texts, emptied.tolist())]


# ---------------------------------------------------------------- the nine stages


@dataclass(frozen=True)
class Stage:
    """`trains`: name prefix of the parameters -> their share of the stage's learning rate (a number or a field of Config).
    `losses`: symbol -> weight (the same); a weight of 0 leaves the term out."""

    name: str
    about: str
    trains: dict[str, float | str]
    compute: Callable[..., Losses]
    losses: dict[str, float | str]
    edits: float | str = 0.0  # share of the batch that edits
    cost: float = 1.0  # seconds per 1000 pictures of the toy preset on two cores; only the time left is told from it


STREAMS = {"tokenizer.semantic_stream": 1.0, "tokenizer.pixel_stream": 1.0, "tokenizer.fusion": 1.0}
BRIDGE = {"mllm.queries": 1.0, "mllm.router": 1.0, "mllm.connector": 1.0}
DRAWER = BRIDGE | {"dit": 1.0, "align_head": 1.0}
SEE = {"L_mse": 1.0, "L_lpips": "lambda_lpips"}
DRAW = {"L_fm": 1.0, "L_align": "lambda_a"}

STAGES = [
    Stage("P1", "in place of InternVL3: see and speak", {"tokenizer.vision": 1.0, "mllm.llm": 1.0}, language_losses,
          {"L_lm": 1.0, "L_text": 0.2}),
    Stage("P2", "in place of DC-AE: pixels to latents and back", {"pixel_encoder": 1.0, "tokenizer.decoder": 1.0},
          autoencoder_losses, {"L_mse": 1.0}),
    Stage("P3", "in place of SANA: words to latents", {"dit": 1.0, "mllm.connector.out": 1.0}, drawing_losses, {"L_fm": 1.0}),
    Stage("T1", "dual-stream initialisation", STREAMS, tokenizer_losses, SEE | {"L_p": "lambda_p"}),
    Stage("T2", "joint decoder training", STREAMS | {"tokenizer.decoder": 1.0}, tokenizer_losses, SEE),
    Stage("T3", "encoder fine-tuning with self-distillation",
          STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": "encoder_rate"}, tokenizer_losses,
          SEE | {"L_s": "lambda_s", "L_gan": "lambda_gan"}),
    Stage("U1", "connector pre-training", BRIDGE, unified_losses, {"L_fm": 1.0}),
    Stage("U2", "joint pre-training", DRAWER, unified_losses, DRAW, "edits"),
    Stage("U3", "supervised fine-tuning", DRAWER, unified_losses, DRAW, "edits"),
]


def trained_parameters(model: SPAR, stage: Stage) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """prefix -> the (name, parameter) pairs that train in this stage; each parameter under its longest prefix."""
    found: dict[str, list] = {prefix: [] for prefix in stage.trains}
    for name, parameter in model.named_parameters():
        fits = [prefix for prefix in stage.trains if name == prefix or name.startswith(prefix + ".")]
        if fits and number(stage.trains[max(fits, key=len)], model.config):
            found[max(fits, key=len)].append((name, parameter))
    return found


def number(value: float | str, config: Config) -> float:
    return getattr(config, value) if isinstance(value, str) else value


def wanted_terms(stage: Stage, config: Config) -> dict[str, float]:
    """symbol -> weight of the terms that this configuration asks for, and the share of edits."""
    off = {"L_s"} if not config.anchor else set()
    off |= {"L_align"} if config.align == "none" else set()
    weights = {symbol: number(weight, config) for symbol, weight in stage.losses.items() if symbol not in off}
    return {symbol: weight for symbol, weight in weights.items() if weight}


# ---------------------------------------------------------------- one loop


def prepare(model: SPAR, stage: Stage, h: Helpers) -> None:
    """What a stage needs before its first step: frozen copies, the latents' scale, the connector's start."""
    f = model.config
    if stage.compute is tokenizer_losses:
        h.perceptual = Perceptual(model.pixel_encoder)
    if stage.name == "T3":
        h.teacher = copy.deepcopy(model.tokenizer.vision).requires_grad_(False)
    if stage.name == "U1":
        model.mllm.connector.copy_layers(model.mllm.llm)
    if "L_align" in stage.losses and f.align == "external":
        external = SPAR(f)
        load_stage(external, Path(f.teacher), "P1")
        h.teacher = external.tokenizer.vision.to(model.device).requires_grad_(False)
    if stage.name in ("P3", "U1"):
        images = h.world.pictures(range(512)).to(model.device)
        with torch.no_grad():
            z = model.pixel_encoder(images) if stage.name == "P3" else model.tokenizer(images)[2].fused
        model.latent_scale.fill_(1 / z.std())


def train_stage(model: SPAR, stage: Stage, run: Path, steps_scale: float, seconds_after: Callable) -> None:
    """Trains one stage and writes <stage>.pt. `seconds_after(rate)` estimates what the stages after it will take."""
    f, index = model.config, NAMES.index(stage.name)
    steps, batch, lr = max(1, round(f.steps[index] * steps_scale)), f.batch[index], f.lr[index]
    torch.manual_seed(1000 * f.seed + index)
    h = Helpers(DrawnWorld(f.side, f.seed, epoch=index), torch.Generator().manual_seed(1000 * f.seed + index))
    prepare(model, stage, h)
    terms = wanted_terms(stage, f)
    model.requires_grad_(False)
    groups, names = [], []
    for prefix, pairs in trained_parameters(model, stage).items():
        for matrices in (True, False):  # Muon is for the matrices inside; embeddings and first or last layers are AdamW's
            chosen = [(n, p) for n, p in pairs if matrices == is_inner_matrix(n, p)]
            rate = lr * number(stage.trains[prefix], f) * (f.muon_lr if matrices and f.optimizer == "muon" else 1)
            groups += [dict(params=[p.requires_grad_() for _, p in chosen], matrices=matrices, peak=rate)] if chosen else []
            names += [n for n, _ in chosen]
    optimizer = (Muon if f.optimizer == "muon" else torch.optim.AdamW)(groups, weight_decay=f.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    average = [p.detach().clone() for p in parameters]

    bar = tqdm(range(steps), desc=f"stage {index + 1} of 9  {stage.name}", dynamic_ncols=True, mininterval=0.5)
    start, log = time.time(), (run / "log.jsonl").open("a")
    for step in bar:
        if "L_gan" in terms and h.discriminator is None and step >= f.gan_start * steps:
            h.discriminator = Discriminator(f.gan_width).to(model.device)
            h.adversary = torch.optim.AdamW(h.discriminator.parameters(), lr=lr / 2, betas=(0.5, 0.9))
        # ------------------------------ one training step
        rate = schedule(step, steps, f.warmup, f.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        numbers = range(step * batch, (step + 1) * batch)
        losses = stage.compute(model, numbers, terms | {"edits": number(stage.edits, f)}, h)
        for symbol, value in losses.items():
            if not math.isfinite(value.item()):
                raise SystemExit(f"{stage.name} step {step}: {symbol} is {value.item()}; lower --lr or raise --warmup")
        loss = sum(terms[symbol] * value for symbol, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, f.clip).item()
        if not math.isfinite(norm):
            raise SystemExit(f"{stage.name} step {step}: the gradient of {' + '.join(losses)} is {norm}; lower --lr")
        optimizer.step()
        decay = min(f.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        # ------------------------------
        speed = (step + 1) * batch / (time.time() - start)
        if step % 10 == 0 or step == steps - 1:
            left = seconds_after(speed) + (steps - step - 1) * batch / speed
            shown = {symbol: f"{value.item():.3f}" for symbol, value in losses.items()}
            bar.set_postfix(shown | {"img/s": f"{speed:.0f}", "run left": f"{left / 60:.0f}m"}, refresh=False)
            log.write(json.dumps({"stage": stage.name, "step": step, "loss": loss.item()} |
                                 {symbol: value.item() for symbol, value in losses.items()} |
                                 {"lr": rate * lr, "grad_norm": norm, "seconds": round(time.time() - start, 2),
                                  "images_per_second": round(speed, 1)}) + "\n")
    log.close()
    raw = {name: p.detach().clone() for name, p in zip(names, parameters)}
    with torch.no_grad():
        for parameter, ema in zip(parameters, average):
            parameter.copy_(ema)  # the next stage starts from the averaged weights
    save(run / f"{stage.name}.pt", {"weights": raw, "ema": dict(zip(names, average)), "latent_scale": model.latent_scale,
                                    "optimizer": optimizer.state_dict(), "generator": h.generator.get_state(),
                                    "position": steps * batch, "seconds": time.time() - start})


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    outer = ("embedding", "positions", "queries", "cls", "patches", "stem", "table", "dit.out", "decoder.out")
    return parameter.ndim == 2 and not any(word in name for word in outer)


def schedule(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warm-up, then a cosine from 1 down to `final`."""
    rise = max(1, warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def save(path: Path, content: dict) -> None:
    """Written beside and renamed: a stopped run leaves the old file or the new one, never half of one."""
    beside = path.with_suffix(".part")
    torch.save(content, beside)
    os.replace(beside, path)
