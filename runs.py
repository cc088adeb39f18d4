"""A run folder, and what every command shares: flags whose mistakes end in one line.

    config.json      every number of the run
    log.jsonl        a line for every tenth step
    <stage>.pt       what the stage trained, once it is finished
    resume/          the stage in progress, as PyTorch's distributed checkpoints: the last two, until the next stage ends
    replay/          a step whose loss was not finite
    bad.jsonl, vocabulary.json     with data on disk: samples that others stood in for; its byte pairs
    results.json, report/        written by the evaluation
"""

import argparse
import difflib
import hashlib
import json
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoints
from torch import distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from bytepair import BytePairTokenizer, load_vocabulary
from disk import Found
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


class BrokenCheckpoint(Exception):
    """A checkpoint that is not whole, not this model's, or not harmless; the message says which."""


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
        path = run / "config.json"
        if path.stat().st_size > 1 << 20:
            raise TypeError("it is larger than 1 MB")
        found = Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(path.read_text()).items()})
        check_numbers(found)
        return found
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in {run}: train one with `python train.py --out {run}`") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{run / 'config.json'} is not from this train.py ({error}): train again into another --out") from None


def check_numbers(config: Config) -> None:
    """Raises TypeError for values of another kind, or of a size that no model has."""
    for key, value in asdict(config).items():
        usual = getattr(Config, key)
        few = any(word in key for word in ("layers", "blocks", "depths", "stages", "draws", "heads"))
        for one in value if isinstance(value, tuple) else (value,):
            like = usual[0] if isinstance(usual, tuple) else usual
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if isinstance(value, tuple) != isinstance(usual, tuple) or isinstance(like, (bool, str)) and type(one) is not type(like):
                raise TypeError(f"{key} is a {type(value).__name__}")
            if not isinstance(like, (bool, str)) and not (number and 0 <= one <= (512 if few else 1e9)) or isinstance(like, int) and number and one != int(one):
                raise TypeError(f"{key} is {one!r}"[:100])
    if len(config.ae_widths) > 10 or config.side > 4096:
        raise TypeError(f"side is {config.side}, ae_widths {config.ae_widths}"[:100])


def read_vocabulary(run: Path, config: Config) -> BytePairTokenizer | None:
    """None where it is the drawn world that is spoken about."""
    return load_vocabulary(run / "vocabulary.json", config.longest) if config.data else None


def load_run(run: Path, device: str = "cpu", upto: str = NAMES[-1]) -> SPAR:
    """The model of a run folder after its finished stages (at most `upto`), which `model.finished` names.
    Raises UserError where the folder is missing, is another's or holds no finished stage."""
    config = load_config(run)
    names = [name for name in stage_names(config) if (run / f"{name}.pt").exists() and NAMES.index(name) <= NAMES.index(upto)]
    if not names:
        raise UserError(f"{run} holds no finished stage: go on with `python train.py --out {run}`")
    words = read_vocabulary(run, config)
    with torch.device("meta"):
        size = sum(p.numel() for p in SPAR(config, words).parameters())
    if 4 * size > 100 * sum((run / f"{name}.pt").stat().st_size for name in names) + (64 << 20):
        raise UserError(f"{run / 'config.json'} describes {size} parameters, far more than its checkpoints hold: it is another run's")
    with torch.device(device):
        model = SPAR(config, words).eval()
    model.finished = names
    for name in names:
        load_stage(model, run, name)
    return model


def read_stage(model: SPAR, path: Path, whole: bool = False) -> dict:
    """A stage's file, fit for the model: its keys, their shapes, numbers that are numbers; with `whole` also every byte's
    checksum. Nothing in it is executed. Raises BrokenCheckpoint."""
    try:
        with zipfile.ZipFile(path) as packed:
            entries = packed.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
                raise BrokenCheckpoint("is packed as train.py packs none")
            if whole and packed.testzip():
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
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, KeyError, AttributeError, TypeError, ValueError, EOFError, OSError,
            NotImplementedError, RecursionError) as error:
        raise BrokenCheckpoint(f"is broken ({(str(error).strip() or type(error).__name__).splitlines()[0][:120]})") from None


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


def finished(run: Path, config: Config) -> set[str]:
    """The stages whose files are whole and fit; of a broken or foreign one it is said that the stage is trained again."""
    found = set()
    with torch.device("meta"):
        model = SPAR(config, read_vocabulary(run, config))
    for name in stage_names(config):
        if (run / f"{name}.pt").exists():
            try:
                read_stage(model, run / f"{name}.pt", whole=True)
                found.add(name)
            except BrokenCheckpoint as broken:
                if first_process():
                    print(f"{run / name}.pt {broken}: {name} is trained again, from its last progress where there is some")
    return found


def check_same_run(config: Config, run: Path) -> None:
    """Writes config.json, or finds the same one there; only how it is computed (`HOW`) may have changed since."""
    path = run / "config.json"
    if path.exists():
        before, now = asdict(load_config(run)), asdict(config)
        differing = [key for key in now if before[key] != now[key] and key not in HOW]
        if differing:
            raise UserError(f"{run} was begun with {differing[0]} = {before[differing[0]]!r}, not {now[differing[0]]!r}: "
                            "choose another --out")
    write_text(path, json.dumps(asdict(config), indent=1) + "\n")


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
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except (RuntimeError, OSError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; free some space and run the same command") from None
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The same for a text."""
    beside = path.with_suffix(".part")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """After a rename: the new name itself is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- logs


def rewrite(path: Path, keep) -> list[dict]:
    """Leaves the lines of a .jsonl for which keep(line) holds, and returns them; a torn line goes."""
    kept = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            kept += [line] if keep(line) else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def cut_logs(run: Path, stage: str, first: int) -> None:
    """Forgets what was logged of steps that are done again."""
    for name in ("log.jsonl", "bad.jsonl"):
        rewrite(run / name, lambda line: line["stage"] != stage or line["step"] < first)


def bad_samples(run: Path, found: Found | None, max_bad: float):
    """-> a function that takes the bad samples of a step, writes them to bad.jsonl, and stops the run above `max_bad`."""
    path, allowed = run / "bad.jsonl", max_bad * len(found.samples()) if found else 0
    known = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()

    def count(stage: str, step: int, bad: list[tuple[str, str]]) -> None:
        if first_process():
            with path.open("a") as file:
                file.writelines(json.dumps({"stage": stage, "step": step, "key": key, "why": why}) + "\n" for key, why in bad)
        known.update(key for key, _ in bad)
        if len(known) > allowed:
            raise UserError(f"{stage} step {step}: {len(known)} bad samples are more than --max-bad {max_bad} of the data "
                            f"({allowed:.1f}): mend those that {path} lists, the last one: {bad[-1][1]}")

    return count


# ---------------------------------------------------------------- a stage in progress


def save_progress(run: Path, stage: str, step: int, state: dict, where: str = "resume") -> None:
    """All processes write their parts into resume/<stage>-<step>, which gets its name once it is whole; two are kept."""
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
            with (part / "sums.json").open("w") as file:
                json.dump(sums(part), file)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(part)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
            sync_folder(folder.parent)
            for old in saved_progress(run, stage)[:-2] if where == "resume" else ():
                shutil.rmtree(old)
    except (checkpoints.api.CheckpointException, RuntimeError, OSError) as error:
        raise UserError(f"cannot write {part}: {str(error).splitlines()[0]}; free some space and run the same command") from None
    wait_for_all()


def sums(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != "sums.json":
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def saved_progress(run: Path, stage: str) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in (run / "resume").glob(f"{stage}-*") if path.suffix != ".part")


class Harmless(pickle.Unpickler):
    """Reads a checkpoint's own description; any other class in it than these is refused, unread."""

    def find_class(self, module: str, name: str):
        if module == "torch.distributed.checkpoint.metadata" or (module, name) in (
                ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
                ("pathlib", "PosixPath"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("pathlib", "Path"), ("builtins", "getattr")) or (
                module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
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
        if path.stat().st_size > 1 << 20 or json.loads(path.read_text()) != sums(folder):
            raise BrokenCheckpoint("is broken (a checksum differs)")
        with (folder / ".metadata").open("rb") as file:
            Harmless(file).load()
        with warnings.catch_warnings(action="ignore"):
            checkpoints.load(state, checkpoint_id=folder, planner=HarmlessPlanner(), no_dist=not dist.is_initialized())
    except BrokenCheckpoint:
        raise
    except (Exception, checkpoints.api.CheckpointException) as error:  # torch raises a dozen kinds for broken files
        raise BrokenCheckpoint(f"is broken or another model's ({(str(error).strip() or type(error).__name__).splitlines()[-1][:120]})") from None
