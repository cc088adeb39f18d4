"""Whether an answer is right: what grade.py runs in a process of its own, and the tests by the hundred.

    python exercises/judge.py N SEED OUT FILE=PATH …     a line of JSON in OUT for each claim, as it is decided
"""

import ast
import difflib
import importlib
import json
import linecache
import random
import sys
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch

from exercises.checks.tools import Wrong, same
from exercises.cut import PACKED, ROOT, Version, stand_alone, version_with

NUMBERS = range(1, 11)
VARIANT = ROOT / "exercises" / "variant.pt"  # in a class's pack: what it is asked for in place of the source's own
FREE = ("fold", "Stream.__init__", "sample", "logit_normal_times")  # right answers differ: told by the claims alone
FILES, NOT_THEIRS = {path.name for path in ROOT.glob("*.py")}, (ROOT, Path(PACKED.name))  # a learner's files; real ones


def exercise(number: int):
    return importlib.import_module(f"exercises.checks.e{number:02}")


def cut_of(number: int) -> dict[str, list[str]]:
    """file -> names of what the exercise takes out of it; exercise 10 takes out nothing."""
    return getattr(exercise(number), "CUT", {})


def read_own(path: Path | str) -> str:
    """A learner's file; some editors put a mark before UTF-8."""
    return Path(path).read_text(encoding="utf-8-sig")


def learners(number: int, paths: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """What `Version` takes: the learner's files, with what other exercises take out of them put in."""
    for path in paths.values():
        ast.parse(read_own(path), str(path))  # what cannot be read is told with its place
    others = {file: [name for other in NUMBERS if other != number for name in cut_of(other).get(file, ())
                     if name not in cut_of(number)[file]] for file in paths}
    return {file[:-3]: (str(path), stand_alone(file, read_own(path), others[file]))
            for file, path in paths.items()}


@cache
def variant() -> dict[int, dict]:
    """exercise -> {"task": words, "dropped": claims that are the source's alone, "expected": {seed: {name: tensor}}}"""
    return torch.load(VARIANT, weights_only=True) if VARIANT.exists() else {}


def claims_of(number: int) -> list:
    """What is judged: of a class's variant also what is otherwise there."""
    asked = variant().get(number)
    if not asked:
        return exercise(number).CLAIMS

    def otherwise(own, real):
        for seed, wanted in expected(number).items():
            for name, compute in computations(exercise(number), own, seed):
                if name in wanted:
                    same(compute(), wanted[name], f"{name} on random inputs ({seed})", 1e-4)

    otherwise.__doc__ = f"otherwise in your class: {asked['task']}"
    return [*(claim for claim in exercise(number).CLAIMS if claim.__name__ not in asked["dropped"]), otherwise]


def expected(number: int) -> dict[int, dict]:
    """seed -> what the functions give on its random inputs: in the teacher's hands by any seed."""
    if answers(number) is None:
        return variant()[number]["expected"]
    bodies = importlib.import_module("exercises.answers.variants").variant_of(number, variant()["k"]).bodies
    return what_comes_out(number, bodies, torch.randint(2**31, (3,)).tolist())


def what_comes_out(number: int, bodies: dict[str, dict[str, str]], seeds: list[int]) -> dict[int, dict]:
    right = version_with(bodies, "variant")
    found = {seed: prints(exercise(number), right, seed) for seed in seeds}
    return {seed: {name: value.float() for name, value in values.items() if name not in FREE}
            for seed, values in found.items()}


def answers(number: int):
    """None in a pack for a class, which has none."""
    try:
        return importlib.import_module(f"exercises.answers.a{number:02}")
    except ImportError:
        return None


@cache
def real() -> Version:
    return Version()


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def decide(number: int, claim, own: Version, seed: int) -> str:
    """What is wrong with `own`, in one line; empty: nothing. Of an error it names the line that the learner wrote."""
    seeded(seed)
    try:
        claim(own, real())
        kept = torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
        return "" if kept else "torch's gradient mode, or its default dtype, is another afterwards"
    except Wrong as wrong:
        return str(wrong)
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and str(error).startswith("exercise "):
            return f"not written yet: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames for at in [Path(f.filename)]
                  if at.name in FILES and at.parent not in NOT_THEIRS]
        cut = {name.rpartition(".")[2] for names in cut_of(number).values() for name in names}
        at = next((f for f in theirs[::-1] if f.name in cut), theirs[-1] if theirs else frames[-1])
        said = str(error).splitlines()[0] if str(error) else ""
        if "used in the graph" in said or "does not require grad" in said:  # torch's words for it
            return "no gradient comes through: something is detached, or computed without gradient, that must not be"
        return f"{type(error).__name__}: {said}"[:200] + f" ({Path(at.filename).name}:{line_of(at)})"
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def line_of(frame: traceback.FrameSummary) -> int:
    """Of the learner's own file, in which other holes may be open that `learners` has filled."""
    if not Path(frame.filename).is_file():
        return frame.lineno
    own = read_own(frame.filename).splitlines(True)
    blocks = difflib.SequenceMatcher(None, linecache.getlines(frame.filename), own, False).get_matching_blocks()
    return next((frame.lineno + b - a for a, b, size in blocks if a < frame.lineno <= a + size), frame.lineno)


def known_mistakes(number: int, own: Version) -> list[str]:
    """The names of the planted mistakes that give what `own` gives, where that is not what is right."""
    module, planted = exercise(number), answers(number)
    if planted is None or not hasattr(module, "fingerprint"):
        return []
    mine, right = prints(module, own), prints(module, real())

    def otherwise(files: dict) -> dict:
        """What an answer computes where that is not what the source does."""
        theirs = prints(module, version_with(files, "planted"))
        return {key: theirs[key] for bodies in files.values() for key in bodies
                if key in theirs and not alike(theirs[key], right.get(key))}

    found = {name: changes for name, files in planted.WRONG.items() if (changes := otherwise(files)) and all(
        key in mine and alike(mine[key], value) for key, value in changes.items())}
    unusual = [otherwise(files) for files in planted.RIGHT.values()] if found else []  # where there is chance in it
    return [name for name, changes in found.items() if not any(
        key in one and alike(one[key], value) for one in unusual for key, value in changes.items())]


def computations(module, version: Version, seed: int = 1):
    """(name of a function, what computes something that shows what it does), on random inputs, the same for a seed"""
    torch.manual_seed(seed)
    for name, compute in module.fingerprint(version).items():
        torch.manual_seed(seed + 1)
        yield name, compute


def prints(module, version: Version, seed: int = 1) -> dict:
    """name -> what its computation gives; what raises is left out: the claims tell it."""
    found = {}
    with suppress(Exception, SystemExit):  # the file does not run
        for name, compute in computations(module, version, seed):
            with suppress(Exception, SystemExit):
                found[name] = compute().detach()
    return found


def alike(a, b) -> bool:
    return (a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype
            and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True))


def verdicts(number: int, own: Version, seed: int, tell=lambda row: None) -> list[dict]:
    """A row for each claim: {"claim", "ok", "why"}; `tell` gets each as it is decided."""
    rows = []
    for place, claim in enumerate(claims_of(number)):
        why = decide(number, claim, own, 1000 * seed + place)
        rows.append({"claim": claim.__doc__.splitlines()[0], "ok": not why, "why": why})
        tell(rows[-1])
    return rows


def passes(number: int, own: Version, seed: int, places: list[int] | None = None) -> bool:
    """Whether all claims hold, as `verdicts` has it; the first that does not ends it. `places`: the order in which they
    are tried; the one that failed is moved to its front, as it is likely to fail again by another seed."""
    claims = claims_of(number)
    for place in [*range(len(claims))] if places is None else places:
        if decide(number, claims[place], own, 1000 * seed + place):
            if places is not None:
                places.insert(0, places.pop(places.index(place)))
            return False
    return True


def main() -> None:
    number, seed, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    paths = dict(pair.split("=", 1) for pair in sys.argv[4:])
    own = Version(learners(number, paths))
    for name in {file[:-3] for file in paths}:
        try:
            sys.modules[name] = getattr(own, name)  # so that the learner's classes can be pickled
        except Exception:  # a file that does not run: each claim says so
            pass

    def tell(row: dict) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    torch.set_num_threads(2)
    module = exercise(number)
    rows = verdicts(number, own, seed, tell)
    if not all(row["ok"] for row in rows):
        tell({"mistakes": known_mistakes(number, own)})
    elif hasattr(module, "picture"):
        path = module.picture(own, ROOT / "exercises" / "work" / f"{number}.png")
        tell({"picture": f"{path}: {module.picture.__doc__.splitlines()[0]}" if path else ""})


if __name__ == "__main__":
    main()
