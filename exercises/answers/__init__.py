"""Answers that the graders are measured by: one file for each exercise.

    WRONG    what a learner may have done -> {file: {name: body}}; every one must be rejected
    RIGHT    the same for unusual answers that are right; every one must be accepted

Whoever learns alone: these are spoilers, and a pack for a class (make.py --class) leaves them out.
"""

from exercises.cut import ROOT, bodies_of


def changed(file: str, name: str, *changes: tuple[str, str]) -> dict:
    """The real body with some of its text changed: {file: {name: body}}."""
    body = bodies_of((ROOT / file).read_text(encoding="utf-8"), [name])[name]
    for old, new in changes:
        if old not in body:
            raise ValueError(f"{file}: {name} has no {old!r} any more")
        body = body.replace(old, new)
    return {file: {name: body}}
