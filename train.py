"""Train SPAR from nothing: nine stages, one loop.

    python train.py                          the toy preset on two CPU cores, all nine stages, then the evaluation
    python train.py --steps-scale 0.01 --out runs/smoke      the same in a minute, pictures of noise
    python train.py --plan                   what would be trained, with how many parameters, steps and pictures
    python train.py --fusion last --from runs/toy --out runs/last      an ablation, on the stages it does not touch
    torchrun --standalone --nproc-per-node 8 train.py --preset full    on eight GPUs; --shard to share out the weights too

P1 to P3 make the three public models that the paper starts from; T1 to T3 are its tokenizer stages (Sec. 3.2), U1 to U3
its unified ones (Sec. 3.3). A stage is data (`STAGES`): what trains, on which batches, with which losses. The loop in
`train_stage` runs them all. runs.py says what a run folder holds; the same command goes on with a stopped run.
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
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from batches import Batch, Batches, drawing_batch, language_batch, picture_batch, to, unified_batch
from data import DrawnWorld
from evaluate import evaluate, print_tables
from layer import Layer
from losses import Helpers, Losses, autoencoder_losses, drawing_losses, language_losses, tokenizer_losses, unified_losses
from muon import Muon
from report import draw_report
from runs import (Parser, UserError, best_device, check_same_run, first_process, load_config, load_progress, load_stage,
                  run_command, save, save_progress, saved_progress, stage_names, take_over, wait_for_all)
from spar import CHOICES, NAMES, PRESETS, SPAR, Config, make_config
from tokenizer import VGG16, Discriminator, Perceptual

# ---------------------------------------------------------------- the nine stages


@dataclass(frozen=True)
class Stage:
    """`trains`: name prefix of the parameters -> their share of the stage's learning rate (a number or a field of Config).
    `losses`: symbol -> weight (the same); a weight of 0 leaves the term out."""

    name: str
    about: str
    trains: dict[str, float | str]
    sample: Callable[..., Batch]  # (batches.Batches, numbers of the step's pictures) -> what the losses read
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
    Stage("P1", "in place of InternVL3: see and speak", {"tokenizer.vision": 1.0, "mllm.llm": 1.0}, language_batch,
          language_losses, {"L_lm": 1.0, "L_caption": 1.0, "L_name": 0.5, "L_text": 0.3}, cost=9),
    Stage("P2", "in place of DC-AE: pixels to latents and back", {"pixel_encoder": 1.0, "tokenizer.decoder": 1.0},
          picture_batch, autoencoder_losses, {"L_mse": 1.0, "L_z": "lambda_z"}, cost=5),
    Stage("P3", "in place of SANA: words to latents", {"dit": 1.0, "dit.reference": 0.0, "mllm.connector": 1.0},
          drawing_batch, drawing_losses, {"L_fm": 1.0}, captions=0.85, cost=4),
    Stage("T1", "dual-stream initialisation", STREAMS, picture_batch, tokenizer_losses,
          SEE | {"L_f": "lambda_f", "L_p": "lambda_p"}, cost=5.5),
    Stage("T2", "joint decoder training", STREAMS | {"tokenizer.decoder": 1.0}, picture_batch, tokenizer_losses,
          SEE | {"L_f": "lambda_f"}, cost=7),
    Stage("T3", "encoder fine-tuning with self-distillation",
          STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": "encoder_rate"}, picture_batch, tokenizer_losses,
          SEE | {"L_f": "lambda_f", "L_s": "lambda_s", "L_gan": "lambda_gan"}, cost=9),
    Stage("U1", "connector pre-training", BRIDGE, unified_batch, unified_losses, {"L_fm": 1.0}, cost=4),
    Stage("U2", "joint pre-training", DRAWER, unified_batch, unified_losses, DRAW, "edits", captions=0.15, cost=6.5),
    Stage("U3", "supervised fine-tuning", DRAWER, unified_batch, unified_losses, DRAW, "edits", captions=0.15, cost=6.5),
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


def prepare(model: SPAR, stage: Stage, lr: float) -> Helpers:
    """What a stage needs before its first step: frozen copies, the adversary, the latents' scale, the connector's start."""
    f, h = model.config, Helpers()
    if "L_lpips" in wanted_terms(stage, f):
        h.perceptual = Perceptual(read_vgg16(f.lpips_weights) if f.lpips_weights else model.pixel_encoder).to(model.device)
    if stage.name == "T3":
        h.teacher = copy.deepcopy(model.tokenizer.vision).requires_grad_(False)
    if "L_gan" in wanted_terms(stage, f):
        h.discriminator = Discriminator(f.gan_width).to(model.device)
        h.adversary = torch.optim.AdamW(h.discriminator.parameters(), lr=lr / 2, betas=(0.5, 0.9))
    if stage.name == "P3":
        model.mllm.connector.copy_layers(model.mllm.llm)
    if "L_align" in stage.losses and f.align == "external":
        external = SPAR(f)
        load_stage(external, Path(f.teacher), "P1")
        h.teacher = external.tokenizer.vision.to(model.device).requires_grad_(False)
    if stage.name in ("P3", "U1"):
        world, z = DrawnWorld(f.side, f.seed, epoch=NAMES.index(stage.name)), []
        with torch.no_grad():
            for first in range(0, 512, 32):
                images = world.pictures(range(first, first + 32)).to(model.device)
                z.append(model.pixel_latent(images) if stage.name == "P3" else model.tokenizer(images)[2].fused)
        model.latent_scale.fill_(1 / torch.cat(z).std())
    return h


def read_vgg16(path: str) -> VGG16:
    try:
        return VGG16(torch.load(path, map_location="cpu", weights_only=True))
    except (ValueError, AttributeError, TypeError, pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"--lpips-weights {path}: {error}".splitlines()[0]) from None


class Objective(nn.Module):
    """Model and losses as one module whose forward is all that a step computes: what DDP and FSDP wrap."""

    def __init__(self, model: SPAR, stage: Stage, helpers: Helpers):
        super().__init__()
        self.model, self.stage, self.helpers = model, stage, helpers

    def forward(self, batch: Batch, wanted: dict) -> Losses:
        kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.model.config.precision]
        with torch.autocast(self.model.device.type, kind, enabled=kind is not None):
            return self.stage.compute(self.model, batch, wanted, self.helpers)


def spread(objective: Objective, shard: bool) -> nn.Module:
    """Over the processes that torchrun started: a copy on each (DDP), or with `shard` a part of each weight (FSDP2)."""
    if not dist.is_initialized():
        return objective
    if not shard:
        return DistributedDataParallel(objective, broadcast_buffers=False, find_unused_parameters=True)
    for module in objective.model.modules():
        if isinstance(module, Layer):
            fully_shard(module)
    return fully_shard(objective)


def train_stage(model: SPAR, stage: Stage, run: Path, seconds_after: Callable) -> None:
    """Trains one stage and writes <stage>.pt. `seconds_after(rate)` estimates what the stages after it will take."""
    f, index, device = model.config, NAMES.index(stage.name), model.device
    steps, batch, lr = f.steps[index], f.batch[index], f.lr[index]
    torch.manual_seed(1000 * f.seed + index)
    h = prepare(model, stage, lr)
    terms = wanted_terms(stage, f)
    shares = {"edits": number(stage.edits, f), "captions": stage.captions, "outcomes": stage.outcomes}
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = Batches(f, stage.name, stage.sample, shares, rank, ranks)
    model.requires_grad_(False)
    for pairs in trained_parameters(model, stage).values():
        for _, parameter in pairs:
            parameter.requires_grad_()
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.recompute = f.checkpointing
    objective = spread(Objective(model, stage, h), f.shard)
    groups, names = [], []
    for prefix, pairs in trained_parameters(model, stage).items():
        for matrices in (True, False):  # Muon is for the matrices inside; embeddings and first or last layers are AdamW's
            chosen = [(n, p) for n, p in pairs if matrices == is_inner_matrix(n, p)]
            rate = lr * number(stage.trains[prefix], f) * (f.muon_lr if matrices and f.optimizer == "muon" else 1)
            groups += [dict(params=[p for _, p in chosen], matrices=matrices, peak=rate)] if chosen else []
            names += [n for n, _ in chosen]
    optimizer = (Muon(groups, weight_decay=f.weight_decay) if f.optimizer == "muon" else
                 torch.optim.AdamW(groups, weight_decay=f.weight_decay, fused=device.type == "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=f.precision == "fp16")
    parameters = [p for group in groups for p in group["params"]]
    average = [p.detach().clone() for p in parameters]
    first, spent = 0, 0.0
    for folder in reversed(saved_progress(run, stage.name)):
        first, spent = load_state(folder, objective, optimizer, scaler, h, dict(zip(names, parameters)), dict(zip(names, average)))
        break

    loader = iter(DataLoader(source, batch_size=None, sampler=range(first, steps), num_workers=f.workers,
                             pin_memory=device.type == "cuda"))
    bar = tqdm(range(first, steps), desc=f"stage {index + 1} of 9  {stage.name}", dynamic_ncols=True, disable=rank > 0)
    start = saved = time.time()
    waited, log = 0.0, (run / "log.jsonl").open("a", buffering=1) if rank == 0 else None
    for step in bar:
        h.adversary_joins = step >= f.gan_start * steps
        # ------------------------------ one training step
        asked = time.time()
        read = to(next(loader), device)
        waited += time.time() - asked
        rate = schedule(step, steps, f.warmup, f.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        losses = objective(read, terms | shares)
        loss = sum(terms[symbol] * value for symbol, value in losses.items())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, f.clip))
        seen = of_all_processes(torch.stack([*losses.values(), loss, norm]).detach())  # the one wait for the device in a step
        check_finite(stage.name, step, dict(zip([*losses, "loss", "gradient"], seen)), scaler.is_enabled())
        scaler.step(optimizer)
        scaler.update()
        decay = min(f.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        # ------------------------------
        spent_now = spent + time.time() - start
        speed = (step + 1 - first) * batch / (time.time() - start)
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            left = seconds_after(speed) + (steps - step - 1) * batch / speed
            shown = {symbol: f"{value:.3f}" for symbol, value in zip(losses, seen)}
            bar.set_postfix(shown | {"img/s": f"{speed:.0f}", "run left": f"{left / 60:.0f}m"}, refresh=False)
            log.write(json.dumps({"stage": stage.name, "step": step, "loss": seen[-2]} | dict(zip(losses, seen)) |
                                 {"lr": rate * lr, "grad_norm": seen[-1], "seconds": round(spent_now, 2),
                                  "images_per_second": round(speed, 1), "waiting": round(waited / (time.time() - start), 4)}) + "\n")
        if step + 1 < steps and agreed(time.time() - saved >= 60 * f.save_minutes, device):
            state = progress(objective, optimizer, scaler, h, dict(zip(names, parameters)), dict(zip(names, average)))
            save_progress(run, stage.name, step + 1, state | {"step": step + 1, "seconds": spent_now})
            saved = time.time()
    ended = get_optimizer_state_dict(objective, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    raw, ends = ({name: whole(p.detach()).clone() for name, p in zip(names, tensors)} for tensors in (parameters, average))
    with torch.no_grad():
        for parameter, ema in zip(parameters, average):
            parameter.copy_(ema)  # the next stage starts from the averaged weights
    if rank == 0:
        log.close()
        save(run / f"{stage.name}.pt", {"weights": raw, "ema": ends, "latent_scale": model.latent_scale, "optimizer": ended,
                                        "position": steps * batch, "seconds": spent + time.time() - start})
        shutil.rmtree(run / "resume", ignore_errors=True)
    wait_for_all()


def check_finite(stage: str, step: int, values: dict[str, float], scaled: bool) -> None:
    """Raises UserError before the update. A scaled gradient (fp16) may overflow: the scaler skips that step by itself."""
    for symbol, value in values.items():
        if not math.isfinite(value) and not (scaled and symbol == "gradient"):
            raise UserError(f"{stage} step {step}: {symbol} is {value}; lower --lr or raise --warmup")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together; all processes ask for it at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def of_all_processes(values: torch.Tensor) -> list[float]:
    """Their mean."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def agreed(mine: bool, device: torch.device) -> bool:
    """What the first process decides."""
    if not dist.is_initialized():
        return mine
    answer = torch.tensor(float(mine), device=device)
    dist.broadcast(answer, 0)
    return bool(answer)


def progress(objective: nn.Module, optimizer, scaler, h: Helpers, weights: dict, average: dict) -> dict:
    """All that a stage in progress is, but for its step: noise and order of data are functions of that."""
    state = {"weights": weights, "average": average, "optimizer": get_optimizer_state_dict(objective, optimizer),
             "scaler": scaler.state_dict()}
    if h.discriminator is not None:
        state |= {"discriminator": h.discriminator.state_dict(), "adversary": get_optimizer_state_dict(h.discriminator, h.adversary)}
    return state


def load_state(folder: Path, objective, optimizer, scaler, h: Helpers, weights: dict, average: dict) -> tuple[int, float]:
    """-> (the step to go on with, seconds spent before)"""
    state = progress(objective, optimizer, scaler, h, weights, average) | {"step": 0, "seconds": 0.0}
    load_progress(folder, state)
    set_optimizer_state_dict(objective, optimizer, state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if h.discriminator is not None:
        h.discriminator.load_state_dict(state["discriminator"])
        set_optimizer_state_dict(h.discriminator, h.adversary, state["adversary"])
    return state["step"], state["seconds"]


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    outer = ("embedding", "llm.output", "positions", "queries", "cls", "patches", "stem", "table", "dit.out", "decoder.out")
    return parameter.ndim > 1 and parameter[0].numel() > 25 and not any(word in name for word in outer)


def schedule(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warm-up, then a cosine from 1 down to `final`."""
    rise = max(1, warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---------------------------------------------------------------- a whole run


def train(config: Config, run: Path, stages: list[str], device: str, source: Path | None, resume: bool = True) -> None:
    """Trains the named stages that `run` has not finished. `source`: a run whose stages are taken over where no changed field
    touches them. Raises UserError where a predecessor is missing."""
    todo = stage_names(config)
    if first_process():
        if source:
            load_config(source)  # a wrong folder is told before anything is written
        run.mkdir(parents=True, exist_ok=True)
        check_same_run(config, run)
        if source:
            take_over(config, run, source)
        if not resume:
            shutil.rmtree(run / "resume", ignore_errors=True)
            for name in stages:
                (run / f"{name}.pt").unlink(missing_ok=True)
    wait_for_all()
    for position, name in enumerate(todo):
        done = (run / f"{name}.pt").exists()
        if not done and name not in stages:
            later = [other for other in todo[position:] if other in stages and not (run / f"{other}.pt").exists()]
            if later:
                raise UserError(f"stage {later[0]} needs {name}, which {run} does not have: add it to --stages")
            break
        if done:
            if first_process():
                print(f"stage {NAMES.index(name) + 1} of 9  {name}: finished before, in {run}")
            continue
        here = next(stage for stage in STAGES if stage.name == name)
        behind = [other for other in STAGES if other.name in todo[position + 1:] and other.name in stages]

        def seconds_after(speed: float) -> float:  # told from this stage's speed and the stages' known relation
            slower = 1000 / speed / here.cost
            return sum(slower * s.cost * config.steps[NAMES.index(s.name)] *
                       config.batch[NAMES.index(s.name)] / 1000 for s in behind)

        train_stage(build(config, device, run, todo[:position]), here, run, seconds_after)


def build(config: Config, device: str, run: Path, finished: list[str]) -> SPAR:
    """The model as a stage finds it. It is made on its device, never on the host beside it."""
    torch.use_deterministic_algorithms(device == "cpu", warn_only=True)  # on two threads, sums into one place have no order
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")  # TF32 on GPUs
    torch.manual_seed(config.seed)
    with torch.device(device):
        model = SPAR(config)
    for name in finished:
        load_stage(model, run, name)
    if device.startswith("cuda"):
        model.to(memory_format=torch.channels_last)
    if config.compile:
        compile_parts(model)
    return model


def compile_parts(model: SPAR, backend: str = "inductor") -> None:
    """Those that always see one shape; the LLM and the connector read sentences of any length."""
    t = model.tokenizer
    for part in (t.vision, t.semantic_stream, t.pixel_stream, t.decoder, model.pixel_encoder, model.dit, model.align_head):
        if part is not None:
            part.compile(backend=backend)


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
    parser.add_argument("--resume", choices=("auto", "never"), default="auto",
                        help="auto: go on with what --out holds; never: train the named stages anew")
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
    rest = argparse.Namespace(**{key: given.pop(key) for key in ("stages", "out", "source", "device", "plan", "resume")})
    rest.out, rest.stages = rest.out or Path("runs") / given["preset"], rest.stages.split(",")
    for name in rest.stages:
        if name not in NAMES:
            raise UserError(f"unknown stage {name!r} in --stages: they are {','.join(NAMES)}")
    on_gpu = best_device(rest.device) == "cuda"
    config = make_config(**{"precision": "bf16" if on_gpu else "fp32", "workers": 4 if on_gpu else 0} | given)
    for key in ("steps", "batch", "lr"):
        if len(getattr(config, key)) != len(NAMES):
            raise UserError(f"--{key} takes {len(NAMES)} numbers, one for each of {','.join(NAMES)}")
    if config.align == "external" and not config.teacher:
        raise UserError("--align external needs --teacher RUN, a run folder whose P1 encoder teaches")
    if config.shard and (config.optimizer == "muon" or config.precision == "fp16"):
        raise UserError("--shard goes with --optimizer adamw (Muon turns whole matrices) and --precision bf16 or fp32")
    config.steps = tuple(max(1, round(steps * scale)) for steps in config.steps)
    return config, rest


def check_precision(precision: str, device: str) -> None:
    """Raises UserError for half precision on a processor that takes longer for it, and says how much longer."""
    if device != "cpu" or precision == "fp32":
        return
    seconds = {}
    for kind in (torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]):
        a, times = torch.ones(256, 256, dtype=kind), []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[kind] = min(times)
    plain, half = seconds.values()
    if half > plain:
        raise UserError(f"--precision {precision}: this processor takes {half / plain:.0f} times as long for products in "
                        f"{precision} as in fp32; use --precision fp32")


def join_processes(device: str, shard: bool) -> str:
    """Where torchrun started several processes: finds the others, and this one's device."""
    if "LOCAL_RANK" not in os.environ:
        if shard:
            raise UserError("--shard spreads a model over processes: start them with torchrun --nproc-per-node N train.py …")
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def leave_processes() -> bool:
    """True for the process that goes on alone."""
    first = first_process()
    if dist.is_initialized():
        dist.destroy_process_group()
    return first


def main() -> None:
    config, rest = parse()
    if rest.plan:
        print(plan(config))
        return
    device = best_device(rest.device)
    check_precision(config.precision, device)
    device, start = join_processes(device, config.shard), time.time()
    train(config, rest.out, rest.stages, device, rest.source, rest.resume == "auto")
    if not leave_processes():
        return
    if set(stage_names(config)) <= {path.stem for path in rest.out.glob("*.pt")}:
        results = evaluate(rest.out, device=device)
        draw_report(rest.out, device=device)
        print_tables(results)
    print(f"{rest.out}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_command(main)
