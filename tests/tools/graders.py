"""How good the graders are, measured: the table of exercises/README.md.

    python -m tests.tools.graders [--seeds 20] [N …]

Every planted wrong answer must be rejected and every unusual right one accepted on all seeds; `tests.tools.mutants`
changes the real bodies by itself.
"""

import argparse
import time

from exercises.cut import ROOT, Version, cut, version_with
from exercises.judge import answers, cut_of, exercise, verdicts
from tests.tools.mutants import survivors


def accepts(number: int, own: Version, seed: int) -> bool:
    return all(row["ok"] for row in verdicts(number, own, seed, until_wrong=True))


def misjudged(number: int, seeds, at_most: int = 10**6) -> list[str]:
    """Which answers get the wrong word, and on which seed. `at_most`: of each kind, spread over all there are."""
    planted, found = answers(number), []
    for kind, right in (("WRONG", False), ("RIGHT", True)):
        every = list(getattr(planted, kind).items())
        for name, files in every[::-(-len(every) // at_most)]:
            own = version_with(files, "planted")
            found += [f"{kind}: {name}, seed {seed}" for seed in seeds if accepts(number, own, seed) != right]
    found += [f"the source itself, seed {seed}" for seed in seeds if not accepts(number, Version(), seed)]
    return found


def lines_cut(number: int) -> int:
    return sum(cut((ROOT / file).read_text(encoding="utf-8"), names, number)[1]
               for file, names in cut_of(number).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*", default=list(range(1, 10)))
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    print("| | exercise | lines cut | minutes | seconds of its claims | wrong answers rejected | right ones accepted | "
          "mutants rejected |\n|" + "---|" * 8)
    for number in given.numbers:
        module, planted = exercise(number), answers(number)
        start = time.time()
        verdicts(number, Version(), 0)
        seconds = time.time() - start
        wrong = misjudged(number, range(given.seeds))
        count, passed = survivors(number)
        ok = [sum(kind in line for line in {line.rpartition(",")[0] for line in wrong}) for kind in ("WRONG", "RIGHT")]
        print(f"| {number} | {module.TITLE} | {lines_cut(number)} | {module.MINUTES} | {seconds:.1f} | "
              f"{len(planted.WRONG) - ok[0]} of {len(planted.WRONG)} | {len(planted.RIGHT) - ok[1]} of "
              f"{len(planted.RIGHT)} | {count - len(passed)} of {count} |", flush=True)
        for line in wrong:
            print("misjudged:", line)


if __name__ == "__main__":
    main()
