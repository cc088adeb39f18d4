"""Commands as a user starts them: in a process of their own, or in this one where the claim is about words alone."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from plumbing.command import run_command

ROOT = Path(__file__).parent.parent.parent


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def subprocess_of(script: str, *arguments, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """`python script …` in a process of its own, which takes seconds to import torch."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, **options)


def call(script: str, *arguments, cwd: Path | None = None) -> Ended:
    """The same in this process: the script's `main` under `run_command`. `data.py` with a flag is disk/check.py."""
    module = importlib.import_module("disk.check" if script == "data.py" else script.removesuffix(".py"))
    out, err, code, before = io.StringIO(), io.StringIO(), 0, Path.cwd()
    try:
        os.chdir(cwd or ROOT)
        with (mock.patch.object(sys, "argv", [script, *map(str, arguments)]), contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err)):
            run_command(module.main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(before)
    return Ended(code, out.getvalue(), err.getvalue())
