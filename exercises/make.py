"""Writes a learner's copy of the source, with the bodies of an exercise taken out.

    python exercises/make.py 6                        exercises/work/router.py, with four holes, and what to predict
    python exercises/make.py --class OUT --variant 3  a pack for a graded class, each exercise otherwise in one thing

Signatures and docstrings stay: they say what is wanted. Fill the holes in any way, then `python exercises/grade.py 6`.
"""

import json
import random
import shutil
import sys
import zipfile
from pathlib import Path
from textwrap import indent

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from exercises.cut import PACKED, cut, source_of
from exercises.judge import NUMBERS, VARIANT, cut_of, exercise, variant, what_comes_out
from plumbing.command import Parser, UserError, run_command, write_text

WORK = ROOT / "exercises" / "work"
PREDICTIONS = "predictions.md"
MADE = "made.json"  # in the folder: file -> the exercise that its copy was made for


def made(work: Path = WORK) -> dict[str, int]:
    return json.loads((work / MADE).read_text(encoding="utf-8")) if (work / MADE).exists() else {}


def files_of(number: int, work: Path = WORK) -> dict[str, Path]:
    """file -> the learner's copy for this exercise: beside the others, or in a folder of its own where another
    exercise needs the same file. Raises UserError where there is none."""
    found, owners = {}, made(work)
    for file in cut_of(number):
        own = work / str(number) / file
        path = own if own.exists() and owners.get(file) != number else work / file
        if not path.exists() or owners.get(file, number) != number and path != own:
            raise UserError(f"{path} is not there: python exercises/make.py {number} writes it")
        found[file] = path
    return found


def make(number: int, work: Path = WORK) -> list[str]:
    """Writes the copies; what another exercise has there is put into a folder of its own. -> lines to print."""
    module, owners, lines = exercise(number), made(work), []
    if not cut_of(number):
        sheet = work / "sheet.json"
        if sheet.exists():
            raise UserError(f"{sheet} is there already: move it away to begin again")
        write_text(sheet, json.dumps(module.SHEET, indent=1) + "\n")
        expect(number, work)
        return [f"{sheet}: fill in all down to the prediction, then train the arm, then the rest; what each line wants "
                f"stands in {work / PREDICTIONS}",
                f"then: python exercises/grade.py {number} RUN {sheet} --control CONTROL …"]
    for file, names in cut_of(number).items():
        taken = cut(source_of(file), names, number)[1]
        text = cut((ROOT / file).read_text(encoding="utf-8"), names, number)[0]  # of a pack: with all other holes too
        path, owner, parked = work / file, owners.get(file), work / str(number) / file
        if path.exists() and owner == number:
            raise UserError(f"{path} is there already, with your answers: move it away to begin again")
        if path.exists():
            away = work / str(owner or "other") / file
            away.parent.mkdir(parents=True, exist_ok=True)
            path.replace(away)
            lines.append(f"{path.name} of exercise {owner or '?'} now lies in {away.parent}")
        if parked.exists():  # its answers come back
            work.mkdir(parents=True, exist_ok=True)
            parked.replace(path)
            lines.append(f"{path}: as you left it")
        else:
            write_text(path, text)
            lines.append(f"{path}: {taken} lines taken out, of {', '.join(names)}")
        owners[file] = number
    write_text(work / MADE, json.dumps(owners) + "\n")
    expect(number, work)
    return [*lines, f"{work / PREDICTIONS}: what is wanted, and three questions to answer first",
            f"then: python exercises/grade.py {number}"]


def expect(number: int, work: Path) -> None:
    """Adds to predictions.md what an exercise wants and its questions, once."""
    sheet, module = work / PREDICTIONS, exercise(number)
    known = sheet.read_text(encoding="utf-8") if sheet.exists() else "# What I expect\n"
    if f"\n## {number} " not in known:
        about = module.ABOUT
        if number in variant():
            about += f"\n\n**Otherwise in your class**: {variant()[number]['task']}"
        known += f"\n## {number} {module.TITLE}\n\n{about}\n"
        known += "".join(f"\n{question}\n\n> \n" for question in module.PREDICT)
        write_text(sheet, known)


def pack(out: Path, k: int) -> list[str]:
    """OUT/student: the project with all bodies of all exercises taken out, without the tests that hold the checks in
    another form and without planted answers; what its own graders compare with lies in exercises/source.zip.
    OUT/teacher: the whole. `k`: which variant; 0 asks for what the source does. It also gives the seed of grades."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is there already: choose another folder")
    if PACKED.exists():
        raise UserError("this is a class's pack itself: make another from the whole project")
    if out.resolve().is_relative_to(ROOT):
        raise UserError(f"{out} lies in the project, which would be packed into itself: --class ../{out.name}")
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", "runs", "pictures", "work", ".ci")
    for who in ("student", "teacher"):
        shutil.copytree(ROOT, out / who, ignore=ignored)
    student, holes = out / "student", {}
    for number in NUMBERS:
        for file, names in cut_of(number).items():
            for name in names:
                holes.setdefault(file, {})[name] = number
    with zipfile.ZipFile(student / PACKED.relative_to(ROOT), "w", zipfile.ZIP_DEFLATED) as whole:
        for file, names in holes.items():
            text = source_of(file)
            whole.writestr(file, text)
            for number in set(names.values()):
                text = cut(text, [name for name, of in names.items() if of == number], number)[0]
            write_text(student / file, text)
    shutil.rmtree(student / "tests" / "claims")
    shutil.rmtree(student / "exercises" / "answers")
    (student / "exercises" / "teacher.md").unlink(missing_ok=True)
    chance = random.Random(k)
    seed = chance.getrandbits(31)
    notes = [f"One exercise: python exercises/grade.py N --seed {seed} --root ../student",
             f"A pupil's whole folder: python exercises/grade.py --all --json --seed {seed} --root ../handed-in/NAME"]
    if k:
        from exercises.answers.variants import VARIANTS, variant_of  # a pack has none
        seeds, known = [chance.getrandbits(31) for _ in range(3)], {}
        for number in tqdm(VARIANTS, desc="what comes out of the variant", leave=False, delay=1, disable=None):
            one = variant_of(number, k)
            known[number] = {"task": one.task, "dropped": one.dropped,
                             "expected": what_comes_out(number, one.bodies, seeds)}
            notes += [f"\n{number}  {one.task}", *(f"\n{name}\n{indent(body.strip(), '    ')}"
                                                 for bodies in one.bodies.values() for name, body in bodies.items())]
        torch.save(known, student / VARIANT.relative_to(ROOT))
        torch.save(known | {"k": k}, out / "teacher" / VARIANT.relative_to(ROOT))
    write_text(out / "teacher" / "variant.txt", "\n".join(notes) + "\n")
    return [f"{student}: {sum(map(len, holes.values()))} bodies taken out of {len(holes)} files",
            f"{out / 'teacher'}: the whole, and in variant.txt how this class is graded, and what is right in it"]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("number", nargs="?", type=int, help="1 to 10")
    parser.add_argument("--class", dest="pack", type=Path, help="folder for a pack instead")
    parser.add_argument("--variant", type=int, default=0, help="of the pack: 0 asks for what the source does, another "
                        "number for something else in each exercise")
    given = parser.read()
    if given.pack:
        return print("\n".join(pack(given.pack, given.variant)))
    if given.number not in NUMBERS:
        raise UserError("which exercise? python exercises/make.py 1, up to 10")
    print("\n".join(make(given.number)))


if __name__ == "__main__":
    run_command(main)
