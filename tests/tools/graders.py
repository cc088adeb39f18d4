"""How good the graders are, measured: the table of exercises/README.md.

    python -m tests.tools.graders [--seeds 20] [--mutants] [N …]

Every planted wrong answer must be rejected and every unusual right one accepted on all seeds; `tests.tools.mutants`
changes the real bodies by itself. In the teacher's half of a class's pack the answers are those of its variant: each
right or wrong in what it was, and right in what is otherwise there.
"""

import argparse
import time

from exercises.cut import ROOT, Version, cut, version_with
from exercises.answers.variants import variant_of
from exercises.judge import answers, claims_of, cut_of, exercise, passes, variant, verdicts
from tests.tools.mutants import survivors


def otherwise(number: int) -> dict[str, dict]:
    """{file: {function: body}} of what a class's variant asks for; empty: what the source does."""
    asked = variant_of(number, variant().get("k", 0))
    return asked.bodies if asked else {}


def planted(number: int, kind: str) -> dict[str, dict]:
    """name -> {file: {function: body}}; of a variant without those that write what is otherwise there."""
    bodies, found = otherwise(number), {}
    for name, files in getattr(answers(number), kind).items():
        if not any(bodies.get(file, {}).keys() & own.keys() for file, own in files.items()):
            found[name] = {file: bodies.get(file, {}) | files.get(file, {}) for file in bodies | files}
    return found


def misjudged(number: int, seeds, at_most: int = 10**6) -> list[str]:
    """Which answers get the wrong word, and on which seed. `at_most`: of each kind, spread over all there are."""
    found, bodies = [], otherwise(number)
    for kind, right in (("WRONG", False), ("RIGHT", True)):
        every = list(planted(number, kind).items())
        for name, files in every[::max(1, -(-len(every) // at_most))]:
            own, places = version_with(files, "planted"), [*range(len(claims_of(number)))]
            found += [f"{kind}: {name}, seed {seed}" for seed in seeds if passes(number, own, seed, places) != right]
    found += [f"the source itself, seed {seed}" for seed in seeds
              if passes(number, Version(), seed) == bool(bodies)]
    if bodies:
        own = version_with(bodies, "variant")
        found += [f"RIGHT: the variant, seed {seed}" for seed in seeds if not passes(number, own, seed)]
    return found


def lines_cut(number: int) -> int:
    return sum(cut((ROOT / file).read_text(encoding="utf-8"), names, number)[1]
               for file, names in cut_of(number).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*", default=list(range(1, 10)))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--mutants", action="store_true", help="count these, too")
    given = parser.parse_args()
    print("| | exercise | lines cut | minutes | seconds of its claims | wrong answers rejected | right ones accepted | "
          "mutants rejected |\n|" + "---|" * 8)
    for number in given.numbers:
        module, wrong_ones, right_ones = exercise(number), planted(number, "WRONG"), planted(number, "RIGHT")
        start = time.time()
        verdicts(number, Version(), 0)
        seconds = time.time() - start
        wrong = misjudged(number, range(given.seeds))
        count, passed = survivors(number) if given.mutants else (0, [])
        ok = [sum(kind in line for line in {line.rpartition(",")[0] for line in wrong}) for kind in ("WRONG", "RIGHT")]
        print(f"| {number} | {module.TITLE} | {lines_cut(number)} | {module.MINUTES} | {seconds:.1f} | "
              f"{len(wrong_ones) - ok[0]} of {len(wrong_ones)} | {len(right_ones) - ok[1]} of "
              f"{len(right_ones)} | {count - len(passed)} of {count} |", flush=True)
        for line in wrong:
            print("misjudged:", line)


if __name__ == "__main__":
    main()
