"""How a stage of hours or days goes on: every --look-minutes a line of log.jsonl with held-out losses, memory and
speed, and pictures of what the model can do by now.

    {"stage", "step", "held_out": {symbol: value}, "memory": bytes of the device at most, "utilisation": of its peak}

The held-out samples are the first batch of the test split, with noises and times that are functions of their numbers:
from one look to the next nothing differs but the weights, which are those of the step, not their running average.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cost import forecast, peak_of
from data import Batches, read, to
from disk.files import BadFile
from disk.samples import DataFolder
from plumbing.pictures import drawn, on_disk, sheet
from plumbing.processes import decided_by_first, first_process, mean_of_metrics, process_rank, wait_for_all
from plumbing.training import Training
from spar import NAMES, SPAR


@torch.no_grad()
def held_out_losses(now: Training, source: Batches, joined: bool) -> dict[str, float]:
    """Symbol -> mean over the first batch of `source`; all processes ask at once."""
    parts, sums = read(iter([source[0]]), f"{now.stage.name}, held out")[0], {}
    for part in parts:
        for symbol, value in now.module(to(part, now.device), now.loss_weights, joined)[0].items():
            sums[symbol] = sums.get(symbol, 0) + value / len(parts)
    return mean_of_metrics(sums)


def draw_sheet(run: Path, model: SPAR, stages: tuple[str, ...], data_folder: DataFolder | None) -> str:
    """`run`/report/<stage>.png: what a model in the midst of the last of these `stages` can do; -> where."""
    model.finished_stages, path = [*stages], run / "report" / f"{stages[-1]}.png"
    try:
        sections = on_disk(run, model, model.device.type, data_folder)[0] if model.config.data else drawn(model)[0]
        path.parent.mkdir(exist_ok=True)
        sheet(sections).save(path)
        return f"so far: {path}"
    except (ValueError, RuntimeError, OSError) as error:
        return f"no pictures: {error}"


def watch(now: Training, model: SPAR, source: Batches, run: Path, one_batch: Callable,
          step_module: Callable) -> Callable:
    """-> look(step, pictures per second, log), which looks when it is time. `source`: what the stage reads; the rest is
    train.py's."""
    config, last, peak, flops, early = now.config, time.time(), None, 0.0, 0.0
    minutes, name, steps = config.look_minutes, now.stage.name, config.of_stage("steps", now.stage.name)
    if minutes:
        held_out = replace(source, config=replace(config, early=0.0), split="test")
        early = config.early * steps if name == "T3" else 0.0
        peak = peak_of(torch.cuda.get_device_name(now.device)) if now.device.type == "cuda" else None
    if peak:
        flops = forecast(config, now.stage, one_batch, step_module)["flops"] / source.batch  # of one picture

    def look(step: int, speed: float, log: Callable) -> None:
        nonlocal last
        if not minutes or not decided_by_first(time.time() - last >= 60 * minutes, now.device):
            return
        line = {"stage": name, "step": step, "held_out": {}}
        try:
            line["held_out"] = held_out_losses(now, held_out, step >= config.gan_start * steps)
        except BadFile as none:
            print(f"no held-out losses: {none}") if first_process() else None
        if now.device.type == "cuda":
            line["memory"] = torch.cuda.max_memory_allocated(now.device)
        if flops and step >= early:
            line["utilisation"] = speed * flops / peak / process_rank()[1]
        if first_process():
            log(line)
            if not config.shard:  # a sharded model draws nothing alone
                print(draw_sheet(run, model, NAMES[:NAMES.index(name) + 1], source.data_folder))
        wait_for_all()
        last = time.time()

    return look
