"""A run folder, and what every command shares: flags whose mistakes end in one line.

    config.json      every number of the run
    log.jsonl        a line for every tenth step
    <stage>.pt       what the stage trained, once it is finished
    resume/          the stage in progress, as PyTorch's distributed checkpoints
    results.json, report/        written by the evaluation
"""

import argparse
import difflib
import json
import os
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoints
from torch import distributed as dist

from processes import first_process, wait_for_all
from spar import HOW, NAMES, SPAR, Config, make_config

# ---------------------------------------------------------------- commands


class UserError(Exception):
    """A mistake that the user can mend; the message says how, in one line."""


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes become UserErrors; an unknown flag names the nearest."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message)

    def read(self, arguments: list[str] | None = None) -> argparse.Namespace:
        given, unknown = self.parse_known_intermixed_args(arguments)  # flags may stand before the words
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"what does {unknown[0]!r} belong to? Put the words in quotes")
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0)[0]
            raise UserError(f"unknown option {unknown[0]}: did you mean {near}?")
        return given


def best_device(wish: str) -> str:
    """"auto" -> cuda where there is one, else cpu. Raises UserError for a device that torch cannot use here."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available() or wish == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"this machine's torch has no {wish}: use --device cpu")
    return wish


def run_command(command) -> None:
    """Runs a script's main; a mistake of the user ends in one line and exit code 2, without traceback."""
    try:
        command()
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- a run folder


def stage_names(config: Config) -> list[str]:
    return [name for name in NAMES if name != config.skip_stage]


def changes(config: Config) -> dict:
    """The fields in which a configuration differs from its preset."""
    preset = asdict(make_config(preset=config.preset))
    return {key: value for key, value in asdict(config).items() if value != preset[key] and key != "seed" and key not in HOW}


def load_config(run: Path) -> Config:
    try:
        found = json.loads((run / "config.json").read_text())
        return Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {run}: train one with `python train.py --out {run}`") from None
    except (json.JSONDecodeError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{run / 'config.json'} is not from this train.py ({error}): train again into another --out") from None


def load_run(run: Path, device: str = "cpu", upto: str = NAMES[-1]) -> SPAR:
    """The model of a run folder after its finished stages (at most `upto`), which `model.finished` names.
    Raises UserError where the folder is missing, is another's or holds no finished stage."""
    with torch.device(device):
        model = SPAR(load_config(run)).eval()
    names = stage_names(model.config)
    model.finished = [name for name in names if (run / f"{name}.pt").exists() and NAMES.index(name) <= NAMES.index(upto)]
    if not model.finished:
        raise UserError(f"{run} holds no finished stage: go on with `python train.py --out {run}`")
    for name in model.finished:
        load_stage(model, run, name)
    return model


def load_stage(model: SPAR, run: Path, name: str) -> None:
    """Lays the averaged weights of <name>.pt over the model. What a stage did not train stays."""
    content = torch.load(run / f"{name}.pt", map_location="cpu", weights_only=True, mmap=True)
    known = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in content["ema"].items():
            known[key].copy_(value)
        model.latent_scale.copy_(content["latent_scale"])


def check_same_run(config: Config, run: Path) -> None:
    """Writes config.json, or finds the same one there; only how it is computed (`HOW`) may have changed since."""
    path = run / "config.json"
    if path.exists():
        before, now = asdict(load_config(run)), asdict(config)
        differing = [key for key in now if before[key] != now[key] and key not in HOW]
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
    for key in (key for key in now if before[key] != now[key] and key not in ("preset", "skip_stage", *HOW)):
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


# ---------------------------------------------------------------- a stage in progress


def save_progress(run: Path, stage: str, step: int, state: dict) -> None:
    """All processes write their parts into resume/<stage>-<step>, which gets its name once it is whole; two are kept."""
    folder = run / "resume" / f"{stage}-{step:07}"
    part = folder.with_suffix(".part")
    if first_process():
        shutil.rmtree(part, ignore_errors=True)
    wait_for_all()
    try:
        with warnings.catch_warnings(action="ignore"):  # that one process is alone is no news
            checkpoints.save(state, checkpoint_id=part, no_dist=not dist.is_initialized())
    except (checkpoints.api.CheckpointException, RuntimeError, OSError) as error:
        raise UserError(f"cannot write {part}: {str(error).splitlines()[0]}; free some space and run the same command") from None
    if first_process():
        os.replace(part, folder)
        for old in saved_progress(run, stage)[:-2]:
            shutil.rmtree(old)
    wait_for_all()


def saved_progress(run: Path, stage: str) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in (run / "resume").glob(f"{stage}-*") if path.suffix != ".part")


def load_progress(folder: Path, state: dict) -> None:
    """Fills the tensors of `state`; any number of processes may have written them."""
    with warnings.catch_warnings(action="ignore"):
        checkpoints.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
