"""Train SPAR from nothing: nine stages, one loop.

    python train.py                          the toy preset on two CPU cores, all nine stages, then the evaluation
    python train.py --steps-scale 0.01 --out runs/smoke      the same in a minute, pictures of noise
    python train.py --plan                   what would be trained, with how many parameters, steps and pictures
    python train.py --fusion last --from runs/toy --out runs/last      an ablation, on the stages it does not touch
    torchrun --standalone --nproc-per-node 8 train.py --preset full    on eight GPUs; --shard to share out the weights too

P1 to P3 make the three public models that the paper starts from; T1 to T3 are its tokenizer stages (Sec. 3.2), U1 to U3
its unified ones (Sec. 3.3). A stage is data (stages.py): what trains, on which batches, with which losses. The loop in
`train_stage` runs them all. runs.py says what a run folder holds; the same command goes on with a stopped run.
"""

import argparse
import json
import math
import os
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

import held_out
import openmoji
from batches import Batches, open_world, to
from bytepair import learn_merges, load_vocabulary, save_vocabulary
from cost import bench, plan, write
from data import DrawnWorld
from disk import DiskData, Found, check_kinds, look
from evaluate import evaluate, print_tables
from layer import layers
from losses import Helpers
from mllm import TextTokenizer
from muon import Muon
from report import draw_report
from processes import Stop, agreed, average, first_process, gather, wait_for_all
from runs import (BrokenCheckpoint, Parser, UserError, best_device, bad_samples, check_same_run, cut_logs, finished, load_config, load_progress,
                  load_stage, read_vocabulary, run_command, save, save_progress, saved_progress, stage_names, take_over)
from spar import CHOICES, NAMES, PRESETS, SPAR, Config, make_config
from stages import (STAGES, Objective, Stage, freeze_the_rest, measure_latents, number, prepare, trained_parameters,
                    wanted_terms)

# ---------------------------------------------------------------- one loop


def spread(objective: Objective, shard: bool) -> nn.Module:
    """Over the processes that torchrun started: a copy on each (DDP), or with `shard` a part of each weight (FSDP2)."""
    if not dist.is_initialized():
        return objective
    if not shard:
        return DistributedDataParallel(objective, broadcast_buffers=False, find_unused_parameters=True)
    for layer in layers(objective):
        fully_shard(layer)
    return fully_shard(objective)


@dataclass
class Progress:
    """All that a stage in progress is, but for its step: noise and order of data are functions of that."""

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    helpers: Helpers
    weights: dict[str, nn.Parameter]  # those that train
    average: dict[str, torch.Tensor]  # their running average

    def state(self) -> dict:
        state = {"weights": self.weights, "average": self.average, "scaler": self.scaler.state_dict(),
                 "optimizer": get_optimizer_state_dict(self.objective, self.optimizer)}
        h = self.helpers
        if h.discriminator is not None:
            state["discriminator"] = h.discriminator.state_dict()
            state["adversary"] = get_optimizer_state_dict(h.discriminator, h.adversary)
        return state

    def load(self, folder: Path) -> tuple[int, float]:
        """-> (the step to go on with, seconds spent before)"""
        state, h = self.state() | {"step": 0, "seconds": 0.0}, self.helpers
        load_progress(folder, state)
        self.scaler.load_state_dict(state["scaler"])
        set_optimizer_state_dict(self.objective, self.optimizer, state["optimizer"])
        if h.discriminator is not None:
            h.discriminator.load_state_dict(state["discriminator"])
            set_optimizer_state_dict(h.discriminator, h.adversary, state["adversary"])
        return state["step"], state["seconds"]


def begin(model: SPAR, stage: Stage, world: DrawnWorld | DiskData) -> Progress:
    """A stage before its first step."""
    f, index, h = model.config, NAMES.index(stage.name), prepare(model, stage)
    measure_latents(model, stage, world)
    freeze_the_rest(model, stage)
    for layer in layers(model):
        layer.recompute = f.checkpointing
    objective = spread(Objective(model, stage, h), f.shard)
    groups, weights = [], {}
    for prefix, pairs in trained_parameters(model, stage).items():
        for matrices in (True, False):  # Muon is for the matrices inside; embeddings and first or last layers are AdamW's
            chosen = {name: p for name, p in pairs if matrices == is_inner_matrix(name, p)}
            rate = f.lr[index] * number(stage.trains[prefix], f) * (f.muon_lr if matrices and f.optimizer == "muon" else 1)
            groups += [dict(params=list(chosen.values()), matrices=matrices, peak=rate)] if chosen else []
            weights |= chosen
    optimizer = (Muon(groups, weight_decay=f.weight_decay) if f.optimizer == "muon" else
                 torch.optim.AdamW(groups, weight_decay=f.weight_decay, fused=model.device.type == "cuda"))
    scaler = torch.amp.GradScaler(model.device.type, enabled=f.precision == "fp16")
    return Progress(objective, optimizer, scaler, h, weights, {name: p.detach().clone() for name, p in weights.items()})


def resume(now: Progress, run: Path, stage: str) -> tuple[int, float]:
    """Loads the newest sound checkpoint of a stage in progress; -> (the step to go on with, seconds spent before)."""
    for folder in reversed(saved_progress(run, stage)):
        try:
            return now.load(folder)
        except BrokenCheckpoint as broken:
            if first_process():
                print(f"{folder} {broken}: going on from the one before it")
    return 0, 0.0


def gradients(now: Progress, read: dict, terms: dict[str, float], clip: float):
    """Forward, backward, clip. -> (losses by symbol, their weighted sum, norm of the gradient)"""
    losses = now.objective(read, terms)
    loss = sum(terms[symbol] * value for symbol, value in losses.items())
    now.optimizer.zero_grad()
    now.scaler.scale(loss).backward()
    now.scaler.unscale_(now.optimizer)
    return losses, loss, whole(torch.nn.utils.clip_grad_norm_(list(now.weights.values()), clip))


def train_stage(model: SPAR, stage: Stage, run: Path, seconds_after: Callable, keep: bool = True, found: Found | None = None) -> None:
    """Trains one stage and, with `keep`, writes <stage>.pt. `seconds_after(rate)` estimates what the stages after it will take.
    `found`: the data on disk, None: the drawn world."""
    f, index, device = model.config, NAMES.index(stage.name), model.device
    steps, batch, lr = f.steps[index], f.batch[index], f.lr[index]
    torch.manual_seed(1000 * f.seed + index)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = Batches(f, stage.name, stage.sample, stage.shares(f), rank, ranks, model.words, found)
    now, terms = begin(model, stage, open_world(f, index, found)), wanted_terms(stage, f)
    parameters, averages = list(now.weights.values()), list(now.average.values())
    first, spent = resume(now, run, stage.name)
    if first_process():
        cut_logs(run, stage.name, first)
    wait_for_all()

    loader = iter(DataLoader(source, batch_size=None, sampler=range(first, steps), num_workers=f.workers,
                             pin_memory=device.type == "cuda", worker_init_fn=Stop.leave_to_parent))
    bar = tqdm(range(first, steps), desc=f"stage {index + 1} of 9  {stage.name}", dynamic_ncols=True, disable=rank > 0)
    log = (run / "log.jsonl").open("a", buffering=1) if rank == 0 else None
    start = last_save = time.time()
    waited, count_bad = 0.0, bad_samples(run, found, f.max_bad)
    with Stop() as stop:
        for step in bar:
            now.helpers.adversary_joins = step >= f.gan_start * steps
            # ------------------------------ one training step
            asked = time.time()
            read = next(loader)
            bad, hopeless = read.pop("bad", []), read.pop("stop", "")
            if hopeless:
                raise UserError(f"{stage.name} step {step}: {hopeless}")
            read = to(read, device)
            waited += time.time() - asked
            rate = schedule(step, steps, f.warmup, f.final_lr)
            for group in now.optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            losses, loss, norm = gradients(now, read, terms, f.clip)
            told = torch.tensor([float(stop.asked), float(len(bad))], device=device)
            *seen, stopping, n_bad = average(torch.cat([torch.stack([*losses.values(), loss, norm]).detach(), told])).tolist()
            check_finite(stage.name, step, dict(zip([*losses, "loss", "gradient"], seen)), now, read, run if keep else None)
            now.helpers.teach_adversary(f.lecam)
            now.scaler.step(now.optimizer)
            now.scaler.update()
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - min(f.ema, (1 + step) / (10 + step)))
            # ------------------------------
            passed = time.time() - start
            speed = (step + 1 - first) * batch / passed
            if n_bad:
                count_bad(stage.name, step, gather(bad))
            if rank == 0 and (step % 10 == 0 or step == steps - 1):
                left = seconds_after(speed) + (steps - step - 1) * batch / speed
                shown = {symbol: f"{value:.3f}" for symbol, value in zip(losses, seen)}
                bar.set_postfix(shown | {"img/s": f"{speed:.0f}", "run left": f"{left / 60:.0f}m"}, refresh=False)
                line = {"stage": stage.name, "step": step, "loss": seen[-2]} | dict(zip(losses, seen)) | {
                    "lr": rate * lr, "grad_norm": seen[-1], "seconds": round(spent + passed, 2),
                    "images_per_second": round(speed, 1), "waiting": round(waited / passed, 4)}
                log.write(json.dumps(line) + "\n")
            if keep and step + 1 < steps and (stopping or agreed(time.time() - last_save >= 60 * f.save_minutes, device)):
                save_progress(run, stage.name, step + 1, now.state() | {"step": step + 1, "seconds": spent + passed})
                last_save = time.time()
                if stopping:
                    bar.close()
                    stop.leave(f"{stage.name} is saved after step {step + 1} of {steps}: the same command goes on from there")
        if keep:
            keep_stage(now, run, stage, model.latent_scale, {"position": steps * batch, "seconds": spent + time.time() - start})
            if agreed(stop.asked, device):
                stop.leave(f"{stage.name} is finished and saved: the same command goes on with the next stage")


def keep_stage(now: Progress, run: Path, stage: Stage, latent_scale: torch.Tensor, more: dict) -> None:
    """Writes <stage>.pt; the model goes on with the averaged weights."""
    ended = get_optimizer_state_dict(now.objective, now.optimizer,
                                     options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    raw, ema = ({name: whole(p.detach()).clone() for name, p in some.items()} for some in (now.weights, now.average))
    with torch.no_grad():
        for name, parameter in now.weights.items():
            parameter.copy_(now.average[name])
    if first_process():
        save(run / f"{stage.name}.pt", {"weights": raw, "ema": ema, "latent_scale": latent_scale, "optimizer": ended} | more)
        for old in (run / "resume").glob("*"):  # this stage's own stay until the next one ends
            if not old.name.startswith(stage.name):
                shutil.rmtree(old, ignore_errors=True)
    wait_for_all()


def check_finite(stage: str, step: int, values: dict[str, float], now: Progress, read: dict, run: Path | None) -> None:
    """Raises UserError before the update, and leaves the step in `run`/replay. A scaled gradient (fp16) may overflow: the scaler
    skips that step by itself."""
    wrong = [symbol for symbol, value in values.items()
             if not math.isfinite(value) and not (now.scaler.is_enabled() and symbol == "gradient")]
    if not wrong:
        return
    told = f"{stage} step {step}: {wrong[0]} is {values[wrong[0]]}; lower --lr or raise --warmup"
    if run is None:
        raise UserError(told)
    for optimizer in (now.optimizer, now.helpers.adversary):  # what is saved is the state before the step
        if optimizer is not None:
            optimizer.zero_grad()
    save_progress(run, stage, step, now.state() | {"step": step, "seconds": 0.0}, "replay")
    rank = dist.get_rank() if dist.is_initialized() else 0
    save(run / "replay" / f"batch-{rank}.pt", {"batch": read, "random": torch.get_rng_state(), "values": values,
                                               "adversary_joins": now.helpers.adversary_joins})
    wait_for_all()
    raise UserError(f"{told}; `python train.py --replay {run / 'replay'}` shows the step again")


def replay(folder: Path, device: str) -> str:
    """Computes a step again that was not finite, from what `check_finite` left, without the update; -> its terms, as they
    were and as they are, and where the first values that are not finite stand. Raises UserError where `folder` holds none."""
    saved, batches = sorted(folder.glob("[PTU][123]-*")), sorted(folder.glob("batch-*.pt"))
    if not saved or not batches:
        raise UserError(f"{folder} holds no step: train.py writes one where a loss is not finite")
    name, step = saved[-1].name.split("-")
    run, stage = folder.parent, next(stage for stage in STAGES if stage.name == name)
    config = load_config(run)
    config.shard = False
    names = stage_names(config)
    model = build(config, device, run, names[:names.index(name)], read_vocabulary(run, config))
    torch.manual_seed(1000 * config.seed + NAMES.index(name))
    now = begin(model, stage, open_world(config, NAMES.index(name), look(Path(config.data)) if config.data else None))
    now.load(saved[-1])
    lines = [f"{name} step {int(step)}, {len(batches)} process(es)"]
    for path in batches:
        kept = torch.load(path, map_location=device, weights_only=True)
        torch.set_rng_state(kept["random"].cpu())
        now.helpers.adversary_joins = kept["adversary_joins"]
        losses, loss, norm = gradients(now, kept["batch"], wanted_terms(stage, config), config.clip)
        again = {symbol: value.item() for symbol, value in [*losses.items(), ("loss", loss), ("gradient", norm)]}
        lines += [f"{symbol:10} then {kept['values'][symbol]:<12.6g} now {value:<12.6g}" for symbol, value in again.items()]
        lines += [f"batch      {key}: not finite" for key, value in kept["batch"].items()
                  if isinstance(value, torch.Tensor) and not value.isfinite().all()]
        for title, some in (("weight", now.weights), ("gradient", {key: p.grad for key, p in now.weights.items() if p.grad is not None})):
            wrong = [key for key, value in some.items() if not value.isfinite().all()]
            lines += [f"{title}s not finite: {len(wrong)}, the first: {', '.join(wrong[:3])}"] if wrong else []
    return "\n".join(lines)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together; all processes ask for it at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    outer = ("embedding", "llm.output", "positions", "queries", "cls", "patches", "stem", "table", "dit.out", "decoder.out")
    return parameter.ndim > 1 and math.prod(parameter.shape[1:]) > 25 and not any(word in name for word in outer)


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
    todo, found = stage_names(config), look(Path(config.data)) if config.data else None
    if found:
        check_kinds(found, [name for name in todo if name in stages], config.edits)
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
        if found and not (run / "vocabulary.json").exists():
            make_vocabulary(found, config, run / "vocabulary.json")
    wait_for_all()
    words, sound = read_vocabulary(run, config), finished(run, config)
    for position, name in enumerate(todo):
        done = name in sound
        if not done and name not in stages:
            later = [other for other in todo[position:] if other in stages and other not in sound]
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

        train_stage(build(config, device, run, todo[:position], words), here, run, seconds_after, found=found)


def make_vocabulary(found: Found, config: Config, path: Path) -> None:
    """The data's own vocabulary where `data.py --build-vocab` left one, else one of its captions, instructions and answers."""
    own = found.root / "vocabulary.json"
    if own.exists():
        save_vocabulary(path, load_vocabulary(own, config.longest).merges)
        return
    save_vocabulary(path, learn_merges(tqdm(found.texts(), desc="vocabulary", leave=False), config.tokens))


def build(config: Config, device: str, run: Path, finished: list[str], words: TextTokenizer | None = None) -> SPAR:
    """The model as a stage finds it. It is made on its device, never on the host beside it."""
    torch.use_deterministic_algorithms(device == "cpu", warn_only=True)  # on two threads, sums into one place have no order
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")  # TF32 on GPUs
    torch.manual_seed(config.seed)
    with torch.device(device):
        model = SPAR(config, words)
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


def some_steps(config: Config, stage: Stage, folder: Path, device: str) -> list[dict]:
    """Trains a stage from random weights; -> the lines of its log."""
    train_stage(build(config, device, folder, []), stage, folder, lambda speed: 0.0, keep=False)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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
    parser.add_argument("--replay", type=Path, default=None, help="RUN/replay: compute a step again that was not finite, and stop")
    parser.add_argument("--plan", action="store_true", default=False, help="print the stages in figures and stop")
    parser.add_argument("--bench", action="store_true", default=False, help="time a step of each stage and stop")
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
    rest = argparse.Namespace(**{key: given.pop(key) for key in ("stages", "out", "source", "device", "plan", "bench", "resume", "replay")})
    rest.out, rest.stages = rest.out or Path("runs") / given["preset"], rest.stages.split(",")
    for name in rest.stages:
        if name not in NAMES:
            raise UserError(f"unknown stage {name!r} in --stages: they are {','.join(NAMES)}")
    rest.device = best_device(rest.device)
    on_gpu = rest.device == "cuda"
    by_device = {"precision": "bf16" if on_gpu else "fp32", "workers": 4 if on_gpu else 0}
    config = make_config(**by_device | PRESETS[given["preset"]] | given)
    for key in ("steps", "batch", "lr"):
        if len(getattr(config, key)) != len(NAMES):
            raise UserError(f"--{key} takes {len(NAMES)} numbers, one for each of {','.join(NAMES)}")
    if config.align == "external" and not config.teacher:
        raise UserError("--align external needs --teacher RUN, a run folder whose P1 encoder teaches")
    if config.shard and (config.optimizer == "muon" or config.precision == "fp16"):
        raise UserError("--shard goes with --optimizer adamw (Muon turns whole matrices) and --precision bf16 or fp32")
    config.steps = tuple(max(1, round(steps * scale)) for steps in config.steps)
    if config.data == "openmoji":
        config.data = str(openmoji.folder(config.side))
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
    env, backend = os.environ, "nccl" if device.startswith("cuda") else "gloo"
    if env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]:  # several machines
        dist.init_process_group(backend)
        return device
    # torchrun keeps its store over a restart, and in it the addresses of those that were killed: each start gets keys of its own
    store = dist.PrefixStore(env["TORCHELASTIC_RESTART_COUNT"], dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False))
    dist.init_process_group(backend, store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))
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
    if rest.replay:
        print(replay(rest.replay, rest.device))
        return
    check_precision(config.precision, rest.device)
    if rest.bench:
        print(write(bench(config, rest.device, lambda *what: some_steps(*what, rest.device))))
        return
    device, start = join_processes(rest.device, config.shard), time.time()
    if Path(config.data) == openmoji.folder(config.side) and first_process():
        openmoji.write(config.side)
    wait_for_all()
    train(config, rest.out, rest.stages, device, rest.source, rest.resume == "auto")
    if not leave_processes():
        return
    if set(stage_names(config)) <= {path.stem for path in rest.out.glob("*.pt")}:
        if config.data:
            print_tables(held_out.evaluate(rest.out, device))
        else:
            results = evaluate(rest.out, device=device)
            draw_report(rest.out, device=device)
            print_tables(results)
    print(f"{rest.out}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_command(main)
