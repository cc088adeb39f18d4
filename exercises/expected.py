"""What the short arms of exercises 8 and 10 come to, and how far five pupils lie apart: the figures of teacher.md.

    python exercises/expected.py runs/class                       trains what is missing: about two hours on two cores
    python exercises/expected.py runs/class --arms control,lambda_s_0 --jobs 2        two pupils side by side
    python exercises/expected.py runs/class --commands            what would be run, and nothing is
    python exercises/expected.py --report                         the table and the picture from results/class.json

Every arm goes on from one shared run, as a class does, and `--reseed` 1 to 5 are five pupils: the spread is that of the
arm's own stages, not of whole runs (that is claims.py's). T3 is half as long as the toy's. What is finished is in
results/class.json with its machine, and is not trained again.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import plumbing.command  # before torch, whose threads wait as it says
import torch
from PIL import Image

from exercises.claims import PSNR, UNDERSTANDING, by_hand, figure, machine_of, measured, run
from exercises.pool import Arm, dot_plot, verdict
from plumbing.command import Parser, UserError, run_command, write_text

RESULTS, RUNS, CONTROL = ROOT / "results" / "class.json", Path("runs") / "expected", "control"
STEPS, FIGURES = "--steps T3=390", (PSNR, UNDERSTANDING)
ARMS = {  # name -> (of which exercise, in words, flags and stages)
    CONTROL: ("8, 10", "the whole method", "--stages T3"),
    "lambda_s_0": ("8", "without the anchor", "--lambda-s 0 --stages T3"),
    "lambda_s_1": ("8", "twenty times the anchor", "--lambda-s 1 --stages T3"),
    "frozen_T3": ("10", "the encoder does not train", "--freeze-encoder --stages T3"),
    "no_T2": ("10", "without T2", "--skip-stage T2 --stages T3"),
    "no_T1": ("10", "without T1", "--skip-stage T1 --stages T2,T3"),
    "semantic_only": ("10", "without the pixel stream", "--tokenizer semantic-only --stages T1,T2,T3"),
    "pixel_only": ("10", "without the semantic stream", "--tokenizer pixel-only --stages T1,T2,T3"),
    "pixel_only_no_anchor": ("10", "the same, without the anchor",
                             "--tokenizer pixel-only --no-anchor --stages T1,T2,T3"),
}


def command(arm: str, pupil: int, shared: Path) -> tuple[Path, str]:
    """-> (run folder, train.py's command)"""
    out = RUNS / f"{arm}-{pupil}"
    return out, (f"train.py --from {shared.as_posix()} --out {out.as_posix()} --reseed {pupil} {STEPS} {ARMS[arm][2]} "
                 "--only reconstruction,understanding")


def load(path: Path = RESULTS) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"arms": {}}


def keep(known: dict, arm: str, one: dict, path: Path = RESULTS) -> None:
    """Puts one pupil's figures into the file."""
    pupils = known["arms"].setdefault(arm, {"flags": ARMS[arm][2], "pupils": []})["pupils"]
    pupils[:] = sorted([*(other for other in pupils if other["reseed"] != one["reseed"]), one],
                       key=lambda other: other["reseed"])
    known["arms"] = {name: known["arms"][name] for name in ARMS if name in known["arms"]}
    write_text(path, json.dumps(known, indent=1) + "\n")


def arms_of(known: dict, measure: str) -> list[Arm]:
    return [Arm(ARMS[name][1], [one[measure] for one in arm["pupils"]]) for name, arm in known["arms"].items()]


def table(known: dict) -> str:
    """Markdown: mean ± spread (standard deviation) of each figure, and what the class's rule says of the means."""
    lines = ["| exercise | arm | pupils | PSNR, dB | understanding |", "|" + "---|" * 5]
    columns = [arms_of(known, measure) for measure in FIGURES]
    for place, (name, arm) in enumerate(known["arms"].items()):
        cells = []
        for column in columns:
            own, control = column[place], column[0]
            told = "" if own is control or not control.spread else f": {verdict(own, control)}"
            cells.append(f"{own.mean:.4g}" + (f" ± {own.spread:.2g}" if own.spread is not None else "") + told)
        lines.append(f"| {ARMS[name][0]} | {ARMS[name][1]} (`{ARMS[name][2].rpartition(' --stages')[0] or '–'}`) | "
                     f"{len(arm['pupils'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(path: Path = RESULTS) -> None:
    known = load(path)
    if len(known["arms"].get(CONTROL, {"pupils": []})["pupils"]) > 1:
        columns = [arms_of(known, measure) for measure in FIGURES]
        plots = [dot_plot(measure, arms[0], arms[1:]) for measure, arms in zip(FIGURES, columns)]
        image = Image.new("RGB", (plots[0].width, sum(plot.height for plot in plots)), "white")
        for place, plot in enumerate(plots):
            image.paste(plot, (0, place * plot.height))
        image.save(path.with_suffix(".png"), optimize=True)
    print(table(known))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="the shared run")
    parser.add_argument("--arms", default=",".join(ARMS), help="%(default)s")
    parser.add_argument("--pupils", type=int, default=5, help="how many --reseeds (default 5)")
    parser.add_argument("--jobs", type=int, default=1, help="arms that are trained side by side, sharing the cores")
    parser.add_argument("--commands", action="store_true", help="print what would be run and stop")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    given, known, lock = parser.read(), load(), threading.Lock()
    if given.report:
        return report()
    names = given.arms.split(",")
    if unknown := set(names) - set(ARMS):
        raise UserError(f"--arms {', '.join(sorted(unknown))}: they are {', '.join(ARMS)}")
    if not given.run or given.pupils < 1 or given.jobs < 1:
        raise UserError("which run do they share? python exercises/expected.py runs/class, with --pupils, --jobs >= 1")
    done = {(name, one["reseed"]) for name, arm in known["arms"].items() for one in arm["pupils"]}
    missing = [(name, k + 1) for name in names for k in range(given.pupils) if (name, k + 1) not in done]
    threads = max(1, torch.get_num_threads() // given.jobs)
    if given.commands:
        return print("\n".join(by_hand(command(*one, given.run)[1], threads) for one in missing))

    def train(name: str, pupil: int) -> None:
        out, line = command(name, pupil, given.run)
        run(out, line, threads)
        results = measured(out, "understanding")
        with lock:
            keep(known, name, {"reseed": pupil, **{measure: figure(results, measure) for measure in FIGURES},
                               "eval_id": results["eval_id"], "machine": machine_of(threads)})

    with ThreadPoolExecutor(given.jobs) as lanes:
        for done in [lanes.submit(train, *one) for one in missing]:
            done.result()
    report()


if __name__ == "__main__":
    run_command(main)
