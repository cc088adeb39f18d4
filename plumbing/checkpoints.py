"""What a stage leaves on disk, finished or in progress: written whole or not at all, read without executing
anything."""

import hashlib
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoints
from torch import distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from plumbing.command import UserError, rename, sync_folder, write_beside
from plumbing.processes import first_process, wait_for_all
from spar import SPAR


class BrokenCheckpoint(Exception):
    """A checkpoint that is not whole, not this model's, or not harmless; the message says which."""

def read_stage(model: SPAR, path: Path, checksums: bool = False) -> dict:
    """A stage's file, fit for the model: its keys, their shapes, numbers that are numbers; with `checksums` also every
    byte's. Nothing in it is executed. Raises BrokenCheckpoint."""
    try:
        with zipfile.ZipFile(path) as packed:
            entries = packed.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise BrokenCheckpoint("is packed as train.py packs none")
            if checksums and packed.testzip():
                raise BrokenCheckpoint("is broken (a checksum differs)")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        known, scale = dict(model.named_parameters()), content["latent_scale"]
        if not content["ema"] or not scale.shape == () or not scale.isfinite():
            raise BrokenCheckpoint("holds no weights")
        for key, value in content["ema"].items():
            if key not in known or known[key].shape != value.shape or value.dtype != torch.float32:
                raise BrokenCheckpoint(f"is another model's ({str(key)[:80]!r} does not fit)")
            if value.untyped_storage().nbytes() < 4 * value.numel():
                raise BrokenCheckpoint(f"is broken ({str(key)[:80]!r} is shorter than it says)")
            if not value.isfinite().all():
                raise BrokenCheckpoint(f"is broken ({key!r} is not finite)")
        return content
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, KeyError, AttributeError, TypeError, ValueError,
            EOFError, OSError, NotImplementedError, RecursionError) as error:
        raise BrokenCheckpoint(f"is broken ({in_short(error)})") from None


def in_short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:120]


def load_stage(model: SPAR, run: Path, name: str) -> None:
    """Lays the averaged weights of <name>.pt over the model. What a stage did not train stays. Raises UserError."""
    path = run / f"{name}.pt"
    try:
        content = read_stage(model, path)
    except BrokenCheckpoint as broken:
        raise UserError(f"{path} {broken}: train the stage again with `python train.py --out {run}`") from None
    known = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in content["ema"].items():
            known[key].copy_(value)
        model.latent_scale.copy_(content["latent_scale"])


def save(path: Path, content: dict) -> None:
    """Raises UserError where it cannot be written, on a full disk for one."""
    try:
        write_beside(path, lambda beside: torch.save(content, beside))
    except (RuntimeError, OSError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; "
                        "free some space and run the same command") from None


# ---------------------------------------------------------------- a stage in progress


def save_progress(run: Path, stage: str, step: int, state: dict, where: str = "resume") -> None:
    """All processes write their parts into resume/<stage>-<step>, named once it is whole; two are kept."""
    folder = run / where / f"{stage}-{step:07}"
    part = folder.with_suffix(".part")
    if first_process():
        for old in (run / where).glob("*.part" if where == "resume" else "*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    wait_for_all()
    try:
        with warnings.catch_warnings(action="ignore"):  # that one process is alone is no news
            checkpoints.save(state, checkpoint_id=part, no_dist=not dist.is_initialized())
        if first_process():
            with (part / "sums.json").open("w", encoding="utf-8") as file:
                json.dump(sums(part), file)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(part)
            shutil.rmtree(folder, ignore_errors=True)
            rename(part, folder)
            sync_folder(folder.parent)
            for old in saved_progress(run, stage)[:-2] if where == "resume" else ():
                shutil.rmtree(old, ignore_errors=True)
    except (checkpoints.api.CheckpointException, RuntimeError, OSError) as error:
        raise UserError(f"cannot write {part}: {str(error).splitlines()[0]}; "
                        "free some space and run the same command") from None
    wait_for_all()


def sums(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name not in ("sums.json", ".DS_Store"):  # Finder leaves the latter where somebody looked
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def saved_progress(run: Path, stage: str) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in (run / "resume").glob(f"{stage}-*") if path.suffix != ".part")


HARMLESS = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("collections", "OrderedDict"),
            ("builtins", "getattr"), *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local")
                                       for kind in ("", "Posix", "Windows"))}  # where it was saved


class Harmless(pickle.Unpickler):
    """Reads a checkpoint's own description; any class in it but those that torch writes there is refused, unread."""

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module == "torch.distributed.checkpoint.metadata" or (module, name) in HARMLESS or is_dtype:
            return super().find_class(module, name)
        raise BrokenCheckpoint(f"is not from this train.py (it asks for {module}.{name})"[:200])


class HarmlessPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item, value) -> None:
        torch.load(value, weights_only=True)  # raises where it would run code
        value.seek(0)
        super().load_bytes(read_item, value)


def load_progress(folder: Path, state: dict) -> None:
    """Fills the tensors of `state`; any number of processes may have written them. Raises BrokenCheckpoint."""
    try:
        path = folder / "sums.json"
        if path.stat().st_size > 1 << 20 or json.loads(path.read_text(encoding="utf-8")) != sums(folder):
            raise BrokenCheckpoint("is broken (a checksum differs)")
        with (folder / ".metadata").open("rb") as file:
            Harmless(file).load()
        with warnings.catch_warnings(action="ignore"):
            checkpoints.load(state, checkpoint_id=folder, planner=HarmlessPlanner(), no_dist=not dist.is_initialized())
    except BrokenCheckpoint:
        raise
    except (Exception, checkpoints.api.CheckpointException) as error:  # torch raises a dozen kinds for broken files
        raise BrokenCheckpoint(f"is broken or another model's ({in_short(error)})") from None


def load_newest(now, run: Path) -> tuple[int, float]:
    """Loads the newest sound checkpoint of a stage in progress, `now` a training.Training; -> (the step to go on with,
    seconds spent before)."""
    for folder in reversed(saved_progress(run, now.stage.name)):
        try:
            return load_training(now, folder)
        except BrokenCheckpoint as broken:
            if first_process():
                print(f"{folder} {broken}: going on from the one before it")
    return 0, 0.0


def load_training(now, folder: Path) -> tuple[int, float]:
    """-> (the step to go on with, seconds spent before). Raises BrokenCheckpoint."""
    state = now.state() | {"step": 0, "seconds": 0.0}
    load_progress(folder, state)
    now.restore(state)
    return state["step"], state["seconds"]
