"""A step that is not finite: it stops the run before the update, and can be computed again."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from disk.index import open_data
from plumbing.checkpoints import load_training, save, save_progress
from plumbing.command import UserError
from plumbing.processes import process_rank, wait_for_all
from plumbing.run_folder import build, load_config, stage_names, text_tokenizer
from spar import NAMES


def check_finite(now, step: int, metrics: dict[str, float], parts: list[dict], run: Path | None) -> None:
    """Raises UserError before the update, and leaves the step in `run`/replay. A scaled gradient (fp16) may overflow:
    the scaler skips that step by itself."""
    wrong = [symbol for symbol, value in metrics.items()
             if not math.isfinite(value) and not (now.scaler.is_enabled() and symbol == "gradient")]
    if not wrong:
        return
    name = now.stage.name
    message = f"{name} step {step}: {wrong[0]} is {metrics[wrong[0]]}; lower --lr or raise --warmup"
    if run is None:
        raise UserError(message)
    for optimizer in (now.optimizer, now.extras.adversary):  # what is saved is the state before the step
        if optimizer is not None:
            optimizer.zero_grad()
    save_progress(run, name, step, now.state() | {"step": step, "seconds": 0.0}, "replay")
    content = {"parts": [plain(part) for part in parts], "random": torch.get_rng_state(), "metrics": metrics}
    save(run / "replay" / f"batch-{process_rank()[0]}.pt", content)
    wait_for_all()
    raise UserError(f"{message}; `python train.py --replay {run / 'replay'}` shows the step again")


def plain(batch):
    """Named tuples as (name of their kind, fields): a file that executes nothing holds no classes of ours."""
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return {"kind": type(batch).__name__, "fields": tuple(batch)} if hasattr(batch, "_fields") else batch


def replay(folder: Path, device: str, stages: list, training_of: Callable, one_step: Callable,
           kinds: dict[str, type]) -> str:
    """Computes a step again that was not finite, from what `check_finite` left, without the update; -> its terms, as
    they were and as they are, and where the first values that are not finite stand. Raises UserError where `folder`
    holds none.

    `training_of` and `one_step` are train.py's, `stages` its table, `kinds` the named tuples of its batches."""
    steps, paths = sorted(folder.glob("[PTU][123]-*")), sorted(folder.glob("batch-*.pt"))
    if not steps or not paths:
        raise UserError(f"{folder} holds no step: train.py writes one where a loss is not finite")
    name, step = steps[-1].name.split("-")
    run, config = folder.parent, load_config(folder.parent)
    config.shard = False
    names = stage_names(config)
    model = build(config, device, text_tokenizer(config, run), run, names[:names.index(name)])
    torch.manual_seed(1000 * config.training_seed + NAMES.index(name))
    data_folder = open_data(Path(config.data_of(name))) if config.data else None
    now = training_of(model, stages[NAMES.index(name)], data_folder)
    load_training(now, steps[-1])
    lines = [f"{name} step {int(step)}, {len(paths)} process(es)"]
    for path in paths:
        kept = torch.load(path, map_location=device, weights_only=True)
        parts = [{key: kinds[value["kind"]](*value["fields"]) if isinstance(value, dict) else value
                  for key, value in part.items()} for part in kept["parts"]]
        torch.set_rng_state(kept["random"].cpu())
        metrics = {}

        def look(now, step, values, parts):
            metrics.update(values)
            raise Seen

        try:
            one_step(now, iter([[dict(part) for part in parts]]), int(step), look)
        except Seen:
            pass
        lines += [f"{symbol:10} then {kept['metrics'][symbol]:<12.6g} now {value:<12.6g}"
                  for symbol, value in metrics.items() if symbol not in ("stopping", "bad")]
        lines += [f"batch      {key}: not finite" for part in parts for key, value in part.items()
                  if isinstance(value, torch.Tensor) and not value.isfinite().all()]
        grads = {key: parameter.grad for key, parameter in now.weights.items() if parameter.grad is not None}
        for title, tensors in (("weight", now.weights), ("gradient", grads)):
            wrong = [key for key, value in tensors.items() if not value.isfinite().all()]
            lines += [f"{title}s not finite: {len(wrong)}, the first: {', '.join(wrong[:3])}"] if wrong else []
    return "\n".join(lines)


class Seen(Exception):
    """The step has been computed as far as its check."""
