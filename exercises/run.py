"""Runs a script of the project on the learner's files.

    python exercises/run.py 6 sample.py route "two green circles" --run runs/toy
    python exercises/run.py 8 train.py --from runs/class --stages T3 --steps T3=390 --out runs/mine
"""

import multiprocessing
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from plumbing.command import UserError, run_command


def main() -> None:
    from exercises.cut import Finder, is_ours, whole
    from exercises.judge import NUMBERS, learners
    from exercises.make import files_of
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    if len(sys.argv) < 3 or not sys.argv[1].isdigit() or int(sys.argv[1]) not in NUMBERS or sys.argv[2] not in scripts:
        raise UserError(f"python exercises/run.py N SCRIPT …, N from 1 to 10, SCRIPT one of {', '.join(scripts)}")
    alone = sys.argv[2] == "train.py" and multiprocessing.get_start_method() != "fork"  # workers would read the root's
    number, script, sys.argv = int(sys.argv[1]), sys.argv[2], sys.argv[2:] + ["--workers", "0"] * alone
    sources = whole() | learners(number, files_of(number))
    for name in [name for name in sys.modules if is_ours(name) and name not in ("plumbing", "plumbing.command")]:
        del sys.modules[name]  # but for the errors that are caught below
    sys.meta_path.insert(0, Finder(sources))
    path, text = sources.get(script[:-3], (str(ROOT / script), (ROOT / script).read_text(encoding="utf-8")))
    try:
        exec(compile(text, path, "exec"), {"__name__": "__main__", "__file__": path})
    except NotImplementedError as hole:
        raise UserError(f"not written yet: {hole}") from None


if __name__ == "__main__":
    run_command(main)
