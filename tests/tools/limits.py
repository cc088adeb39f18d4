"""What bounds the figures of a run: the judge, on what the tokenizer makes of exact targets, and the LLM, on what it
writes out before it is drawn.

    python -m tests.tools.limits runs/toy
"""

import re
import sys
from collections import Counter
from pathlib import Path

import torch

from evaluate import Protocol
from plumbing.run_folder import load_run
from spar import SPAR
from tests.claims.test_judge import SIDE_EFFECTS, ghosts_passing, passing
from world.drawing import FACT_WORDS, PLACES, PLAIN, Object, draw
from world.edits import EDIT_KINDS, Edit
from world.judge import detect, fulfils, succeeds
from world.language import MEASURED, QUESTION_KINDS, DrawnWorld

COUNT = 200


def look(edit: Edit) -> str:
    """What is behind the objects of an edit's target."""
    plain = [word for word, tint in PLAIN.items() if tint == edit.target.background.tint]
    return edit.target.style or (plain or ["striped"])[0]


def targets(model: SPAR, world: DrawnWorld) -> dict[str, list[list[bool]]]:
    """Look -> of each edit whether its exact target succeeds, and its target as the tokenizer reconstructs it."""
    verdicts: dict[str, list] = {}
    for kind in EDIT_KINDS:
        edits = world.edits(range(COUNT), kind)
        exact = draw([edit.target for edit in edits], world.side)
        for edit, *pictures in zip(edits, exact, model.reconstruct(exact)):
            verdicts.setdefault(look(edit), []).append([succeeds(edit, picture[None])[0] for picture in pictures])
    return verdicts


def objects_said(text: str) -> list[Object]:
    """The objects of a caption; what is none is one that nobody asked for."""
    parts = [re.fullmatch(r"an? (\w+) (\w+) (\w+) (\S+)", part) for part in text.split(" , ")]
    return [Object(part[3], part[2], part[1], PLACES.index(part[4])) if part and part[4] in PLACES else Object("?")
            for part in parts]


def written(model: SPAR, world: DrawnWorld, which: str) -> dict[str, float]:
    """Kind -> share of the prompts that what the LLM writes out fulfils."""
    shares = {}
    for kind in MEASURED[which]:
        requests = world.measured_prompts(range(COUNT), kind, which)
        captions = model.rewrite([request.text for request in requests])
        shares[kind] = sum(fulfils(objects_said(text), request) for text, request in zip(captions, requests)) / COUNT
    return shares


def opacity_after(model: SPAR, world: DrawnWorld, opacity: float) -> float:
    """With which opacity objects that were drawn with this one come out of the tokenizer, on average."""
    scenes = [request.scene for request in world.prompts(range(COUNT))]
    ground, whole = draw([scene.with_objects(()) for scene in scenes]), draw(scenes)
    things = whole - ground
    out = model.reconstruct(ground + opacity * things) - ground
    return ((out * things).sum((1, 2, 3)) / things.square().sum((1, 2, 3))).mean().item()


def drawn_instead(model: SPAR, world: DrawnWorld, kind: str, which: str) -> Counter:
    """For prompts of one object, drawn directly: what the picture has wrong of what was asked, and how often."""
    requests = world.measured_prompts(range(COUNT), kind, which)
    verdicts = Counter()
    for seen, request in zip(detect(model.generate([request.text for request in requests])[0]), requests):
        wrong = ["number"]
        if len(seen) == len(request.wanted) == 1:
            (thing,), (wanted,) = seen, request.wanted
            wrong = [fact for fact in FACT_WORDS if wanted.word(fact) not in ("", thing.word(fact))]
        verdicts["right" if fulfils(seen, request) else "+".join(wrong) or "unclear"] += 1
    return verdicts


def blind(world: DrawnWorld, kind: str, others: int = 5000) -> float:
    """Share of an evaluation's questions that are answered right without the picture: by the answer that the same
    question, or else the same kind, has most often with `others` pictures more."""
    count = Protocol().count
    _, questions, answers = world.questions(range(count + others), kind)
    often = {}
    for question, answer in zip(questions[count:], answers[count:]):
        often.setdefault(question, Counter())[answer] += 1
    of_kind = Counter(answers[count:]).most_common(1)[0][0]
    said = [often[question].most_common(1)[0][0] if question in often else of_kind for question in questions[:count]]
    return sum(map(str.__eq__, said, answers)) / count


def main(run: Path) -> None:
    model = load_run(run)
    world = DrawnWorld(model.config.side, model.config.seed, "test")
    shares = {kind: blind(world, kind) for kind in QUESTION_KINDS}
    print("share of questions answered right without the picture (no twins can be):",
          ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items()),
          f"overall {sum(shares.values()) / len(shares):.3f}")
    print("share of edits' targets that the judge passes: look, exact, reconstructed")
    for name, verdicts in targets(model, world).items():
        exact, reconstructed = torch.tensor(verdicts).float().mean(0).tolist()
        print(f"    {name:10} {len(verdicts):5} {exact:7.3f} {reconstructed:7.3f}")
    print("share of edits with a side effect that it passes all the same, reconstructed:",
          ", ".join(f"{fault} {size} {passing(fault, size, model.reconstruct):.3f}" for fault, size in SIDE_EFFECTS))
    print("objects drawn with an opacity, the one that the tokenizer gives them, share of prompts that they pass:",
          ", ".join(f"{opacity} {opacity_after(model, world, opacity):.2f} "
                    f"{ghosts_passing(opacity, model.reconstruct):.3f}" for opacity in (0.3, 0.5, 0.7, 1.0)))
    for which in MEASURED:
        print(f"share of {which} prompts that what the LLM writes out fulfils:",
              ", ".join(f"{kind} {share:.3f}" for kind, share in written(model, world, which).items()))
    for which in MEASURED:
        for kind in ("single", "colours"):
            wrong = drawn_instead(model, world, kind, which).most_common()
            print(f"{which} {kind}, drawn directly, what is wrong of it:", ", ".join(f"{a} {n}" for a, n in wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
