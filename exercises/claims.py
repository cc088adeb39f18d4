"""The paper's claims, answered with seeds: trains what is missing, measures, writes what came out.

    python exercises/claims.py                          five seeds, all rows: days on two cores; it goes on where it was
    python exercises/claims.py --seeds 0,1 --rows no_pixel_stream,no_T1 --jobs 2        two seeds side by side
    python exercises/claims.py --commands               each arm's own commands, trained or not; nothing is run
    python exercises/claims.py --report                 the picture and the table anew from results/claims.json

What is asked stands in `ROWS`, and each row was written down before its first run: an arm, its flags, what is measured,
the sign that the paper implies of (arm − control), and δ, the smallest difference that would matter. Control and arms
of a seed share all that the arm's flags do not touch (P1 to P3, but for the last layer's P3); seeds share nothing. The
verdict over seeds, paired, by Student's t at 95 %:

    holds here             the whole interval is on the claimed side, and its mean is at least δ
    does not hold here     the whole interval is below δ
    cannot be told         neither: more seeds, or a better measure

All three are good results. Of so many rows some would be told by chance alone; so beside it stand the interval that is
wide enough for all rows of `ROWS` at once (Bonferroni's) and the row's p against no difference, adjusted by Holm's
rule.
The direct path is measured (no rewriting), as the paper draws, with the toy's own number of steps. A row that is
finished is in results/claims.json with its machine, torch and commit, and is not trained again. No row is tuned after a
look: where one needs another design, both are shown. One does: that an external teacher gains nothing was written down
as that it is worse; `no_better` reads it as it is meant, the whole interval below +δ.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import plumbing.command  # before torch, whose threads wait as it says
import torch
from PIL import Image, ImageDraw

from benchmarks.yardstick import processor
from exercises.cut import PACKED
from exercises.share import commit
from parts.metrics import mean_interval
from plumbing.command import Parser, UserError, run_command, write_text
from plumbing.pictures import INK, LINES, PALE, font
from plumbing.run_folder import read_lines
from spar import Config

RESULTS, RUNS = ROOT / "results" / "claims.json", Path("runs") / "claims"
TOKENIZER, UNIFIED = "P1,P2,P3,T1,T2,T3", "P1,P2,P3,T1,T2,T3,U1,U2,U3"  # stages of Table 5's arms, and of Table 6's
PSNR, UNDERSTANDING = "reconstruction.psnr", "understanding.overall"
DRAWING, EDITING, STEPS_SAVED = "generation_direct.overall", "editing_direct.overall", "saved.steps"
OF_SOURCE = "exercises/run.py 10 " if PACKED.exists() else ""  # in a class's pack train.py itself stops at a hole
SMOOTH = 20  # lines of the log, of ten steps each, over which a loss is averaged


@dataclass(frozen=True)
class Row:
    arm: str
    table: str
    about: str  # the arm, in words
    flags: str  # of train.py
    measures: tuple[tuple[str, int, float], ...]  # (table.figure of results.json, sign of arm − control, δ)
    paper: str = ""  # what the paper gives for it (Tables 5 and 6)
    no_better: bool = False  # the paper's word is that the arm gains nothing

    @property
    def stages(self) -> str:
        return TOKENIZER if self.table == "5" else UNIFIED


RECONSTRUCTS, UNDERSTANDS = (PSNR, -1, 0.5), (UNDERSTANDING, -1, 0.05)
DRAWS, EDITS = (DRAWING, -1, 0.05), (EDITING, -1, 0.05)
ROWS = [
    Row("no_pixel_stream", "5", "without the pixel stream", "--tokenizer semantic-only", (RECONSTRUCTS,),
        "PSNR 26.65 → 24.62"),
    Row("no_semantic_stream", "5", "without the semantic stream, L_s kept", "--tokenizer pixel-only",
        (RECONSTRUCTS, UNDERSTANDS), "PSNR 26.65 → 25.28, MME-P 1500 → 709; it does not say whether L_s stays"),
    Row("no_semantic_stream_no_anchor", "5", "without the semantic stream and without L_s",
        "--tokenizer pixel-only --no-anchor", (RECONSTRUCTS, UNDERSTANDS), "as above"),
    Row("no_anchor", "5", "both streams, without L_s", "--no-anchor", (UNDERSTANDS,),
        "in words: L_s keeps understanding"),
    Row("no_T3", "5", "the encoder stays as it was, T3 left out", "--skip-stage T3", (RECONSTRUCTS,),
        "PSNR 26.65 → 16.26"),
    Row("frozen_T3", "5", "T3 without training the encoder", "--freeze-encoder", (RECONSTRUCTS,),
        "perhaps the same row"),
    Row("no_T1", "5", "without T1", "--skip-stage T1", (RECONSTRUCTS,), "in words: each stage prepares the next"),
    Row("no_T2", "5", "without T2", "--skip-stage T2", (RECONSTRUCTS,), "the same"),
    Row("both_with_transformer", "5", "both streams with a Transformer", "--symmetric with", (RECONSTRUCTS,),
        "in words: the pair is asymmetric for a reason"),
    Row("both_without_transformer", "5", "neither stream with a Transformer", "--symmetric without", (RECONSTRUCTS,),
        "the same"),
    Row("no_alignment", "6", "without L_align", "--align none", (DRAWS, EDITS, (STEPS_SAVED, 1, 0.1)),
        "GenEval 0.89 → 0.86, ImgEdit 3.85 → 3.78"),
    Row("half_of_U2", "6", "the whole method, half of U2", f"--steps U2={Config().of_stage('steps', 'U2') // 2}",
        (DRAWS, EDITS), "not compared: the yardstick of what L_align saves"),
    Row("last_layer", "6", "the last layer in place of DTR", "--router last", (DRAWS, EDITS),
        "GenEval 0.89 → 0.86, ImgEdit 3.85 → 3.73"),
    Row("external_teacher", "6", "another encoder teaches, P1's of another seed",
        "--align external --teacher {teacher}", (DRAWS, EDITS), "in words: its own tokenizer is teacher enough",
        no_better=True),
    Row("mean_of_layers", "6", "the plain mean in place of DTR", "--router mean", (DRAWS, EDITS), "not compared"),
    Row("static_weights", "6", "one learned weight per layer in place of DTR", "--router static", (DRAWS, EDITS),
        "not compared"),
    Row("concat", "6", "all layers side by side and one matrix in place of DTR", "--router concat", (DRAWS, EDITS),
        "not compared"),
]
BASE = Row("base", "", "the whole method", "", ())

# ---------------------------------------------------------------- what is run


def commands(seed: int, row: Row, runs: Path = RUNS) -> list[tuple[Path, str]]:
    """(folder, train.py's command) of all that a row needs, in order; the last is the row's own."""
    base, teacher, out = (runs / str(seed) / name for name in ("base", "teacher", row.arm))
    of_table_5 = "reconstruction,understanding"
    needed = [(base, f"train.py --seed {seed} --out {base.as_posix()} --stages {TOKENIZER} --only {of_table_5}")]
    if row.table == "6":
        needed.append((base, f"train.py --seed {seed} --out {base.as_posix()} --only generation_direct,editing_direct"))
    if "{teacher}" in row.flags:
        needed.append((teacher, f"train.py --seed {100 + seed} --out {teacher.as_posix()} --stages P1 "
                                "--only understanding"))
    only = of_table_5 if row.table == "5" else "generation_direct,editing_direct"
    flags = row.flags.format(teacher=teacher.as_posix())
    own = (out, f"train.py --seed {seed} --from {base.as_posix()} --out {out.as_posix()} {flags} "
                f"--stages {row.stages} --only {only}")
    return needed if row is BASE else [*needed, own]


def measured(folder: Path, wanted: str) -> dict | None:
    """A run's results with the table `wanted`, None where it does not have them."""
    for name in ("results.json", "results-T3.json"):
        if (folder / name).exists():
            results = json.loads((folder / name).read_text(encoding="utf-8"))
            if wanted in results:
                return results
    return None


def run(folder: Path, command: str, threads: int) -> None:
    """Trains and measures; the output goes to a file beside the folder. Raises UserError."""
    if measured(folder, command.partition("--only ")[2].partition(",")[0]):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    print(by_hand(command, threads), flush=True)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *shlex.split(OF_SOURCE + command)], stdout=file, stderr=file,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise UserError(f"{log} says why this ended with {done.returncode}: python {command}")
    if folder.name == "base" and "--stages" in command:  # its next evaluation writes its own file
        (folder / "results.json").replace(folder / "results-T3.json")


def by_hand(command: str, threads: int) -> str:
    """For a shell. Another number of threads adds in another order, and rounds otherwise."""
    return f"OMP_NUM_THREADS={threads} python {OF_SOURCE}{command}"


def machine_of(threads: int) -> dict:
    """What a figure was trained and measured with."""
    return {"processor": processor(), "vectors": torch.backends.cpu.get_cpu_capability(), "threads": threads,
            "torch": torch.__version__, "commit": commit()[:7]}


def figure(results: dict, path: str) -> float:
    for key in path.split("."):
        results = results[key]
    return float(results)


def smoothed(run: Path, stage: str, symbol: str) -> list[tuple[int, float]]:
    """(step, running mean of a loss) along a stage."""
    lines = [line for line in read_lines(run / "log.jsonl") if line["stage"] == stage and symbol in line]
    return [(lines[i]["step"], statistics.mean(line[symbol] for line in lines[i + 1 - SMOOTH:i + 1]))
            for i in range(SMOOTH - 1, len(lines))]


def seconds_a_step(run: Path, stage: str) -> float:
    """The median along a stage: what else the machine did for a while does not move it."""
    lines = [line for line in read_lines(run / "log.jsonl") if line["stage"] == stage]
    return statistics.median((b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in zip(lines, lines[1:]))


def saved(base: Path, arm: Path) -> dict[str, float]:
    """By how large a share of the way the control is sooner than `arm` at the least loss that both reach in U2: in
    steps, and in seconds, which also pay for L_align. Below 0 where it is later. Both are read alike, by the first
    point of the running mean that is as low: a rule that reads them in two ways would find a gain in noise."""
    curves = smoothed(base, "U2", "L_fm"), smoothed(arm, "U2", "L_fm")
    level = max(curve[-1][1] for curve in curves)
    step, its_step = (next(step for step, loss in curve if loss <= level) for curve in curves)
    cost = seconds_a_step(base, "U2") / seconds_a_step(arm, "U2")
    return {"steps": 1 - step / its_step, "seconds": 1 - step * cost / its_step}


def finish(seed: int, row: Row, threads: int, runs: Path = RUNS) -> list[dict]:
    """Runs what a row needs and has not; -> for each of its measures {"measure", "seed", "value", "control", …}."""
    for folder, command in commands(seed, row, runs):
        run(folder, command, threads)
    base, arm, found = runs / str(seed) / "base", runs / str(seed) / row.arm, []
    machine = machine_of(threads)
    for measure, _, _ in row.measures:
        table = measure.partition(".")[0]
        if table == "saved":
            shares = saved(base, arm)
            found.append({"measure": measure, "seed": seed, "value": shares["steps"], "control": 0.0,
                          "seconds": shares["seconds"], "eval_id": measured(arm, "generation_direct")["eval_id"],
                          "machine": machine})
            continue
        own, control = measured(arm, table), measured(base, table)
        found.append({"measure": measure, "seed": seed, "value": figure(own, measure),
                      "control": figure(control, measure), "eval_id": own["eval_id"],
                      "control_eval_id": control["eval_id"], "machine": machine})
    return found


# ---------------------------------------------------------------- what came out


def inside(t: float, freedom: int) -> float:
    """The probability that Student's |t| is below `t`, by the trapezoid rule on its density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    x = torch.linspace(0, math.atan(t / math.sqrt(freedom)), 4001, dtype=torch.float64)  # t = √ν tan x
    return 2 * torch.trapezoid(scale * x.cos() ** (freedom - 1), x).item()


def quantile(level: float, freedom: int) -> float:
    """Of Student's t: |t| is below it with probability `level`. By halving."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, freedom) < level else (low, middle)
    return high


def verdict(interval: list[float] | None, claimed: int, delta: float) -> str:
    """By the rule above; `interval` is of (arm − control)."""
    if interval is None:
        return "cannot be told"
    low, high = sorted(claimed * end for end in interval)
    if low > 0 and (low + high) / 2 >= delta:
        return "holds here"
    return "does not hold here" if high < delta else "cannot be told"


GIVEN = ("name", "table", "measure", "claimed", "delta", "seeds")  # of a row; the rest follows


def summed_up(known: dict) -> dict:
    """Intervals and verdicts of all rows anew."""
    asked, of_arm = sum(len(row.measures) for row in ROWS), {row.arm: row for row in ROWS}
    several = []
    known["rows"] = [{key: row[key] for key in GIVEN} for row in known["rows"]]
    for row in known["rows"]:
        differences = torch.tensor([one["value"] - one["control"] for one in row["seeds"]], dtype=torch.float64)
        n, mean, arm = len(differences), differences.mean().item(), of_arm[row["name"]]
        row |= {"about": arm.about, "paper": arm.paper, "mean": round(mean, 4), "interval": None}
        if n > 1:
            error = differences.std().item() / n ** 0.5
            half = quantile(1 - 0.05 / asked, n - 1) * error
            row["interval"] = mean_interval(differences)
            row["all_rows"] = [round(mean - half, 4), round(mean + half, 4)]
            several.append((1 - inside(abs(mean) / error, n - 1) if error else float(mean == 0), row))
        row["verdict"] = verdict(row["interval"], row["claimed"], row["delta"])
        if arm.no_better:
            gains = verdict(row["interval"], 1, row["delta"])
            other = {"holds here": "does not hold here", "does not hold here": "holds here"}
            row["no_better"] = other.get(gains, gains)
    worst = 0.0
    for place, (p, row) in enumerate(sorted(several, key=lambda one: one[0])):  # the clearest pays for all, and so on
        worst = max(worst, min(1.0, (asked - place) * p))
        row["p_holm"] = round(worst, 4)
    for name, measure in (("saved_to_draw_alike", DRAWING), ("saved_to_edit_alike", EDITING)):
        known[name] = saved_to_do_alike(known, measure)
    return known


def saved_to_do_alike(known: dict, measure: str) -> dict | None:
    """Which share of U2's steps L_align saves to draw (or edit) as well as without it, on the line between half of U2
    and all of it: ½ (without L_align − whole) / (half − whole), means of the seeds that have both; and what is left of
    the range when any one seed is left out, None where half of U2 is then no worse. None where no seed has both, or
    half of U2 does it no worse."""
    seeds = {row["name"]: {s["seed"]: s["value"] - s["control"] for s in row["seeds"]}
             for row in known["rows"] if row["measure"] == measure}
    without, half = seeds.get("no_alignment", {}), seeds.get("half_of_U2", {})
    both = sorted(set(without) & set(half))

    def share(of: list[int]) -> float:
        lost = sum(half[seed] for seed in of)
        return sum(without[seed] for seed in of) / lost / 2 if lost < 0 else math.nan

    if not both or math.isnan(share(both)):
        return None
    others = [share([one for one in both if one != seed]) for seed in both] if len(both) > 1 else [share(both)]
    between = None if any(map(math.isnan, others)) else [round(min(others), 3), round(max(others), 3)]
    return {"share": round(share(both), 3), "range": between, "seeds": both}


def load(path: Path = RESULTS) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def keep(found: list[dict], row: Row, path: Path = RESULTS) -> None:
    """Puts a row's figures of one seed into the file."""
    known = load(path)
    for one in found:
        measure = one.pop("measure")
        sign, delta = next((sign, delta) for name, sign, delta in row.measures if name == measure)
        place = next((r for r in known["rows"] if (r["name"], r["measure"]) == (row.arm, measure)), None)
        if place is None:
            place = {"name": row.arm, "table": row.table, "measure": measure, "claimed": sign, "delta": delta,
                     "seeds": []}
            known["rows"].append(place)
        place["seeds"] = sorted([*(s for s in place["seeds"] if s["seed"] != one["seed"]), one],
                                key=lambda s: s["seed"])
    order = {row.arm: i for i, row in enumerate(ROWS)}
    known["rows"].sort(key=lambda r: (order[r["name"]], r["measure"]))
    write_text(path, json.dumps(summed_up(known), indent=1) + "\n")


def is_known(known: dict, row: Row, seed: int) -> bool:
    done = {(r["name"], r["measure"], s["seed"]) for r in known["rows"] for s in r["seeds"]}
    return all((row.arm, measure, seed) in done for measure, _, _ in row.measures)


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def table(known: dict) -> str:
    """Markdown, a line for each row."""
    lines = ["| | the paper | measured | sign | δ | arm − control, each seed | mean, 95 % | all rows at once; p | |",
             "|" + "---|" * 9]
    for before, row in zip([{}, *known["rows"]], known["rows"]):
        told = partial(signed, digits=2 if row["delta"] >= 0.5 else 3)
        one_by_one = " ".join(told(s["value"] - s["control"]) for s in row["seeds"])
        between, every = told(row["mean"]), "–"
        if row["interval"]:
            between += " ({} to {})".format(*map(told, row["interval"]))
            every = "{} to {}; {:.2g}".format(*map(told, row["all_rows"]), row["p_holm"])
        verdicts = f"**{row['verdict']}**" + (f"; no better by δ: **{row['no_better']}**" if "no_better" in row else "")
        about = f"{row['about']} | {row['paper']}" if row["name"] != before.get("name") else " | "
        lines.append(f"| {about} | {row['measure']} | {'+' if row['claimed'] > 0 else '−'} | {row['delta']} | "
                     f"{one_by_one} | {between} | {every} | {verdicts} |")
    return "\n".join(lines)


def draw(known: dict) -> Image.Image:
    """A line for each row: a dot for every seed, the interval, δ on the claimed side; in units of δ."""
    rows, high, left, wide = known["rows"], 34, 430, 520
    image = Image.new("RGB", (left + wide + 190, 70 + high * len(rows)), "white")
    pen = ImageDraw.Draw(image)
    farthest = max(abs(s["value"] - s["control"]) / row["delta"] for row in rows for s in row["seeds"])
    reach = math.ceil(min(30.0, max(3.0, farthest)) / 3) * 3  # deltas to each side; what is farther stands at the edge

    def x(value: float) -> float:
        return left + wide / 2 * (1 + max(-1.0, min(1.0, value / reach)))

    about = ("arm minus control, in units of delta (dotted: delta, on the side that the paper claims; line: 95 %; "
             "with a head: it goes on)")
    pen.text((12, 8), about, INK, font(15))
    for row_number, row in enumerate(rows):
        y, delta = 50 + high * row_number + high / 2, row["delta"]
        pen.text((12, y - 14), row["about"], INK, font(13))
        pen.text((12, y + 1), row["measure"], PALE, font(11))
        pen.line((x(-reach), y, x(reach), y), (225, 225, 228))
        for k in range(-3, 4):
            pen.line((x(row["claimed"]), y - 12 + 4 * (k + 3), x(row["claimed"]), y - 10 + 4 * (k + 3)), LINES[1], 1)
        if row["interval"]:
            pen.line((x(row["interval"][0] / delta), y, x(row["interval"][1] / delta), y), LINES[0], 3)
            for end in (end / delta for end in row["interval"] if abs(end / delta) > reach):  # it goes on
                pen.polygon([(x(end), y - 6), (x(end), y + 6), (x(end) + math.copysign(9, end), y)], LINES[0])
        for one in row["seeds"]:
            at = x((one["value"] - one["control"]) / delta)
            pen.ellipse((at - 4, y - 4, at + 4, y + 4), "white", INK, 2)
        pen.text((left + wide + 14, y - 8), row["verdict"], INK, font(13))
    pen.line((x(0), 44, x(0), 54 + high * len(rows)), PALE)
    for k in (-reach, -reach // 3, 0, reach // 3, reach):
        pen.text((x(k) - 8, 28), f"{k:+d}" if k else "0", PALE, font(11))
    return image


def report(path: Path = RESULTS) -> None:
    known = load(path)
    if known["rows"]:
        write_text(path, json.dumps(summed_up(known), indent=1) + "\n")
        draw(known).save(path.with_suffix(".png"), optimize=True)
        print(table(known))
        print("steps of U2 that L_align saves to draw alike:", known["saved_to_draw_alike"] or "not known",
              "\nand to edit alike:", known["saved_to_edit_alike"] or "not known")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--rows", default=",".join(row.arm for row in ROWS), help="arms: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that are trained side by side, sharing the cores")
    parser.add_argument("--commands", action="store_true", help="print the commands of these seeds and rows and stop")
    parser.add_argument("--report", action="store_true", help="sum up anew, write picture and table, and stop")
    given = parser.read()
    names, rows = given.rows.split(","), [row for row in ROWS if row.arm in given.rows.split(",")]
    if len(rows) != len(set(names)):
        raise UserError(f"--rows {given.rows}: they are {', '.join(row.arm for row in ROWS)}")
    if not all(seed.isdigit() for seed in given.seeds.split(",")) or given.jobs < 1:
        raise UserError("--seeds 0,1,2 and --jobs 1 or more")
    seeds, threads = [int(seed) for seed in given.seeds.split(",")], max(1, torch.get_num_threads() // given.jobs)
    if given.report:
        return report()
    if given.commands:
        for seed in seeds:
            for command in dict.fromkeys(command for row in rows for _, command in commands(seed, row)):
                print(by_hand(command, threads))
        return
    known, lock = load(), threading.Lock()
    missing = {seed: [row for row in rows if not is_known(known, row, seed)] for seed in seeds}

    def one_seed(seed: int) -> None:
        for row in missing[seed]:
            found = finish(seed, row, threads)
            with lock:
                keep(found, row)
                print(f"seed {seed}: {row.arm} is in {RESULTS.name}", flush=True)

    with ThreadPoolExecutor(given.jobs) as lanes:
        for done in [lanes.submit(one_seed, seed) for seed in seeds]:
            done.result()
    report()


if __name__ == "__main__":
    run_command(main)
