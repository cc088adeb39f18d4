"""What is said about the drawn world, and the order in which training sees it.

It stands in for the paper's data (Sec. 4.1), and makes each claim of the paper testable: from one scene (drawing.py)
come a caption, questions with answers, requests to draw, and edits with their exact target (edits.py). Some facts are
told in words alone ("grass is green"). Sample `index` is a pure function of (seed, split, epoch, index), so the order
of data is too. `python data.py data.png` shows some.
"""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parts.words import WordTokenizer
from world.drawing import (COLOURS, FACT_WORDS, HELD_OUT_PAIRS, NUMBERS, PAIRS, PLACES, PLAIN, RELATIONS, SHAPES, SIZES,
                           STYLES, Object, Scene, describe, draw, name, save_sheet)
from world.edits import EDIT_KINDS, Edit, edit
from world.scenes import FACTS, UNTAUGHT, Combination, implied, position, random_scene, related, repeated_scene

QUESTION_KINDS = ("colour", "shape", "size", "place", "count", "relation", "appearance")
PROMPT_KINDS = ("single", "two", "counting", "colours", "position", "binding")  # GenEval's six
DRAWN = (*PROMPT_KINDS, "part", "two", "binding", *["position"] * 3)  # what training draws: the harder the more often
WRITTEN = (*PROMPT_KINDS, "single", "position", "full", *["part"] * 2, *["knowledge"] * 2)  # what it writes out
EDITED = (*EDIT_KINDS, "action", "action", "hybrid", "remove")  # what it edits
MEASURED = {"untaught": (*PROMPT_KINDS, "held_out", "knowledge"), "taught": (*PROMPT_KINDS, "knowledge")}

WORDS = [*COLOURS, *SHAPES, "circles", "squares", "triangles", "crosses", *SIZES, *PLACES,
         *RELATIONS, *NUMBERS, *PLAIN, *STYLES, *FACTS, *"""a an and of the is what colour shape size where how many
         objects object are there describe which way from in with to make add extract replace remove move background
         picture shaped like ,""".split()]
MADE_UP = "blick dax fep gorp kiv lumf mib norp pilk quam rizz sorn tova ulm vek wug yorp zib".split()
WORDS += MADE_UP  # without meaning, see `with_made_up_words`

# ---------------------------------------------------------------- words


def caption(things) -> str:
    """Every captioned fact of these objects: "a large red circle top-left , a small blue square top-right"."""
    return " , ".join(map(describe, things))


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def labels(thing: Object, things: tuple[Object, ...], secret: str) -> list[str]:
    """Every way to name `thing` that fits it alone among `things` and does not give away the fact `secret`."""
    ways = {("shape",): f"the {thing.shape}", ("colour",): f"the {thing.colour} object",
            ("colour", "shape"): name(thing), ("place",): f"the {PLACES[thing.place]} object"}

    def alone(facts):
        return sum(all(other.word(fact) == thing.word(fact) for fact in facts) for other in things) == 1

    return [label for facts, label in ways.items() if secret not in facts and alone(facts)]


def question(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """One question of `kind` about the scene with its one right answer; None where the scene allows none. "appearance"
    asks what an edit may have done to the whole picture: a plain background, a style. The answer to
    a relation gives its reasons first, both places, then the way: "top-left , bottom-right , left above". These are two
    look-ups that are learned one by one, and no answer that is right by chance half of the time."""
    things = scene.objects
    if kind == "appearance":
        plain = [word for word, tint in PLAIN.items() if scene.background.tint == tint]
        if scene.style:
            return "how is the picture", scene.style
        return ("how is the background", plain[0]) if plain else None
    if kind == "count":
        if rng.random() < 0.4:
            return "how many objects are there", NUMBERS[len(things)]
        shape = rng.choice(SHAPES) if rng.random() < 0.3 else rng.choice(things).shape
        return f"how many {plural(shape)} are there", NUMBERS[sum(thing.shape == shape for thing in things)]
    candidates = [(labels(thing, things, "place" if kind == "relation" else kind), thing) for thing in things]
    candidates = [(rng.choice(ways), thing) for ways, thing in candidates if ways]
    if kind == "relation" and len(candidates) > 1:
        (label, first), (other, second) = rng.sample(candidates, 2)
        way = " ".join(relation for relation in RELATIONS if related(first, second, relation))
        return f"which way is {label} from {other}", f"{first.word('place')} , {second.word('place')} , {way}"
    if kind in FACT_WORDS and candidates:
        label, thing = rng.choice(candidates)
        return f"where is {label}" if kind == "place" else f"what {kind} is {label}", thing.word(kind)
    return None


def twin(scene: Scene, rng: random.Random) -> tuple[Scene, str, str, str]:
    """A second scene that differs in one fact of one object, and a question that tells them apart: (scene, question,
    answer for the first, answer for the second). A guess that ignores the picture cannot get both right."""
    index = rng.randrange(len(scene.objects))
    thing = scene.objects[index]
    kind = rng.choice(("colour", "shape", "size"))
    pairs = [pair for pair in PAIRS if pair != (thing.colour, thing.shape)]
    if kind == "colour":
        other = replace(thing, colour=rng.choice([c for c, s in pairs if s == thing.shape]))
    elif kind == "shape":
        other = replace(thing, shape=rng.choice([s for c, s in pairs if c == thing.colour]))
    else:
        other = replace(thing, size="small" if thing.size == "large" else "large")
    second = scene.with_objects([*scene.objects[:index], other, *scene.objects[index + 1:]])
    return second, f"what {kind} is the {PLACES[thing.place]} object", getattr(thing, kind), getattr(other, kind)


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: these objects and no others, `relation` holding from the first to the second."""

    kind: str
    text: str
    wanted: tuple[Object, ...]
    scene: Scene  # one scene that fulfils it
    relation: str = ""
    things: tuple[Object, ...] = ()  # the scene's objects, in the order in which the text names them
    combination: Combination = ()  # by which it is taught or untaught, see scenes.py


NAMED = {  # beside shapes: the facts that a prompt of each kind names, and those that half of them name as well
    "single": ("size place", "colour"), "two": ("size", "place"), "counting": ("", "colour"),
    "colours": ("colour size", "place"), "position": ("", "colour"), "binding": ("colour", "size"),
    "full": ("colour size place", ""), "knowledge": ("colour size place", "")}
NOT_NAMED = {"colour": "", "size": "", "place": None}
WORDINGS = ("", "", "", "", "there {is} ", "a picture of ", "a picture with ", "make ")


def prompt(kind: str, rng: random.Random, pairs=PAIRS, taught: bool = True) -> Request:
    """A request of one of GenEval's kinds; "full" leaves nothing unsaid, "part" any facts; "knowledge" needs a fact
    told in words alone. `taught`: its scene and its words are such as training has; else they may be any."""
    if kind == "counting" or kind == "full" and rng.random() < 0.15:
        scene = repeated_scene(rng, rng.randint(2, 3), pairs, taught)
    else:
        count = {"full": 0, "part": 0, "two": 2, "position": 2, "binding": 2}.get(kind, 1)
        scene = random_scene(rng, count, pairs, taught)
    things = tuple(scene.objects if kind == "counting" else rng.sample(scene.objects, len(scene.objects)))
    always, sometimes = NAMED.get(kind, ("", ""))
    named = [always + " " + sometimes if rng.random() < 0.5 else always] * len(things)
    if kind == "part":
        named = [[fact for fact in NOT_NAMED if rng.random() < 0.5] for _ in things]
    wanted = tuple(replace(thing, **{fact: nothing for fact, nothing in NOT_NAMED.items() if fact not in facts})
                   for thing, facts in zip(things, named))
    first, relation, text = things[0], "", caption(wanted)
    named_in_full = kind != "counting" or wanted[0].colour
    combination = next((one for one in implied(things) if one[0] == kind and named_in_full), ())
    if kind == "counting":
        text = " ".join(word for word in (NUMBERS[len(things)], wanted[0].colour, plural(first.shape)) if word)
    elif kind == "knowledge":
        word = rng.choice([word for word, value in FACTS.items() if value in first.facts])
        by_colour = FACTS[word] == first.colour
        combination = kind, word, first.shape if by_colour else first.colour
        if taught and combination in UNTAUGHT:
            return prompt(kind, rng, pairs)
        hint = f"{first.shape} in the colour of {word}" if by_colour else f"{first.colour} object shaped like a {word}"
        text = f"a {first.size} {hint} {PLACES[first.place]}"
    elif kind == "position":
        relation = rng.choice([relation for relation in RELATIONS if related(*things, relation)])
        combination = position(first.shape, relation, things[1].shape)
        text = (f" {relation} of " if relation in ("left", "right") else f" {relation} ").join(map(describe, wanted))
    elif kind in ("two", "binding", "part"):
        text = rng.choice((" and ", " with ", " , ")).join(map(describe, wanted))
    wording = "" if kind == "full" else rng.choice(WORDINGS).format(**{"is": "are" if len(things) > 1 else "is"})
    return Request(kind, wording + text, wanted, scene, relation, things, combination)


def measured_prompt(kind: str, rng: random.Random, which: str = "untaught") -> Request:
    """`which`: "taught", as in training; "untaught", a combination that no training text has. Of the kind "held_out":
    colour and shape that training never has together."""
    if kind == "held_out":
        return prompt("colours", rng, tuple(sorted(HELD_OUT_PAIRS)), taught=False)
    request = prompt(kind, rng, taught=which == "taught")
    while which == "untaught" and request.combination not in UNTAUGHT:
        request = prompt(kind, rng, taught=False)
    return request


def written_text(rng: random.Random) -> tuple[str, str]:
    """Text without a picture: (given words, words to learn). A fact, or a request and a caption that fulfils it."""
    if rng.random() < 0.15:
        word = rng.choice(list(FACTS))
        return f"what {'colour' if FACTS[word] in COLOURS else 'shape'} is {word}", FACTS[word]
    request = prompt(rng.choice(WRITTEN), rng)
    given, answer = WordTokenizer.request + request.text, caption(request.things)
    return with_made_up_words(given, answer, rng) if rng.random() < 0.4 else (given, answer)


def with_made_up_words(given: str, answer: str, rng: random.Random) -> tuple[str, str]:
    """Made-up words in the place of some facts that both texts name. They can only be copied: the LLM learns to write
    what it is told, not what it has seen together."""
    shared = set(given.split()) & set(answer.split())
    facts = [word for words in FACT_WORDS.values() for word in words if word in shared]
    chosen = rng.sample(facts, rng.randint(min(1, len(facts)), len(facts)))
    new = dict(zip(chosen, rng.sample(MADE_UP, len(chosen))))
    return tuple(" ".join(new.get(word, word) for word in text.split()) for text in (given, answer))


def grounding(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """An instruction as a question: what does it change, and into what? None where a name in it may fit two things, or
    where the scene has no such edit."""
    kind = rng.choice([kind for kind in EDIT_KINDS if kind != "hybrid" or len(scene.objects) > 1])
    alike = len({name(thing) for thing in scene.objects}) < len(scene.objects)
    if alike and kind not in ("add", "background", "style"):
        return None
    try:
        change = edit(kind, rng, scene)
    except ValueError:
        return None
    return change.instruction, change.outcome


def any_scene(rng: random.Random) -> Scene:
    """One in seven with objects that are alike."""
    return repeated_scene(rng, rng.randint(2, 3)) if rng.random() < 0.15 else random_scene(rng)


def dressed(scene: Scene, rng: random.Random) -> Scene:
    """Two in five with a plain background or a style, as edits give them."""
    return edit(rng.choice(("background", "style")), rng, scene).target if rng.random() < 0.4 else scene


# ---------------------------------------------------------------- batches


class DrawnWorld:
    """The five kinds of sample that training asks for, each a pure function of (seed, split, epoch, index).

    `split` is "train" or "test": other seeds, so no scene is in both. Pictures are `b 3 side side` in [-1, 1].
    """

    def __init__(self, side: int = 32, seed: int = 0, split: str = "train", epoch: int = 0):
        self.side, self.key = side, f"{seed}/{split}/{epoch}"

    def rng(self, what: str, index: int) -> random.Random:
        """`what` is part of the seed, not a name: another word there makes other data."""
        return random.Random(f"{self.key}/{what}/{index}")

    def generator(self, what: str, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng(what, index).getrandbits(60))

    def scene(self, index: int, what: str = "scene") -> Scene:
        return any_scene(self.rng(what, index))

    def styled_scene(self, index: int) -> Scene:
        return dressed(self.scene(index), self.rng("look", index))

    def pictures(self, indices) -> Tensor:
        """Pictures alone."""
        return draw([self.styled_scene(index) for index in indices], self.side)

    def prompts(self, indices, kind: str = "", captions: float = 0.5) -> list[Request]:
        """Requests of one kind, or whole captions (a share `captions`) and the kinds of DRAWN; `draw` draws them."""
        def choose(rng):
            return kind or ("full" if rng.random() < captions else rng.choice(DRAWN))
        return [prompt(choose(rng), rng) for rng in (self.rng(f"prompt{kind}", index) for index in indices)]

    def measured_prompts(self, indices, kind: str, which: str = "untaught") -> list[Request]:
        """Requests of one kind, see `measured_prompt`."""
        return [measured_prompt(kind, self.rng(f"{which} {kind}", index), which) for index in indices]

    def conversations(self, indices) -> tuple[Tensor, list[list[tuple[str, str]]]]:
        """(pictures, one list of (question, answer) each): questions of all kinds, an instruction, the caption last."""
        scenes, talks = [self.styled_scene(index) for index in indices], []
        for index, scene in zip(indices, scenes):
            rng = self.rng("talk", index)
            kinds = (*rng.sample(("colour", "shape", "size"), 2), "place", "count", "relation", "appearance")
            pairs = [*(question(scene, kind, rng) for kind in kinds), grounding(scene, rng)]
            talks.append([pair for pair in pairs if pair] + [("describe the picture", caption(scene.objects))])
        return draw(scenes, self.side), talks

    def dialogue_samples(self, indices) -> tuple[Tensor, list[list[tuple[str, str]]], list[tuple[str, str]]]:
        """(pictures, questions and answers about each, and each one's caption), for P1."""
        images, talks = self.conversations(indices)
        return images, [talk[:-1] for talk in talks], [talk[-1] for talk in talks]

    def things(self, indices) -> tuple[Tensor, Tensor, Tensor]:
        """For L_name: each thing's picture `t`, quarter `t`, and which word of each fact is right `t facts`."""
        things = [(b, thing) for b, index in enumerate(indices) for thing in self.scene(index).objects]
        right = [[words.index(thing.word(fact)) for fact, words in FACT_WORDS.items()] for _, thing in things]
        owners, places = zip(*((b, thing.place) for b, thing in things))
        return torch.tensor(owners), torch.tensor(places), torch.tensor(right)

    def text_to_image_samples(self, indices, captions: float = 0.5) -> tuple[list[str], Tensor]:
        """(requests, a share `captions` of them whole, and pictures that fulfil them)."""
        requests = self.prompts(indices, captions=captions)
        return [request.text for request in requests], self.pictures_of([request.scene for request in requests])

    def edit_samples(self, indices, outcomes: float = 0.5) -> tuple[list[str], Tensor, Tensor]:
        """(instructions, a share `outcomes` with what comes of them, pictures before, pictures after)."""
        edits = self.edits(indices)
        complete = [self.rng("told", i).random() < outcomes for i in indices]
        texts = [f"{edit.instruction} {edit.outcome}" if whole else edit.instruction
                 for edit, whole in zip(edits, complete)]
        before, after = ([getattr(edit, side) for edit in edits] for side in ("source", "target"))
        return texts, self.pictures_of(before), self.pictures_of(after)

    def pictures_of(self, scenes: list[Scene]) -> Tensor:
        """`b 3 side side` in [-1, 1], b = 0 for no scenes."""
        return draw(scenes, self.side) if scenes else torch.empty(0, 3, self.side, self.side)

    def questions(self, indices, kind: str) -> tuple[list[Scene], list[str], list[str]]:
        """(scenes, questions, answers) of one kind, as P1 sees them; scenes that allow none are passed over."""
        if kind not in QUESTION_KINDS:
            raise ValueError(f"unknown kind of question {kind!r}: one of {', '.join(QUESTION_KINDS)}")
        samples = []
        for index in indices:
            rng = self.rng(f"question {kind}", index)
            while (pair := question(scene := dressed(any_scene(rng), rng), kind, rng)) is None:
                pass
            samples.append((scene, *pair))
        return tuple(map(list, zip(*samples)))

    def texts(self, indices) -> list[tuple[str, str]]:
        """(given, to learn) without pictures."""
        return [written_text(self.rng("text", index)) for index in indices]

    def edits(self, indices, kind: str = "") -> list[Edit]:
        """Edits of one kind or of all nine, see EDITED; `draw` makes their pictures."""
        rngs = [self.rng(f"edit{kind}", index) for index in indices]
        return [edit(kind or rng.choice(EDITED), rng) for rng in rngs]


def show_samples(path: str = "") -> None:
    """A few samples in words; with a `path`, a sheet of scenes and of edits, before and after."""
    world = DrawnWorld()
    images, talks = world.conversations(range(4))
    assert images.shape == (4, 3, 32, 32) and images.abs().max() <= 1
    for text, answer in talks[0]:
        print(f"question      {text:50} {answer}")
    print("prompt       ", *(request.text for request in world.prompts(range(4))), sep=" | ")
    print("edit         ", *(change.instruction for change in world.edits(range(9))), sep=" | ")
    print("text          given, to learn", world.texts(range(2)))
    if path:
        rows = [world.pictures(range(12)), world.pictures(range(12, 24))]
        rows += [draw([scene for edit in world.edits(range(6), kind) for scene in (edit.source, edit.target)])
                 for kind in EDIT_KINDS]
        save_sheet(rows, path)
        kinds = ", ".join(EDIT_KINDS)
        print(f"{path}: two rows of scenes, then a row of each kind of edit ({kinds}), before and after")
