"""What a stage costs: parameters, memory and arithmetic, told before it runs (`train.py --plan`), and speed, measured
(`train.py --bench`).

The forecast runs one step of each stage, forward and backward, on tensors that have shapes and no content: it adds up
what autograd keeps for backward and counts the multiplications.
"""

import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.yardstick import processor
from disk.reading import NEEDS, open_folders
from disk.samples import DataFolder
from parts.layer import layers
from plumbing.command import write_text
from plumbing.run_folder import build, stage_names, text_tokenizer
from plumbing.training import trained_parameters
from public.folders import check_folders, imported_stages
from spar import NAMES, SPAR, Config

UTILISATION = 0.4  # of an H100's peak, by which --plan tells the time; what a run reaches: --bench
CARDS = (24, 40, 80, 141)  # GB of memory that GPUs have
PROBE = 4  # pictures in the forecast's step; what it finds grows in proportion
# Dense half-precision products per second, from the makers' data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_of(name: str) -> float | None:
    """FLOP per second of a GPU that is known by its name."""
    return next((value for key, value in PEAKS.items() if key in name), None)


def forecast(config: Config, stage, one_batch: Callable, step_module: Callable) -> dict[str, float]:
    """One stage on one device: parameters (`all`, `trained`), bytes (`weights`, `optimizer`, `activations`, `total`)
    and the arithmetic of one step, forward and backward, in FLOP (`flops`, of which `dit_flops` inside the DiT), of T3
    one behind its `early` ones, whose pictures are smaller. `one_batch` and `step_module` are train.py's."""
    index = NAMES.index(stage.name)
    small = replace(config, batch=(PROBE,) * len(NAMES), per_device=(0,) * len(NAMES), teacher="", early=0.0,
                    align="none" if config.align == "none" else "self")
    batch = lengthened(one_batch(small, stage), config.longest if config.data else 0)
    with torch.device("meta"):
        model = SPAR(small, text_tokenizer(small))
    with warnings.catch_warnings(action="ignore"), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model.to_empty(device="cpu")
        module = step_module(model, stage)
        batch, weights = tree_map_only(torch.Tensor, fake.from_tensor, batch), stage.loss_weights(config)
        with FlopCounterMode(display=False) as counter:  # before layers are made to compute twice: that is no progress
            sum(module(batch, weights)[0].values()).backward()
        kept, one_layer = activations(module, lambda: module(batch, weights), config.checkpointing)
    whole = sum(p.numel() for p in model.parameters())
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = module.extras.encoder_before, module.extras.external_teacher
    frozen_copies = sum(p.numel() for copy in copies if copy for p in copy.parameters())
    moments = 1 if config.optimizer == "muon" else 2  # of matrices; the few other parameters have two in any case
    share = config.batch[index] / PROBE
    held = share / config.parts(stage.name, 1)
    cost = {"all": whole, "trained": ours, "weights": 4 * (whole + frozen_copies),
            "optimizer": 4 * (2 + moments) * ours,  # gradient, moments, running average
            "activations": (kept + one_layer) * held, "flops": counter.get_total_flops() * share,
            "dit_flops": sum(counter.get_flop_counts().get("StepModule.model.dit", {}).values()) * share}
    return cost | {"total": cost["weights"] + cost["optimizer"] + cost["activations"]}


def lengthened(batch: dict, longest: int) -> dict:
    """The batch with prompts of `longest` words, the most that data on disk may bring."""
    for key in {"words", "instructions"} & set(batch):
        ids, mask = batch[key]
        more = max(0, longest - ids.shape[1])
        batch[key] = (torch.cat([ids[:, -1:].expand(-1, more), ids], 1), F.pad(mask, (more, 0), value=True))
    return batch


def passes(config: Config, name: str, folder: DataFolder) -> str:
    """How often a stage goes over its data on disk."""
    drawn, counts = config.of_stage("steps", name) * config.of_stage("batch", name), []
    edits = config.of_stage("edits", name)
    for kind in NEEDS[name]:
        count = len(folder.of(kind))
        share = edits if kind == "edits" else 1 - edits
        counts += [f"{drawn * share / count:.3g} passes over {count} {kind}"] if count and share else []
    return ", ".join(counts)


def activations(module: torch.nn.Module, step: Callable, recompute: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of one forward; and, where layers are recomputed, the most that one of them keeps
    then."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}

    def kept(layer_sizes: list) -> int:
        seen: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        before = {}
        hooks = [hook for layer in layers(module) for hook in (
            layer.register_forward_pre_hook(lambda layer, _: before.update({layer: sum(seen.values())})),
            layer.register_forward_hook(lambda layer, *_: layer_sizes.append(sum(seen.values()) - before[layer])))]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step()
        for hook in hooks:
            hook.remove()
        return sum(seen.values())

    sizes: list[int] = []
    whole = kept(sizes)
    if not recompute:
        return whole, 0
    for layer in layers(module):
        layer.recompute = True
    return kept([]), max(sizes, default=0)


def plan(config: Config, stages: list, one_batch: Callable, step_module: Callable, out: Path) -> str:
    """The stages of a run in figures, and what it writes into `out`; allocates no weights. Of public folders the
    headers are read and checked."""
    lines, gib = [], 2**30
    with torch.device("meta"):
        model = SPAR(config, text_tokenizer(config))  # numbers that do not fit are told here
    folders, imported = check_folders(config), imported_stages(config)
    disk, largest = 0, 0
    edits = dict(zip(NAMES, config.edits))
    data = open_folders({name: config.data_of(name) for name in stage_names(config)}, set(), edits)
    for stage in (stage for stage in stages if stage.name in imported):
        disk += 4 * sum(p.numel() for pairs in trained_parameters(model, stage).values() for _, p in pairs)
    chosen = [stage for stage in stages if stage.name != config.skip_stage and stage.name not in imported]
    for stage in tqdm(chosen, desc="forecast", leave=False):
        i, cost = NAMES.index(stage.name), forecast(config, stage, one_batch, step_module)
        flops, each = cost["flops"], cost["activations"] / (config.batch[i] / config.parts(stage.name, 1))
        if stage.name == "T3" and config.early:  # arithmetic grows with the area, attention's a little faster
            flops *= 1 - config.early * (1 - (config.at("T2").side / config.at("T3").side) ** 2)
        fit = [f"{max(0, int((size * 1e9 - cost['weights'] - cost['optimizer']) / each))} in {size}" for size in CARDS]
        kept = cost["optimizer"]  # as many bytes: weights in place of gradients, moments, average
        disk, largest = disk + kept, max(largest, kept)
        if not lines:
            recomputed = ", layers recomputed" if config.checkpointing else ""
            lines.append(f"preset {config.preset}: {cost['all'] / 1e6:.1f} M parameters, {config.side} px, "
                         f"{config.grid**2} tokens a picture, {config.precision}{recomputed}; days of one H100 at "
                         f"{UTILISATION:.0%} of its peak, memory of one device:")
        lines.append(f"{stage.name}  {stage.about:42} trains {cost['trained'] / 1e6:8.2f} M  "
                     f"{config.steps[i]:6} steps of {config.batch[i]:3} pictures "
                     f"({config.batch[i] * config.at(stage.name).grid**2} tokens)  "
                     f"{flops / 1e12:8.2f} TFLOP a step  "
                     f"{flops * config.steps[i] / UTILISATION / PEAKS['H100'] / 86400:6.2f} GPU-days  "
                     f"{cost['total'] / gib:6.2f} GiB = "
                     f"{cost['weights'] / gib:.2f} weights + {cost['optimizer'] / gib:.2f} gradients, moments, average "
                     f"+ {cost['activations'] / gib:.2f} activations; pictures at a time: {', '.join(fit)} GB"
                     + (f"  {passes(config, stage.name, data[stage.name])}" if data[stage.name] else ""))
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    lines.append(f"{out}: {disk / gib:.2f} GiB of stages and at most {2 * largest / gib:.2f} GiB of progress, "
                 f"{shutil.disk_usage(there).free / gib:.2f} GiB free")
    return "\n".join([*folders, *lines])


# ---------------------------------------------------------------- measured


def bench(config: Config, device: str, out: Path, stages: list, one_batch: Callable, step_module: Callable,
          train_stage: Callable, rounds: int = 3, steps: int = 31) -> dict:
    """Times the steps of each stage as `train_stage`, train.py's, trains them; prints a table and
    writes `out`/bench.json.

    Per stage: seconds of a step and of its "parts" (`timed`), and of making its "data", which without workers is the
    same as waiting for it; pictures per second, share of the time spent waiting for data, FLOP per second and, where
    the device's peak is known, the share of it; on CUDA the peak memory beside the forecast. Of U2 also what L_align
    and DTR cost: its step with ÷ its step without, taken by turns."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else processor()
    peak = peak_of(name)
    held = tuple(config.of_stage("batch", name) // config.parts(name, 1) for name in NAMES)
    config = replace(config, steps=(steps,) * len(NAMES), batch=held, per_device=(0,) * len(NAMES), early=0.0)
    result = {"device": name, "torch": torch.__version__, "preset": config.preset, "precision": config.precision,
              "compile": config.compile, "stages": {}}
    print(f"{name}, torch {torch.__version__}, preset {config.preset}, {config.precision}")
    for stage in (stage for stage in stages if stage.name not in imported_stages(config)):
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        cost = forecast(config, stage, one_batch, step_module)
        parts = timed(config, stage, train_stage, device)
        step, start = sum(parts.values()), time.perf_counter()
        one_batch(config, stage)
        data = time.perf_counter() - start if config.workers else parts["waiting"]
        row = {"step": step, "parts": parts, "data": data,
               "images_per_second": config.of_stage("batch", stage.name) / step, "waiting": parts["waiting"] / step,
               "flops": cost["flops"] / step, "utilisation": cost["flops"] / step / peak if peak else None}
        if device.startswith("cuda"):
            row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "forecast_bytes": cost["total"]}
        result["stages"][stage.name] = row
        line = (f"{stage.name}  {step * 1e3:8.1f} ms a step = "
                + " + ".join(f"{seconds * 1e3:.1f} {part}" for part, seconds in parts.items())
                + f"; data takes {row['data'] * 1e3:.1f}  {row['images_per_second']:8.1f} images/s  "
                f"{row['flops'] / 1e12:8.3f} TFLOP/s")
        if peak:
            line += f" = {row['utilisation']:.1%} of the peak"
        if "peak_bytes" in row:
            line += f"  {row['peak_bytes'] / 2**30:.2f} GiB, forecast {cost['total'] / 2**30:.2f}"
        print(line)
    u2 = next(stage for stage in stages if stage.name == "U2")
    variants = {"all": config, "L_align": replace(config, align="none"), "DTR": replace(config, router="last")}
    taken = {key: [] for key in variants}
    for _ in range(rounds):
        for key, changed in variants.items():
            taken[key].append(sum(timed(changed, u2, train_stage, device).values()))
    for key in ("L_align", "DTR"):
        result[key] = statistics.median(taken["all"]) / statistics.median(taken[key])
        print(f"{key} costs: step with it ÷ step without = {result[key]:.3f}")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "bench.json", json.dumps(result, indent=1) + "\n")
    print(out / "bench.json")
    return result


def timed(config: Config, stage, train_stage: Callable, device: str = "cpu") -> dict[str, float]:
    """-> mean seconds of a step "waiting" for data, "forward", "backward", and from there to its end, "optimizer":
    clipping, update, adversary, running average. The first third of the steps does not count."""
    marks = []

    def clock(part: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        marks.append((part, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        train_stage(build(config, device), stage, Path(folder), keep=False, clock=clock)
    counted, seconds = marks[4 * (len(marks) // 12) - 1:], Counter()
    for (_, begin), (part, end) in pairwise(counted):
        seconds[part] += end - begin
    return {part: total / (len(counted) // 4) for part, total in seconds.items()}
