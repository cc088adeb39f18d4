"""What the short arms of exercises 8 to 10 come to, and how far five pupils lie apart: what a class should expect.

    python exercises/expected.py runs/class --arms control         five pupils of the whole method: a class's control
    python exercises/expected.py runs/class --jobs 2               all arms: hours on two cores
    python exercises/expected.py runs/class --commands             what would be run, and nothing is
    python exercises/expected.py runs/class --report               the table and the picture of what is there

Every arm goes on from one shared run, as a class does, and `--reseed` 1 to 5 are five pupils: the spread is that of the
arm's own stages, not of whole runs (that is claims.py's). T3 is half as long as the toy's, U2 a seventh. For runs/class
the arms lie in runs/expected/class, and the figures in its class.json, with their machine: what stands there is not
trained again. The figures of teacher.md, of another shared run, are `--results results/class.json`.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import plumbing.command  # before torch, whose threads wait as it says
import torch
from PIL import Image

from exercises.claims import DRAWING, EDITING, PSNR, UNDERSTANDING, by_hand, figure, machine_of, measured, run
from exercises.pool import Arm, dot_plot, verdict
from exercises.share import digest
from plumbing.command import Parser, UserError, run_command, write_text
from spar import NAMES

RUNS, TAKEN_OVER = Path("runs") / "expected", NAMES[:NAMES.index("U1")]  # of the shared run, by one arm or another


@dataclass(frozen=True)
class Lesson:
    """Arms that are compared with one control by the same figures."""
    control: str
    steps: str
    figures: tuple[str, ...]

    @property
    def only(self) -> str:
        return ",".join(figure.partition(".")[0] for figure in self.figures)


T, U = Lesson("control", "T3=390", (PSNR, UNDERSTANDING)), Lesson("control_U", "U2=400", (DRAWING, EDITING))
ARMS = {  # name -> (of which exercise, in words, flags and stages, its lesson)
    T.control: ("8, 10", "the whole method", "--stages T3", T),
    "lambda_s_0": ("8", "without the anchor", "--lambda-s 0 --stages T3", T),
    "lambda_s_1": ("8", "twenty times the anchor", "--lambda-s 1 --stages T3", T),
    "frozen_T3": ("10", "the encoder does not train", "--freeze-encoder --stages T3", T),
    "no_T2": ("10", "without T2", "--skip-stage T2 --stages T3", T),
    "no_T1": ("10", "without T1", "--skip-stage T1 --stages T2,T3", T),
    "semantic_only": ("10", "without the pixel stream", "--tokenizer semantic-only --stages T1,T2,T3", T),
    "pixel_only": ("10", "without the semantic stream", "--tokenizer pixel-only --stages T1,T2,T3", T),
    "pixel_only_no_anchor": ("10", "the same, without the anchor",
                             "--tokenizer pixel-only --no-anchor --stages T1,T2,T3", T),
    U.control: ("9, 10", "the whole method", "--stages U1,U2", U),
    "no_alignment": ("9, 10", "without L_align", "--align none --stages U1,U2", U),
    "last_layer": ("10", "the last layer in place of DTR", "--router last --stages P3,U1,U2", U),
    "mean_of_layers": ("10", "the plain mean in place of DTR", "--router mean --stages U1,U2", U),
    "static_weights": ("10", "one weight per layer in place of DTR", "--router static --stages U1,U2", U),
}


def command(arm: str, pupil: int, shared: Path) -> tuple[Path, str]:
    """-> (run folder, train.py's command)"""
    out, (*_, flags, lesson) = RUNS / shared.name / f"{arm}-{pupil}", ARMS[arm]
    return out, (f"train.py --from {shared.as_posix()} --out {out.as_posix()} --reseed {pupil} --steps {lesson.steps} "
                 f"{flags} --only {lesson.only}")


def load(path: Path) -> dict:
    """The figures in a file: {"run": {stage: sum of its file}, "arms": …}"""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"run": {}, "arms": {}}


def is_of(shared: Path, known: dict, path: Path) -> None:
    """Notes which stages the shared run has for the arms. Raises UserError where there is no such run, or where the
    figures are of one with another stage."""
    there = {name: digest(file)[:16] for name in TAKEN_OVER if (file := shared / f"{name}.pt").exists()}
    if "P1" not in there:
        raise UserError(f"{shared} is no run with a finished P1: python exercises/share.py unpack FILE {shared}")
    if other := [name for name in there if known["run"].get(name, there[name]) != there[name]]:
        raise UserError(f"{path} has the figures of another shared run ({', '.join(other)} differ): move it and the "
                        "arms beside it away, or give --results another file")
    known["run"] |= there


def keep(known: dict, arm: str, one: dict, path: Path) -> None:
    """Puts one pupil's figures into the file."""
    pupils = known["arms"].setdefault(arm, {"flags": ARMS[arm][2], "pupils": []})["pupils"]
    pupils[:] = sorted([*(other for other in pupils if other["reseed"] != one["reseed"]), one],
                       key=lambda other: other["reseed"])
    known["arms"] = {name: known["arms"][name] for name in ARMS if name in known["arms"]}
    write_text(path, json.dumps(known, indent=1) + "\n")


def lessons(known: dict) -> list[tuple[list[str], dict[str, list[Arm]]]]:
    """Of those whose control is there: the names of its arms, the control's first, and their values of each figure."""
    found = []
    for lesson in (T, U):
        names = [name for name in known["arms"] if ARMS[name][-1] is lesson]
        if lesson.control in names:
            found.append((names, {measure: [Arm(ARMS[name][1], [one[measure] for one in known["arms"][name]["pupils"]])
                                             for name in names] for measure in lesson.figures}))
    return found


def table(known: dict) -> str:
    """Markdown, for each lesson: mean ± spread (standard deviation), and what the class's rule says of the means."""
    tables = []
    for names, columns in lessons(known):
        lines = [f"| exercise | arm | pupils | {' | '.join(columns)} |", "|" + "---|" * (3 + len(columns))]
        for place, name in enumerate(names):
            exercise, about, flags, _ = ARMS[name]
            cells = []
            for column in columns.values():
                own, control = column[place], column[0]
                told = "" if own is control or not control.spread else f": {verdict(own, control)}"
                cells.append(f"{own.mean:.4g}" + (f" ± {own.spread:.2g}" if own.spread is not None else "") + told)
            changed = flags.rpartition("--stages")[0].strip() or "–"
            lines.append(f"| {exercise} | {about} (`{changed}`) | {len(own.values)} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def report(known: dict, path: Path) -> None:
    plots = [dot_plot(measure, arms[0], arms[1:]) for _, columns in lessons(known) for measure, arms in columns.items()
             if arms[0].spread is not None]
    if plots:
        image, top = Image.new("RGB", (plots[0].width, sum(plot.height for plot in plots)), "white"), 0
        for plot in plots:
            image.paste(plot, (0, top))
            top += plot.height
        image.save(path.with_suffix(".png"), optimize=True)
    print(table(known))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the shared run")
    parser.add_argument("--arms", default=",".join(ARMS), help="%(default)s")
    parser.add_argument("--pupils", type=int, default=5, help="how many --reseeds (default 5)")
    parser.add_argument("--jobs", type=int, default=1, help="arms that are trained side by side, sharing the cores")
    parser.add_argument("--results", type=Path, help="the figures' file (default: class.json beside the arms)")
    parser.add_argument("--commands", action="store_true", help="print what would be run and stop")
    parser.add_argument("--report", action="store_true", help="print the table, draw the picture and stop")
    given, lock = parser.read(), threading.Lock()
    path, names = given.results or RUNS / given.run.name / "class.json", given.arms.split(",")
    known = load(path)
    if given.report:
        return report(known, path)
    is_of(given.run, known, path)
    if unknown := set(names) - set(ARMS):
        raise UserError(f"--arms {', '.join(sorted(unknown))}: they are {', '.join(ARMS)}")
    if given.pupils < 1 or given.jobs < 1:
        raise UserError("--pupils and --jobs are 1 or more")
    there = {(name, one["reseed"]) for name, arm in known["arms"].items() for one in arm["pupils"]}
    missing = [(name, k + 1) for name in names for k in range(given.pupils) if (name, k + 1) not in there]
    threads = max(1, torch.get_num_threads() // given.jobs)
    if given.commands:
        return print("\n".join(by_hand(command(*one, given.run)[1], threads) for one in missing))

    def train(name: str, pupil: int) -> None:
        out, line = command(name, pupil, given.run)
        run(out, line, threads)
        lesson = ARMS[name][-1]
        results = measured(out, lesson.only.partition(",")[0])
        with lock:
            keep(known, name, {"reseed": pupil, **{measure: figure(results, measure) for measure in lesson.figures},
                               "eval_id": results["eval_id"], "machine": machine_of(threads)}, path)

    with ThreadPoolExecutor(given.jobs) as lanes:
        for done in [lanes.submit(train, *one) for one in missing]:
            done.result()
    report(known, path)


if __name__ == "__main__":
    run_command(main)
