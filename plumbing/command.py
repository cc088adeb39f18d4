"""What every command shares: flags whose mistakes end in one line, files that are never half, threads that sleep."""

import argparse
import difflib
import math
import os
import sys
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path

# How many turns OpenMP's threads wait awake for one another before they sleep; read when torch is loaded. Asleep they
# take longer to wake: a run alone takes 2 to 7 % longer. Awake they keep a core from those they wait for, once others
# want it too: of two runs on two cores a step of P1 took 90 times as long as alone, now 2.5 times.
os.environ.setdefault("GOMP_SPINCOUNT", "1200")
WINDOWS = os.name == "nt"


class UserError(Exception):
    """A mistake that the user can mend; the message says how, in one line."""


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes become UserErrors; an unknown flag names the nearest."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message)

    def read(self, arguments: list[str] | None = None) -> argparse.Namespace:
        words = sys.argv[1:] if arguments is None else arguments
        words = [one for word in words for one in (WINDOWS and "*" in word and sorted(glob(word)) or [word])]
        given, unknown = self.parse_known_intermixed_args(words)  # flags may stand before the words
        if unknown and not unknown[0].startswith("-"):
            raise UserError(f"what does {unknown[0]!r} belong to? Put the words in quotes")
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0)[0]
            raise UserError(f"unknown option {unknown[0]}: did you mean {near}?")
        for key, value in vars(given).items():
            for one in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
                if isinstance(one, float) and not math.isfinite(one):
                    raise UserError(f"--{key.replace('_', '-')} {one}: a finite number is wanted")
        return given


def run_command(command) -> None:
    """Runs a script's main; a mistake of the user ends in one line and exit code 2, without traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that cannot show a name shows escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except (UserError, ValueError, OSError) as error:
        if not isinstance(error, BrokenPipeError):  # who reads, as `head`, has enough
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """`write(beside)` makes the file, which then gets its name: a stopped or full machine leaves the old one or the new
    one, never half of one. The ending stays, since libraries go by it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part{path.suffix}")  # dot: what a kill leaves is never read as data
    try:
        write(beside)
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        rename(beside, path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def rename(old: Path, new: Path, patience: float = 0.1) -> None:
    """Windows refuses while another program looks into one of the two, mostly for an instant."""
    try:
        os.replace(old, new)
    except PermissionError:
        if not WINDOWS or patience > 5:
            raise
        time.sleep(patience)
        rename(old, new, 3 * patience)


def write_text(path: Path, text: str) -> None:
    write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8", newline="\n"))


def sync_folder(folder: Path) -> None:
    """After a rename: the new name itself is on the disk. Where folders cannot be opened (Windows) that is left out."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
