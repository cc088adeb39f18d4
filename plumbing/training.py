"""A stage in progress: what trains at which rate, what a checkpoint of it holds, and the file that it leaves.

train.py says what the stages are and what a step is; nothing here is in the paper. A `stage` is a train.Stage, `extras`
are a train.Extras.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from tqdm import tqdm

from parts.layer import layers
from parts.muon import Muon, is_inner_matrix
from plumbing.checkpoints import save
from plumbing.processes import first_process, unsharded, wait_for_all, wrap
from spar import SPAR, Config


@dataclass
class Training:
    """All that a stage in progress is, but for its step: noise and order of data are functions of that."""

    config: Config
    stage: object  # train.Stage
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16's loss
    extras: object  # train.Extras
    weights: dict[str, nn.Parameter]  # those that train
    ema: dict[str, Tensor]  # their running average, which is what a run is used with
    loss_weights: dict[str, float]  # symbol -> weight of the terms that are asked for
    clock: Callable[[str], None] = lambda part: None  # told when a part of a step is over; benchmarks.cost listens

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def state(self) -> dict:
        """What a checkpoint of it holds. A scaler that is off is kept as a new one: fp16 may go on from fp32."""
        state = {"weights": self.weights, "average": self.ema,
                 "optimizer": get_optimizer_state_dict(self.module, self.optimizer),
                 "scaler": self.scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict()}
        if self.extras.discriminator is not None:
            state["discriminator"] = self.extras.discriminator.state_dict()
            state["adversary"] = get_optimizer_state_dict(self.extras.discriminator, self.extras.adversary)
        return state

    def restore(self, state: dict) -> None:
        """Weights and average are tensors that loading filled; the rest is handed over."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
        if self.extras.discriminator is not None:
            self.extras.discriminator.load_state_dict(state["discriminator"])
            set_optimizer_state_dict(self.extras.discriminator, self.extras.adversary, state["adversary"])

    def set_rate(self, step: int, steps: int) -> float:
        """-> the share of each group's peak rate that this step has"""
        warmup, final = (self.config.of_stage(field, self.stage.name) for field in ("warmup", "final_lr"))
        share = schedule(step, steps, warmup, final)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]
        if self.config.gan_as_stage and self.extras.adversary:
            self.extras.adversary.param_groups[0]["lr"] = share * self.config.of_stage("lr", self.stage.name)
        return share

    def move_average(self, step: int) -> None:
        """The running average moves a share of the way to the weights; at first a larger one."""
        share = 1 - min(self.config.of_stage("ema", self.stage.name), (1 + step) / (10 + step))
        weights = [parameter.detach() for parameter in self.weights.values()]
        torch._foreach_lerp_(list(self.ema.values()), weights, share)


def schedule(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warm-up, then a cosine from 1 down to `final`."""
    rise = max(1, warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def trained_parameters(model: SPAR, stage) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """prefix -> the (name, parameter) pairs that train in this stage; each parameter under its longest prefix."""
    rates, trained = stage.rates(model.config), {prefix: [] for prefix in stage.trains}
    for name, parameter in model.named_parameters():
        prefix = max((p for p in rates if name == p or name.startswith(p + ".")), key=len, default="")
        if prefix and rates[prefix]:
            trained[prefix].append((name, parameter))
    return trained


def freeze_the_rest(model: SPAR, stage) -> None:
    """Only what the stage trains asks for gradients."""
    model.requires_grad_(False)
    for pairs in trained_parameters(model, stage).values():
        for _, parameter in pairs:
            parameter.requires_grad_()


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay takes from it in the paper: not from norms, biases, tables, positions and queries."""
    return parameter.ndim > 1 and not any(word in name for word in ("table", "positions", "queries", "cls"))


def begin(module: nn.Module) -> Training:
    """A stage before its first step, from its train.StepModule."""
    model, stage, extras, config = module.model, module.stage, module.extras, module.model.config
    freeze_the_rest(model, stage)
    for layer in layers(model):
        layer.recompute = config.checkpointing
    module = wrap(module, config.shard)
    groups, weights, rates = [], {}, stage.rates(config)
    lr, decay = (config.of_stage(field, stage.name) for field in ("lr", "weight_decay"))
    for prefix, pairs in trained_parameters(model, stage).items():  # once more: sharding puts others in their places
        for matrices, decays in product((True, False), repeat=2):  # Muon moves the matrices inside, AdamW all else
            chosen = {name: parameter for name, parameter in pairs if matrices == is_inner_matrix(name, parameter)
                      and decays == (config.decay_all or is_decayed(name, parameter))}
            peak = lr * rates[prefix] * (config.muon_lr if matrices and config.optimizer == "muon" else 1)
            groups += [dict(params=list(chosen.values()), matrices=matrices, peak=peak,
                            weight_decay=decay if decays else 0.0)] if chosen else []
            weights |= chosen
    optimizer = (Muon(groups, betas=config.betas) if config.optimizer == "muon" else
                 torch.optim.AdamW(groups, betas=config.betas, fused=model.device.type == "cuda"))
    scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "fp16")
    ema = {name: parameter.detach().clone() for name, parameter in weights.items()}
    return Training(config, stage, module, optimizer, scaler, extras, weights, ema, stage.loss_weights(config))


@contextmanager
def open_log(run: Path, stage: str, first: int, board: bool) -> Iterator[Callable[[dict], None]]:
    """-> log(line), which adds {"stage", "step", …} to log.jsonl. With `board` its numbers go to TensorBoard as well, a
    curve for each stage, which begins anew at step `first`."""
    with ExitStack() as files:
        file, writer = files.enter_context((run / "log.jsonl").open("a", encoding="utf-8", buffering=1)), None
        if board and first_process():
            from torch.utils.tensorboard import SummaryWriter
            writer = files.enter_context(SummaryWriter(run / "board" / stage, purge_step=first))

        def log(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            numbers = {key: value for key, value in line.items() if key not in ("stage", "step", "held_out")}
            numbers |= {f"held_out/{symbol}": value for symbol, value in line.get("held_out", {}).items()}
            for name, value in numbers.items() if writer else ():
                writer.add_scalar(name, value, line["step"])

        yield log


def report(now: Training, step: int, metrics: dict, bar: tqdm, log: Callable, seconds: float, speed: float,
           left: float, waiting: float) -> None:
    """A line of the log, and the same beside the bar. `left`: seconds of the whole run, `waiting`: share."""
    losses = {symbol: value for symbol, value in metrics.items() if symbol.startswith("L_")}
    rounded = {symbol: f"{value:.3f}" for symbol, value in losses.items()}
    bar.set_postfix(rounded | {"img/s": f"{speed:.0f}", "run left": f"{left / 60:.0f}m"}, refresh=False)
    lr = metrics["rate"] * now.config.of_stage("lr", now.stage.name)
    log({"stage": now.stage.name, "step": step, "loss": metrics["loss"]} | losses | {
        "lr": lr, "grad_norm": metrics["gradient"], "seconds": round(seconds, 2), "images_per_second": round(speed, 1),
        "waiting": round(waiting, 4)})


def keep_stage(now: Training, run: Path, latent_scale: Tensor, pictures: int, seconds: float) -> None:
    """Writes <stage>.pt; the model goes on with the averaged weights."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = get_optimizer_state_dict(now.module, now.optimizer, options=whole)
    raw = {name: unsharded(parameter.detach()).clone() for name, parameter in now.weights.items()}
    ema = {name: unsharded(value).clone() for name, value in now.ema.items()}
    with torch.no_grad():
        for name, parameter in now.weights.items():
            parameter.copy_(now.ema[name])
    if first_process():
        save(run / f"{now.stage.name}.pt", {"weights": raw, "ema": ema, "latent_scale": latent_scale,
                                            "optimizer": optimizer, "position": pictures, "seconds": seconds})
        for old in (run / "resume").glob("*"):  # this stage's own stay until the next one ends
            if not old.name.startswith(now.stage.name):
                shutil.rmtree(old, ignore_errors=True)
    wait_for_all()
