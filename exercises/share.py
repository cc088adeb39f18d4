"""One run for a whole class: what a trained run is used with, in one file, without its optimizers.

    python exercises/share.py pack runs/toy class/shared.tar
    python exercises/share.py unpack class/shared.tar runs/shared

A pack holds config.json, log.jsonl, results.json and of each finished stage the averaged weights and the latents'
scale: about a third of the run. `sums.json` in it has every member's SHA-256 and the commit whose code trained it. A
pack is only as good as that code: another commit's is refused, but for --any-commit. The unpacked folder is a run: it
is used, evaluated and gone on from (train.py --from) as any other.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import plumbing.command  # before torch, whose threads wait as it says
import torch

from plumbing.checkpoints import BrokenCheckpoint, read_stage
from plumbing.command import Parser, UserError, rename, run_command, write_beside
from plumbing.run_folder import load_config, stage_names, text_tokenizer
from spar import SPAR

NOTES = ("config.json", "log.jsonl", "results.json", "vocabulary.json", "tokenizer.json")
KNOWN = re.compile(r"[PTU][123]\.pt|" + "|".join(map(re.escape, NOTES)))


def commit() -> str:
    """Of this copy of the repository; empty where there is no git, or where it is another repository's folder."""
    try:
        told = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"], capture_output=True,
                              encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = told.stdout.split("\n")
    return lines[1].strip() if told.returncode == 0 and Path(lines[0]).resolve() == ROOT else ""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(run: Path, file: Path) -> list[str]:
    """-> the names of what was packed. Raises UserError where there is no run, no finished stage, or a broken one."""
    config = load_config(run)
    with torch.device("meta"):
        model = SPAR(config, text_tokenizer(config, run))
    names = [name for name in stage_names(config) if (run / f"{name}.pt").exists()]
    if not names:
        raise UserError(f"{run} holds no finished stage: go on with `python train.py --out {run}`")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".pack") as folder:
        made = Path(folder)
        for name in names:
            try:
                content = read_stage(model, run / f"{name}.pt", checksums=True)
            except BrokenCheckpoint as broken:
                raise UserError(f"{run / name}.pt {broken}: train the stage again before it is shared") from None
            kept = {"ema": {key: value.clone() for key, value in content["ema"].items()},
                    "latent_scale": content["latent_scale"].clone()}
            torch.save(kept, made / f"{name}.pt")
        for name in NOTES:
            if (run / name).exists():
                shutil.copyfile(run / name, made / name)
        members = sorted(path.name for path in made.iterdir())
        sums = {"commit": commit(), "sums": {name: digest(made / name) for name in members}}
        (made / "sums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")

        def write(whole: Path) -> None:  # where it stays: on Windows what comes from a temporary folder is its owner's
            with tarfile.open(whole, "w", format=tarfile.PAX_FORMAT) as tar:
                for name in ("sums.json", *members):
                    tar.add(made / name, name, recursive=False, filter=plain)

        write_beside(file, write)
    return members


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same bytes whoever packs, and whenever."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def unpack(file: Path, run: Path, any_commit: bool = False) -> list[str]:
    """-> the names of what was unpacked into `run`, which must not be there yet. Nothing is written elsewhere, and
    nothing stays where a member is a link, has a name that no run has, or other bytes than its sum says: UserError."""
    if run.is_symlink() or run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} is there already: choose a new folder")
    if not file.is_file():
        raise UserError(f"there is no pack {file}")
    try:
        with tarfile.open(file, "r:") as tar:
            members = checked(tar, file)
            sums = told_sums(tar, members, file)
            here = commit()
            if not any_commit and sums["commit"] and here and sums["commit"] != here:
                raise UserError(f"{file} was packed at commit {sums['commit'][:12]}, this is {here[:12]}: take that "
                                "commit's code, another pack, or --any-commit")
            run.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=run.parent, prefix=".unpack") as folder:
                part = Path(folder) / "run"
                part.mkdir()
                for name, right in sums["sums"].items():
                    with tar.extractfile(members[name]) as source, (part / name).open("xb") as target:
                        shutil.copyfileobj(source, target)
                    if digest(part / name) != right:
                        raise UserError(f"{file} is broken: {name} is not what its sum says; copy the pack again")
                if run.exists():
                    run.rmdir()  # it is empty
                rename(part, run)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{file} is no pack, or a broken one ({str(error) or type(error).__name__})") from None
    return list(sums["sums"])


def checked(tar: tarfile.TarFile, file: Path) -> dict[str, tarfile.TarInfo]:
    """name -> member: plain files with the names of a run's, each of them once. Raises UserError."""
    members, size = {}, file.stat().st_size
    for member in tar:
        if not member.isreg() or member.issparse():
            raise UserError(f"{file} holds {member.name[:80]!r}, which is no plain file: it is no pack of share.py")
        if member.name != "sums.json" and not KNOWN.fullmatch(member.name):
            raise UserError(f"{file} holds {member.name[:80]!r}, which no run has: it is no pack of share.py")
        if member.name in members or member.size > size:
            raise UserError(f"{file} is broken: {member.name} is there twice, or larger than the pack")
        members[member.name] = member
    return members


def told_sums(tar: tarfile.TarFile, members: dict, file: Path) -> dict:
    """What sums.json says, if it speaks of exactly these members. Raises UserError."""
    try:
        if members["sums.json"].size > 1 << 20:
            raise ValueError
        sums = json.load(io.TextIOWrapper(tar.extractfile(members["sums.json"]), "utf-8"))
        right = set(sums) == {"commit", "sums"} and isinstance(sums["commit"], str)
        if not right or set(sums["sums"]) != set(members) - {"sums.json"} or "config.json" not in members:
            raise ValueError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"{file} is no pack, or a broken one: sums.json does not name what is in it") from None
    return sums


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path, help="pack: a run folder; unpack: a pack")
    parser.add_argument("target", type=Path, help="pack: the file to write; unpack: a new run folder")
    parser.add_argument("--any-commit", action="store_true", help="unpack what another commit's code has trained")
    given = parser.read()
    if given.what == "pack":
        names = pack(given.source, given.target)
        print(f"{given.target}: {given.target.stat().st_size / 2**20:.1f} MB, {', '.join(names)}")
    else:
        names = unpack(given.source, given.target, given.any_commit)
        print(f"{given.target}: {', '.join(names)}")


if __name__ == "__main__":
    run_command(main)
