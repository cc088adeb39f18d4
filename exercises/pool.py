"""A class's numbers: each arm as a row of dots beside the control's seeds, and what can be told from them.

    python exercises/pool.py reconstruction.psnr class/*.json --control control/*.json --out pool.png

FIGURE is a place in results.json. Results of the same configuration are one arm. The rule is that of exercise 10: where
the means differ by less than twice the control's spread (its standard deviation over seeds), it cannot be told.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import plumbing.command  # before torch, whose threads wait as it says
from PIL import Image, ImageDraw

from evaluate import asked_alike
from exercises.checks.e10 import Run, differing, figure, read_control, spread_of
from exercises.checks.tools import Wrong
from plumbing.command import Parser, UserError, run_command
from plumbing.pictures import INK, LINES, MARGIN, PALE, TEXT, font

WIDTH, LEFT, ROW, DOT = 720, 200, 46, 4  # pixels: of the plot, of its labels, of an arm, of a dot


@dataclass
class Arm:
    label: str
    values: list[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float | None:
        return spread_of(self.values) if len(self.values) > 1 else None


def each_once(runs: list[Run]) -> list[Run]:
    """Without the runs whose weights are another's to the bit, which is said: handed in twice, or of one --reseed."""
    known = {}
    for run in runs:
        first = known.setdefault(run.results.get("eval_id") or run.where, run)
        if first is not run:
            print(f"{run.where} has the weights of {first.where}: counted once")
    return list(known.values())


def pool(path: str, runs: list[Path], control: list[Path]) -> tuple[Arm, list[Arm]]:
    """-> (the control, the arms by their change). Raises UserError where they were not measured alike."""
    try:
        controls, others = each_once(read_control(control)), each_once(read_control(runs))
        for one in controls + others:
            if asked_alike(one.results) != asked_alike(controls[0].results):
                raise UserError(f"{one.where} was measured by another protocol or on other data than "
                                f"{controls[0].where}: measure them alike first")
        for one in controls:
            if changed := differing(one.settings, controls[0].settings):
                raise UserError(f"the control's runs differ in {', '.join(changed)}: {one.where}")
        if len(controls) < 2:
            raise UserError("one run of the control has no spread: give the results of two seeds or more")
        arms = {}
        for one in others:
            arms.setdefault(label(one, controls[0]), []).append(figure(one.results, path))
        values = [figure(one.results, path) for one in controls]
    except Wrong as wrong:
        raise UserError(str(wrong)) from None
    return Arm("control", values), [Arm(name, numbers) for name, numbers in sorted(arms.items())]


def label(run: Run, control: Run) -> str:
    """What differs, in a few words."""
    changed = differing(run.settings, control.settings)
    words = [f"{key} {run.settings[key] if key in run.settings else 'as preset'}" for key in changed]
    return ", ".join(word.replace(",", "") for word in words) or "as the control"


def verdict(arm: Arm, control: Arm) -> str:
    difference = arm.mean - control.mean
    if abs(difference) < 2 * control.spread:
        return "cannot be told"
    return "higher" if difference > 0 else "lower" if difference < 0 else "the same"


def table(path: str, control: Arm, arms: list[Arm]) -> str:
    lines = [f"{path:32} {'runs':>4} {'mean':>9} {'spread':>8} {'difference':>11}   verdict"]
    for arm in [control, *arms]:
        spread = "–" if arm.spread is None else f"{arm.spread:.4f}"
        tail = "" if arm is control else f" {arm.mean - control.mean:+11.4f}   {verdict(arm, control)}"
        lines.append(f"{arm.label[:32]:32} {len(arm.values):4} {arm.mean:9.4f} {spread:>8}{tail}")
    lines.append(f"cannot be told: nearer than twice the control's spread, {2 * control.spread:.4f}")
    return "\n".join(lines)


def dot_plot(path: str, control: Arm, arms: list[Arm]) -> Image.Image:
    """A row for each arm, a dot for each run, a stroke at their mean; grey: where nothing can be told."""
    rows = [control, *arms]
    band = control.mean - 2 * control.spread, control.mean + 2 * control.spread
    every = [value for arm in rows for value in arm.values] + list(band)
    low, high = min(every), max(every)
    low, high = (low - 0.05 * (high - low), high + 0.05 * (high - low)) if high > low else (low - 1, high + 1)
    image = Image.new("RGB", (LEFT + WIDTH + 4 * MARGIN, 40 + ROW * len(rows) + 40), "white")
    pen, bottom = ImageDraw.Draw(image), 40 + ROW * len(rows)

    def x(value: float) -> float:
        return LEFT + MARGIN + WIDTH * (value - low) / (high - low)

    pen.text((MARGIN, 8), path, INK, font(TEXT + 2))
    pen.rectangle((x(band[0]), 36, x(band[1]), bottom), (235, 235, 238))
    pen.text((x(control.mean), 20), "cannot be told", PALE, font(11), anchor="mt")
    for place, arm in enumerate(rows):
        middle, colour = 40 + ROW * place + ROW // 2, INK if arm is control else LINES[(place - 1) % len(LINES)]
        pen.text((MARGIN, middle - 16), arm.label[:30], colour, font())
        told = f"mean {arm.mean:.4g} of {len(arm.values)}" + ("" if arm is control else f": {verdict(arm, control)}")
        pen.text((MARGIN, middle + 1), told, PALE, font(11))
        taken = {}
        for value in sorted(arm.values):  # dots in one place stand upon one another
            column = round(x(value) / (2 * DOT))
            level = taken[column] = taken.get(column, -1) + 1
            height = middle + DOT * ((level + 1) // 2 % 5) * (-1) ** level
            pen.ellipse((x(value) - DOT, height - DOT, x(value) + DOT, height + DOT), colour, "white")
        pen.line((x(arm.mean), middle - 16, x(arm.mean), middle + 16), colour, 2)
    pen.line((x(low), bottom, x(high), bottom), PALE)
    for step in range(6):
        value = low + (high - low) * step / 5
        pen.line((x(value), bottom, x(value), bottom + 4), PALE)
        pen.text((x(value), bottom + 8), f"{value:.4g}", INK, font(11), anchor="mt")
    return image


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", help="its place in results.json, such as reconstruction.psnr")
    parser.add_argument("results", type=Path, nargs="+", help="the class's results.json, or their run folders")
    parser.add_argument("--control", type=Path, nargs="+", required=True, help="the same of the control's seeds")
    parser.add_argument("--out", type=Path, default=Path("pool.png"), help="the picture (default pool.png)")
    given = parser.read()
    control, arms = pool(given.figure, given.results, given.control)
    print(table(given.figure, control, arms))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    dot_plot(given.figure, control, arms).save(given.out)
    print(given.out)


if __name__ == "__main__":
    run_command(main)
