"""Says whether a learner's answer to an exercise is right, claim by claim.

    python exercises/grade.py 6                 a fresh seed each time; it is printed, --seed S gives the same again
    python exercises/grade.py --all             every exercise that was begun
    python exercises/grade.py 6 --json          {"exercise", "seed", "claims": [{"claim", "ok", "why"}], "passed"}
    python exercises/grade.py 10 RUN SHEET --control RUN      a run and a prediction sheet

The learner's code runs in a process of its own, with limits of time and, where the system has them, of memory. Exit
code 0: all claims hold; 1: some do not; 2: there is nothing to grade.
"""

import difflib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tqdm import tqdm

from exercises.cut import bodies_of, names_in, source_of
from exercises.judge import NUMBERS, claims_of, cut_of, exercise, read_own
from exercises.make import WORK, files_of
from plumbing.command import Parser, UserError, run_command

SECONDS, BYTES = 300, 12 << 30  # of an answer's process


def limited() -> None:
    """In the learner's process, before it begins."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (ImportError, ValueError, OSError):  # Windows has no such thing, macOS refuses
        pass


def grade(number: int, seed: int, paths: dict[str, Path], seconds: float = SECONDS) -> dict:
    """-> what --json prints, and "mistakes" (names of known ones) and "picture" beside it."""
    claims = [claim.__doc__.splitlines()[0] for claim in claims_of(number)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, said = Path(folder) / "rows.jsonl", Path(folder) / "said"
        command = [sys.executable, str(ROOT / "exercises" / "judge.py"), str(number), str(seed), str(out),
                   *(f"{file}={path}" for file, path in paths.items())]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1",
                                    "PYTHONIOENCODING": "utf-8"}  # an answer may print σ
        start = {"preexec_fn": limited} if os.name == "posix" else {}
        with said.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=folder,
                                       env=environment, **start)
            ended = wait(process, seconds, out, len(claims))
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
        printed = said.read_text(encoding="utf-8", errors="replace").strip()
        last = (printed.splitlines() or [""])[-1][:200]
        if "Error: " in last and (frames := re.findall(r'File "(.*)", line (\d+)', printed)):
            last += f" ({Path(frames[-1][0]).name}:{frames[-1][1]})"
    rows = [line for line in lines if "claim" in line]
    if len(rows) < len(claims):  # the one at which it ended, and those that it did not come to
        why = ended or "it ended early"
        reason = f"{why}{': ' + last if last and 'longer' not in why else ''}"
        rows += [{"claim": claim, "ok": False, "why": reason if i == 0 else "not reached"}
                 for i, claim in enumerate(claims[len(rows):])]
    more = {key: line[key] for line in lines for key in ("mistakes", "picture") if line.get(key)}
    return {"exercise": number, "seed": seed, "claims": rows, "passed": all(row["ok"] for row in rows)} | more


def wait(process: subprocess.Popen, seconds: float, out: Path, claims: int) -> str:
    """Until it has ended, telling how far it is; -> why it ended, empty: by itself."""
    start = time.time()
    with tqdm(total=claims, desc="claims", leave=False, delay=1, disable=None) as bar:
        while process.poll() is None:
            if time.time() - start > seconds:
                process.kill()
                process.wait()
                return f"took longer than {seconds:.0f} seconds"
            time.sleep(0.1)
            bar.n = min(claims, out.read_bytes().count(b"\n") if out.exists() else 0)
            bar.set_description("claims" if bar.n < claims else "known mistakes, or the picture")
    return f"the process ended with {process.returncode}" if process.returncode else ""


def difference(number: int, paths: dict[str, Path]) -> str:
    """The learner's bodies and the real ones, side by side as a difference."""
    lines = []
    for file, names in cut_of(number).items():
        mine, real = read_own(paths[file]), source_of(file)
        texts = [(text, names_in(text)) for text in (mine, real)]
        for name in names:
            pair = [bodies_of(text, [name])[name].splitlines() if name in there else [] for text, there in texts]
            lines += difflib.unified_diff(*pair, f"yours: {name}", f"the source: {name}", lineterm="", n=9)
    return "\n".join(lines)


def show(result: dict, paths: dict[str, Path], seconds: float) -> None:
    number, rows = result["exercise"], result["claims"]
    where = ", ".join(path.relative_to(WORK.parent).as_posix() if path.is_relative_to(WORK.parent) else str(path)
                      for path in paths.values())
    print(f"{number}  {exercise(number).TITLE}        {where} · seed {result['seed']} · {seconds:.0f} s")
    for row in rows:
        print(f" {'ok  ' if row['ok'] else 'FAIL'}  {row['claim']}" + (f"\n       {row['why']}" if row["why"] else ""))
    for name in result.get("mistakes", [])[:3]:
        print(f"       yours computes what comes out if: {name}")
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)}")
    if result.get("picture"):
        print(f"\n{result['picture']}")
    if result["passed"]:
        for question, answer in zip(exercise(number).PREDICT, getattr(exercise(number), "ANSWERS", ())):
            print("\n" + fill(question, 110) + "\n" + fill(answer, 110, initial_indent="   ", subsequent_indent="   "))
    if result["passed"] and paths:
        print(f"\n{difference(number, paths) or 'Word for word the source.'}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("number", nargs="?", type=int, help="1 to 10")
    parser.add_argument("rest", nargs="*", help="of exercise 10: the run and the sheet")
    parser.add_argument("--all", action="store_true", help="every exercise that was begun")
    parser.add_argument("--seed", type=int, default=None, help="of the random inputs (default: a fresh one)")
    parser.add_argument("--json", action="store_true", help="one object in place of lines")
    parser.add_argument("--control", type=Path, nargs="+", default=[], help="of exercise 10: runs or results.json")
    parser.add_argument("--root", type=Path, default=None, help="somebody's pack, in place of your own files")
    given = parser.read()
    seed = secrets.randbelow(10_000) if given.seed is None else given.seed
    if not given.all and given.number not in NUMBERS:
        raise UserError("which exercise? python exercises/grade.py 1, up to 10, or --all")
    if given.number == 10 and not given.all:
        controls = [word for path in given.control for word in ("--control", str(path))]
        rows = exercise(10).verdicts([*given.rest, *controls])
        results = [{"exercise": 10, "seed": seed, "claims": rows, "passed": all(row["ok"] for row in rows)}]
        if not given.json:
            show(results[0], {}, 0)
    else:
        results = []
        for number in ([given.number] if not given.all else [n for n in NUMBERS if begun(n, given.root)]):
            start = time.time()
            paths = handed_in(number, given.root) if given.root else files_of(number)
            results.append(grade(number, seed, paths))
            if not given.json:
                show(results[-1], paths, time.time() - start)
    if not results:
        raise UserError("nothing was begun: python exercises/make.py 1")
    if given.json:
        print(json.dumps(results if given.all else results[0]))
    if not all(result["passed"] for result in results):
        raise SystemExit(1)


def handed_in(number: int, root: Path) -> dict[str, Path]:
    """The files of somebody's pack: those that make.py wrote there, else its own root's, filled in."""
    try:
        return files_of(number, root.absolute() / "exercises" / "work")
    except UserError:
        return {file: root.absolute() / file for file in cut_of(number)}


def begun(number: int, root: Path | None) -> bool:
    """Whether there is something to grade: in somebody's pack all, since its holes are its own files."""
    try:
        return bool(cut_of(number) if root else files_of(number))
    except UserError:
        return False


if __name__ == "__main__":
    run_command(main)
