"""Train SPAR from nothing: nine stages, one loop.

    python train.py                          the toy preset on two CPU cores, all nine stages, then the evaluation
    python train.py --steps-scale 0.01 --out runs/smoke      the same in a minute, pictures of noise
    python train.py --plan                   what would be trained, with how many parameters, steps and pictures
    python train.py --fusion last --from runs/toy --out runs/last      an ablation, on the stages it does not touch

P1 to P3 make the three public models that the paper starts from; T1 to T3 are its tokenizer stages (Sec. 3.2), U1 to U3
its unified ones (Sec. 3.3). A stage is data (`STAGES`): what trains, on which batches, with which losses. The loop in
`train_stage` runs them all. A run folder holds config.json, log.jsonl, <stage>.pt, results.json and report/.
"""

import argparse
import copy
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from data import DrawnWorld
from evaluate import evaluate, print_tables
from losses import Helpers, Losses, autoencoder_losses, drawing_losses, language_losses, tokenizer_losses, unified_losses
from muon import Muon
from report import draw_report
from spar import (CHOICES, NAMES, PRESETS, SPAR, Config, Parser, UserError, best_device, load_config, load_stage,
                  make_config, run_command, stage_names)
from tokenizer import VGG16, Discriminator, Perceptual

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
    captions: float = 0.5  # share of whole captions among what is drawn: nothing left unsaid; the rest are short requests
    outcomes: float = 0.5  # share of edits whose outcome is said as well, as `SPAR.rewrite` says it
    cost: float = 1.0  # seconds per 1000 pictures of the toy preset on two cores; only the time left is told from it


STREAMS = {"tokenizer.semantic_stream": 1.0, "tokenizer.pixel_stream": 1.0, "tokenizer.fusion": 1.0}
BRIDGE = {"mllm.queries": 1.0, "mllm.router": 1.0, "mllm.connector": 1.0}
DRAWER = BRIDGE | {"dit": 1.0, "align_head": 1.0}
SEE = {"L_mse": 1.0, "L_lpips": "lambda_lpips"}
DRAW = {"L_fm": 1.0, "L_align": "lambda_a"}

STAGES = [
    Stage("P1", "in place of InternVL3: see and speak", {"tokenizer.vision": 1.0, "mllm.llm": 1.0}, language_losses,
          {"L_lm": 1.0, "L_caption": 1.0, "L_name": 0.5, "L_text": 0.3}, cost=9),
    Stage("P2", "in place of DC-AE: pixels to latents and back", {"pixel_encoder": 1.0, "tokenizer.decoder": 1.0},
          autoencoder_losses, {"L_mse": 1.0, "L_z": "lambda_z"}, cost=5),
    Stage("P3", "in place of SANA: words to latents", {"dit": 1.0, "dit.reference": 0.0, "mllm.connector": 1.0},
          drawing_losses, {"L_fm": 1.0}, captions=0.85, cost=4),
    Stage("T1", "dual-stream initialisation", STREAMS, tokenizer_losses, SEE | {"L_f": "lambda_f", "L_p": "lambda_p"}, cost=5.5),
    Stage("T2", "joint decoder training", STREAMS | {"tokenizer.decoder": 1.0}, tokenizer_losses,
          SEE | {"L_f": "lambda_f"}, cost=7),
    Stage("T3", "encoder fine-tuning with self-distillation",
          STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": "encoder_rate"}, tokenizer_losses,
          SEE | {"L_f": "lambda_f", "L_s": "lambda_s", "L_gan": "lambda_gan"}, cost=9),
    Stage("U1", "connector pre-training", BRIDGE, unified_losses, {"L_fm": 1.0}, cost=4),
    Stage("U2", "joint pre-training", DRAWER, unified_losses, DRAW, "edits", captions=0.15, cost=6.5),
    Stage("U3", "supervised fine-tuning", DRAWER, unified_losses, DRAW, "edits", captions=0.15, cost=6.5),
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
    """A number as it is, a name as that field of the configuration."""
    if value == "encoder_rate" and config.freeze_encoder:
        return 0.0
    return getattr(config, value) if isinstance(value, str) else value


def wanted_terms(stage: Stage, config: Config) -> dict[str, float]:
    """symbol -> weight of the terms that this configuration asks for."""
    off = {"L_s"} if not config.anchor else set()
    off |= {"L_align"} if config.align == "none" else set()
    weights = {symbol: number(weight, config) for symbol, weight in stage.losses.items() if symbol not in off}
    return {symbol: weight for symbol, weight in weights.items() if weight}


# ---------------------------------------------------------------- one loop


def prepare(model: SPAR, stage: Stage, h: Helpers) -> None:
    """What a stage needs before its first step: frozen copies, the latents' scale, the connector's start."""
    f = model.config
    if stage.compute is tokenizer_losses:
        h.perceptual = Perceptual(read_vgg16(f.lpips_weights) if f.lpips_weights else model.pixel_encoder).to(model.device)
    if stage.name == "T3":
        h.teacher = copy.deepcopy(model.tokenizer.vision).requires_grad_(False)
    if stage.name == "P3":
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


def read_vgg16(path: str) -> VGG16:
    try:
        return VGG16(torch.load(path, map_location="cpu", weights_only=True))
    except (ValueError, AttributeError, TypeError, pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"--lpips-weights {path}: {error}".splitlines()[0]) from None


def train_stage(model: SPAR, stage: Stage, run: Path, seconds_after: Callable) -> None:
    """Trains one stage and writes <stage>.pt. `seconds_after(rate)` estimates what the stages after it will take."""
    f, index = model.config, NAMES.index(stage.name)
    steps, batch, lr = f.steps[index], f.batch[index], f.lr[index]
    torch.manual_seed(1000 * f.seed + index)
    h = Helpers(DrawnWorld(f.side, f.seed, epoch=index), torch.Generator().manual_seed(1000 * f.seed + index))
    prepare(model, stage, h)
    terms = wanted_terms(stage, f)
    shares = {"edits": number(stage.edits, f), "captions": stage.captions, "outcomes": stage.outcomes}
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

    bar = tqdm(range(steps), desc=f"stage {index + 1} of 9  {stage.name}", dynamic_ncols=True)
    start, log = time.time(), (run / "log.jsonl").open("a", buffering=1)
    for step in bar:
        if "L_gan" in terms and h.discriminator is None and step >= f.gan_start * steps:
            h.discriminator = Discriminator(f.gan_width).to(model.device)
            h.adversary = torch.optim.AdamW(h.discriminator.parameters(), lr=lr / 2, betas=(0.5, 0.9))
        # ------------------------------ one training step
        rate = schedule(step, steps, f.warmup, f.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        numbers = range(step * batch, (step + 1) * batch)
        losses = stage.compute(model, numbers, terms | shares, h)
        for symbol, value in losses.items():
            if not math.isfinite(value.item()):
                raise UserError(f"{stage.name} step {step}: {symbol} is {value.item()}; lower --lr or raise --warmup")
        loss = sum(terms[symbol] * value for symbol, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, f.clip).item()
        if not math.isfinite(norm):
            raise UserError(f"{stage.name} step {step}: the gradient of {' + '.join(losses)} is {norm}; lower --lr")
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
    return parameter.ndim > 1 and parameter[0].numel() > 25 and not any(word in name for word in outer)


def schedule(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warm-up, then a cosine from 1 down to `final`."""
    rise = max(1, warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def save(path: Path, content: dict) -> None:
    """Written beside and renamed: a stopped run leaves the old file or the new one, never half of one. Raises UserError where
    it cannot be written, on a full disk for one."""
    beside = path.with_suffix(".part")
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    except (RuntimeError, OSError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; free some space and run the same command") from None
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------- a whole run


def train(config: Config, run: Path, stages: list[str], device: str, source: Path | None) -> SPAR:
    """Trains the named stages that `run` has not finished; the others are loaded. `source`: a run whose stages are taken
    over where no changed field touches them. Raises UserError where a predecessor is missing."""
    if source:
        load_config(source)  # a wrong folder is told before anything is written
    run.mkdir(parents=True, exist_ok=True)
    check_same_run(config, run)
    todo = stage_names(config)
    if source:
        take_over(config, run, source)
    torch.use_deterministic_algorithms(True, warn_only=True)  # on two threads, sums into one place would come in any order
    torch.manual_seed(config.seed)
    model = SPAR(config).to(device)
    for position, name in enumerate(todo):
        done = (run / f"{name}.pt").exists()
        if not done and name not in stages:
            later = [other for other in todo[position:] if other in stages and not (run / f"{other}.pt").exists()]
            if later:
                raise UserError(f"stage {later[0]} needs {name}, which {run} does not have: add it to --stages")
            break
        if done:
            load_stage(model, run, name)
            print(f"stage {NAMES.index(name) + 1} of 9  {name}: finished before, loaded from {run}")
            continue
        here = next(stage for stage in STAGES if stage.name == name)
        behind = [other for other in STAGES if other.name in todo[position + 1:] and other.name in stages]

        def seconds_after(speed: float) -> float:  # told from this stage's speed and the stages' known relation
            slower = 1000 / speed / here.cost
            return sum(slower * s.cost * config.steps[NAMES.index(s.name)] *
                       config.batch[NAMES.index(s.name)] / 1000 for s in behind)

        train_stage(model, here, run, seconds_after)
    return model


def check_same_run(config: Config, run: Path) -> None:
    """Writes config.json, or finds the same one there."""
    path = run / "config.json"
    if path.exists():
        before, now = asdict(load_config(run)), asdict(config)
        differing = [key for key in now if before[key] != now[key]]
        if differing:
            raise UserError(f"{run} was begun with {differing[0]} = {before[differing[0]]!r}, not {now[differing[0]]!r}: "
                            "choose another --out")
    path.write_text(json.dumps(asdict(config), indent=1) + "\n")


FIRST_TOUCHED = {"lambda_lpips": "T1", "lambda_p": "T1", "lambda_f": "T1", "lambda_s": "T3", "lambda_gan": "T3", "gan_start": "T3", "lecam": "T3",
                 "encoder_rate": "T3", "gan_width": "T3", "lambda_a": "U2", "edits": "U2", "tokenizer": "T1", "symmetric": "T1",
                 "pixel_layers": "T1", "pixel_heads": "T1", "stream_blocks": "T1", "lpips_weights": "T1", "anchor": "T3",
                 "freeze_encoder": "T3", "fusion": "U1", "k": "P3", "queries": "U1", "connector_layers": "P3",
                 "shift": "P3", "draws": "P3", "align": "U2", "teacher": "U2", "align_hidden": "U2", "reference": "U2"}  # any other field: P1


def take_over(config: Config, run: Path, source: Path) -> None:
    """Copies from `source` the stages before the first that a differing field touches."""
    before, now = asdict(load_config(source)), asdict(config)
    touched = len(NAMES)
    for key in (key for key in now if before[key] != now[key] and key not in ("preset", "skip_stage")):
        if key in ("steps", "batch", "lr"):
            touched = min([touched, *(i for i in range(9) if before[key][i] != now[key][i])])
        else:
            touched = min(touched, NAMES.index(FIRST_TOUCHED.get(key, "P1")))
    for skipped in {before["skip_stage"], now["skip_stage"]} - {""} if before["skip_stage"] != now["skip_stage"] else ():
        touched = min(touched, NAMES.index(skipped))
    for name in NAMES[:touched]:
        if name != config.skip_stage and (source / f"{name}.pt").exists() and not (run / f"{name}.pt").exists():
            shutil.copyfile(source / f"{name}.pt", run / f"{name}.part")
            os.replace(run / f"{name}.part", run / f"{name}.pt")


def plan(config: Config) -> str:
    """The stages of a run in figures; allocates no weights."""
    with torch.device("meta"):
        model = SPAR(config)
    tokens = (config.side // (2 * config.patch)) ** 2
    lines = [f"preset {config.preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
             f"{config.side} px, {tokens} tokens a picture"]
    for stage in STAGES:
        i = NAMES.index(stage.name)
        if stage.name == config.skip_stage:
            continue
        trained = sum(p.numel() for pairs in trained_parameters(model, stage).values() for _, p in pairs)
        whole = sum(p.numel() for p in model.parameters())
        memory = 4 * (whole + 5 * trained) / 2**30  # fp32: weights; gradient, two moments, average, and its copy
        lines.append(f"{stage.name}  {stage.about:48} trains {trained / 1e6:8.2f} M   {config.steps[i]:6} "
                     f"steps of {config.batch[i]:3} pictures ({config.batch[i] * tokens} tokens)   {memory:6.2f} GiB + activations")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Flags -> (configuration, the rest). Every field of Config is a flag; a wrong one names the nearest."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=list(PRESETS), default="toy")
    parser.add_argument("--stages", default=",".join(NAMES), help="P1,P2,…: which to train (default: all not finished)")
    parser.add_argument("--out", type=Path, default=None, help="run folder (default runs/<preset>)")
    parser.add_argument("--from", dest="source", type=Path, default=None, help="run whose untouched stages are reused")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies every stage's steps")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--plan", action="store_true", default=False, help="print the stages in figures and stop")
    for field in fields(Config):
        if field.name == "preset":
            continue
        flag, kind = "--" + field.name.replace("_", "-"), type(field.default)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            parser.add_argument(flag, type=lambda text, like=field.default: tuple(type(like[0])(x) for x in text.split(",")))
        else:
            parser.add_argument(flag, type=kind, choices=CHOICES.get(field.name))
    given = vars(parser.read(arguments))
    scale = given.pop("steps_scale")
    rest = argparse.Namespace(**{key: given.pop(key) for key in ("stages", "out", "source", "device", "plan")})
    rest.out, rest.stages = rest.out or Path("runs") / given["preset"], rest.stages.split(",")
    for name in rest.stages:
        if name not in NAMES:
            raise UserError(f"unknown stage {name!r} in --stages: they are {','.join(NAMES)}")
    config = make_config(**given)
    for key in ("steps", "batch", "lr"):
        if len(getattr(config, key)) != len(NAMES):
            raise UserError(f"--{key} takes {len(NAMES)} numbers, one for each of {','.join(NAMES)}")
    if config.align == "external" and not config.teacher:
        raise UserError("--align external needs --teacher RUN, a run folder whose P1 encoder teaches")
    config.steps = tuple(max(1, round(steps * scale)) for steps in config.steps)
    return config, rest


def main() -> None:
    config, rest = parse()
    if rest.plan:
        print(plan(config))
        return
    device = best_device(rest.device)
    start = time.time()
    train(config, rest.out, rest.stages, device, rest.source)
    if set(stage_names(config)) <= {path.stem for path in rest.out.glob("*.pt")}:
        results = evaluate(rest.out, device=device)
        draw_report(rest.out, device=device)
        print_tables(results)
    print(f"{rest.out}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_command(main)
