"""The drawn world: pictures, words and edits that are made, not downloaded.

It stands in for the paper's data (Sec. 4.1), and makes each claim of the paper testable. A scene holds one to three
objects, one to a quarter of the picture. Its facts are of two kinds:

    captioned        shape, colour, size, place, count, relation      what the semantic features must keep
    never captioned  background tint and stripes, exact offset, turn  what only the pixels carry

Some colour × shape pairs are held out: no training picture and no training text has them. Some facts are told in words
alone ("grass is green"). Scene `index` is a pure function of (seed, split, epoch, index), so the order of data is too.

    python data.py                 shape trace, and a few scenes with their words
    python data.py world.png       the same, with a contact sheet of scenes and edits
"""

import math
import random
import sys
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

COLOURS = {  # RGB in [0, 1]; all strongly saturated, so that a background never looks like an object
    "red": (0.88, 0.12, 0.14), "green": (0.10, 0.62, 0.20), "blue": (0.12, 0.28, 0.90),
    "yellow": (0.98, 0.84, 0.08), "purple": (0.58, 0.14, 0.72), "orange": (0.98, 0.50, 0.06),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 4.2, "large": 6.4}  # radius in 32nds of the picture's side
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")  # quarter i: row i // 2, column i % 2
RELATIONS = ("left", "right", "above", "below")
NUMBERS = ("zero", "one", "two", "three")
PLAIN = {"white": (1.0, 1.0, 1.0), "gray": (0.55, 0.55, 0.55), "black": (0.05, 0.05, 0.05)}  # backgrounds with a name
STYLES = {"dark": (0.45, 0.0), "faded": (0.5, 0.5)}  # picture -> scale · picture + shift, in [0, 1]
FACTS = {"grass": "green", "tomato": "red", "sky": "blue", "lemon": "yellow", "grape": "purple", "carrot": "orange",
         "wheel": "circle", "window": "square", "tent": "triangle", "plus": "cross"}  # told in words, never shown
HELD_OUT = {("red", "cross"), ("green", "square"), ("blue", "triangle"), ("yellow", "circle")}
FACT_WORDS = {"size": list(SIZES), "colour": list(COLOURS), "shape": list(SHAPES), "place": list(PLACES)}
PAIRS = [pair for pair in product(COLOURS, SHAPES) if pair not in HELD_OUT]

QUESTION_KINDS = ("colour", "shape", "size", "place", "count", "relation")
PROMPT_KINDS = ("single", "two", "counting", "colours", "position", "binding")  # GenEval's six
EDIT_KINDS = ("add", "adjust", "extract", "replace", "remove", "background", "style", "hybrid", "action")  # ImgEdit's

WORDS = [*COLOURS, *SHAPES, *(shape_s for shape_s in ("circles", "squares", "triangles", "crosses")), *SIZES, *PLACES,
         *RELATIONS, *NUMBERS, *PLAIN, *STYLES, *FACTS, *"""a an and of the is what colour shape size where how many
         objects object are there describe which way from in with to make add extract replace remove move background picture
         shaped like ,""".split()]


@dataclass(frozen=True)
class Object:
    """One thing: captioned facts first, then what only the pixels tell (offset in 32nds of the side, turn in radians).

    A fact left empty is one that nobody said: an object of a request, not of a scene."""

    shape: str
    colour: str = ""
    size: str = ""
    place: int | None = None  # quarter 0 … 3, see PLACES
    offset: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0

    @property
    def facts(self) -> tuple:
        return self.shape, self.colour, self.size, self.place

    def word(self, fact: str) -> str:
        """The word for one of FACT_WORDS's facts; "" where nobody said it."""
        return ("" if self.place is None else PLACES[self.place]) if fact == "place" else getattr(self, fact)


@dataclass(frozen=True)
class Background:
    """A tint (RGB in [0, 1]) under stripes: amplitude, angle (radians), cycles per picture, phase (radians)."""

    tint: tuple[float, float, float]
    amplitude: float = 0.0
    angle: float = 0.0
    cycles: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]  # in reading order of their places
    background: Background
    style: str = ""  # "" or a key of STYLES

    def with_objects(self, objects) -> "Scene":
        return replace(self, objects=tuple(sorted(objects, key=lambda thing: thing.place)))


# ---------------------------------------------------------------- scenes


def random_background(rng: random.Random) -> Background:
    base = rng.uniform(0.68, 0.84)
    return Background(tuple(base + rng.uniform(-0.09, 0.09) for _ in range(3)), rng.uniform(0.06, 0.14),
                      rng.uniform(0, math.pi), rng.uniform(1.0, 2.5), rng.uniform(0, 2 * math.pi))


def random_object(rng: random.Random, place: int, shape: str = "", colour: str = "", pairs=PAIRS) -> Object:
    allowed = [pair for pair in pairs if shape in ("", pair[1]) and colour in ("", pair[0])]
    colour, shape = rng.choice(allowed)
    offset = rng.uniform(-1, 1), rng.uniform(-1, 1)
    return Object(shape, colour, rng.choice(list(SIZES)), place, offset, rng.uniform(-0.25, 0.25))


def random_scene(rng: random.Random, count: int = 0, pairs=PAIRS) -> Scene:
    """`count` objects (0: one to three), no two alike in both shape and colour."""
    count = count or rng.randint(1, 3)
    objects: list[Object] = []
    for place in rng.sample(range(4), count):
        taken = {(thing.colour, thing.shape) for thing in objects}
        objects.append(random_object(rng, place, pairs=[pair for pair in pairs if pair not in taken]))
    return Scene((), random_background(rng)).with_objects(objects)


def repeated_scene(rng: random.Random, count: int, pairs=PAIRS) -> Scene:
    """`count` objects of one shape and colour; sizes and places differ."""
    colour, shape = rng.choice(pairs)
    objects = [random_object(rng, place, shape, colour, pairs) for place in rng.sample(range(4), count)]
    return Scene((), random_background(rng)).with_objects(objects)


# ---------------------------------------------------------------- words


def describe(thing: Object) -> str:
    """The facts that are said: "a large red circle top-left", "a circle"."""
    words = [word for word in map(thing.word, FACT_WORDS) if word]
    return ("an " if words[0] == "orange" else "a ") + " ".join(words)


def caption(scene: Scene) -> str:
    """Every captioned fact, objects in reading order: "a large red circle top-left , a small blue square top-right"."""
    return " , ".join(describe(thing) for thing in scene.objects)


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def name(thing: Object) -> str:
    return f"the {thing.colour} {thing.shape}"


def related(first: Object, second: Object, relation: str) -> bool:
    """Is `first` left of (right of, above, below) `second`? By quarter: same column is neither left nor right."""
    axis = 1 if relation in ("left", "right") else 0
    a, b = (divmod(thing.place, 2)[axis] for thing in (first, second))
    return a < b if relation in ("left", "above") else a > b


def relation_words(relation: str) -> str:
    return f"{relation} of" if relation in ("left", "right") else relation


def labels(thing: Object, things: tuple[Object, ...], asked: str) -> list[str]:
    """Every way to name `thing` that fits it alone among `things` and does not give away what is asked."""
    ways = {("shape",): f"the {thing.shape}", ("colour",): f"the {thing.colour} object", ("colour", "shape"): name(thing),
            ("place",): f"the {PLACES[thing.place]} object"}

    def alone(facts):
        return sum(all(other.word(fact) == thing.word(fact) for fact in facts) for other in things) == 1

    return [label for facts, label in ways.items() if asked not in facts and alone(facts)]


def question(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """One question of `kind` about the scene with its one right answer; None where the scene allows none. The answer to a
    relation gives its reasons first, both places, then the way: "top-left , bottom-right , left above". Two look-ups that
    are learned one by one, and no answer that is right by chance half of the time."""
    things = scene.objects
    if kind == "count":
        if rng.random() < 0.4:
            return "how many objects are there", NUMBERS[len(things)]
        shape = rng.choice(SHAPES) if rng.random() < 0.3 else rng.choice(things).shape
        return f"how many {plural(shape)} are there", NUMBERS[sum(thing.shape == shape for thing in things)]
    named = [(labels(thing, things, "place" if kind == "relation" else kind), thing) for thing in things]
    named = [(rng.choice(ways), thing) for ways, thing in named if ways]
    if kind == "relation" and len(named) > 1:
        (label, first), (other, second) = rng.sample(named, 2)
        way = " ".join(relation for relation in RELATIONS if related(first, second, relation))
        return f"which way is {label} from {other}", f"{first.word('place')} , {second.word('place')} , {way}"
    if kind in FACT_WORDS and named:
        label, thing = rng.choice(named)
        return f"where is {label}" if kind == "place" else f"what {kind} is {label}", thing.word(kind)
    return None


def look_question(scene: Scene) -> tuple[str, str] | None:
    """What an edit may have done to the whole picture; None for one that is as it was."""
    if scene.style:
        return "how is the picture", scene.style
    plain = [word for word, tint in PLAIN.items() if scene.background.tint == tint]
    return ("how is the background", plain[0]) if plain else None


def twin(scene: Scene, rng: random.Random) -> tuple[Scene, str, str, str]:
    """A second scene that differs in one fact of one object, and a question that tells them apart: (scene, question,
    answer for the first, answer for the second). A guess that ignores the picture cannot get both right."""
    index = rng.randrange(len(scene.objects))
    thing = scene.objects[index]
    kind = rng.choice(("colour", "shape", "size"))
    others = [other for other in PAIRS if other != (thing.colour, thing.shape)]
    if kind == "colour":
        changed = replace(thing, colour=rng.choice([c for c, s in others if s == thing.shape]))
    elif kind == "shape":
        changed = replace(thing, shape=rng.choice([s for c, s in others if c == thing.colour]))
    else:
        changed = replace(thing, size="small" if thing.size == "large" else "large")
    second = scene.with_objects([*scene.objects[:index], changed, *scene.objects[index + 1:]])
    text = f"what {kind} is the {PLACES[thing.place]} object"
    return second, text, getattr(thing, kind), getattr(changed, kind)


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: these objects and no others, `relation` holding from the first to the second."""

    kind: str
    text: str
    wanted: tuple[Object, ...]
    scene: Scene  # one scene that fulfils it
    relation: str = ""


def prompt(kind: str, rng: random.Random, pairs=PAIRS) -> Request:
    """A request of one of GenEval's kinds; "full" is the whole caption; "knowledge" needs a fact told in words alone."""
    if kind == "counting":
        scene = repeated_scene(rng, rng.randint(2, 3), pairs)
        colour = scene.objects[0].colour if rng.random() < 0.5 else ""
        wanted = tuple(Object(thing.shape, colour) for thing in scene.objects)
        return Request(kind, f"{NUMBERS[len(wanted)]} {colour} {plural(wanted[0].shape)}".replace("  ", " "), wanted, scene)
    if kind == "full":
        scene = repeated_scene(rng, rng.randint(2, 3), pairs) if rng.random() < 0.15 else random_scene(rng, 0, pairs)
        return Request(kind, caption(scene), scene.objects, scene)
    scene = random_scene(rng, 1 if kind in ("single", "colours", "knowledge") else 2, pairs)
    if kind == "knowledge":
        thing = scene.objects[0]
        word = rng.choice([word for word, value in FACTS.items() if value in thing.facts])
        size, place = thing.size, PLACES[thing.place]
        text = (f"a {size} {thing.shape} in the colour of {word} {place}" if FACTS[word] == thing.colour else
                f"a {size} {thing.colour} object shaped like a {word} {place}")
        return Request(kind, text, scene.objects, scene)
    coloured = kind in ("colours", "binding") or kind == "position" and rng.random() < 0.5
    order = rng.sample(scene.objects, len(scene.objects))
    wanted = tuple(Object(thing.shape, thing.colour if coloured else "") for thing in order)
    if kind == "position":
        relation = rng.choice([relation for relation in RELATIONS if related(*order, relation)])
        text = f"{describe(wanted[0])} {relation_words(relation)} {describe(wanted[1])}"
        return Request(kind, text, wanted, scene, relation)
    return Request(kind, " and ".join(describe(thing) for thing in wanted), wanted, scene)


def fact_text(rng: random.Random) -> tuple[str, str]:
    """Text without a picture: (given words, words to learn)."""
    word = rng.choice(list(FACTS))
    kind = "colour" if FACTS[word] in COLOURS else "shape"
    if rng.random() < 0.3:
        return f"what {kind} is {word}", FACTS[word]
    request = prompt("knowledge", rng)
    return f"describe {request.text}", describe(request.wanted[0])


# ---------------------------------------------------------------- edits


@dataclass(frozen=True)
class Edit:
    kind: str
    instruction: str
    source: Scene
    target: Scene


def edit(kind: str, rng: random.Random, scene: Scene | None = None, pairs=PAIRS) -> Edit:
    """One of ImgEdit's nine kinds with its exact target. The target differs from the source as the words say, no more."""
    scene = scene or random_scene(rng, rng.randint(2, 3) if kind in ("extract", "hybrid", "remove") else 0, pairs)
    things = list(scene.objects)
    thing = rng.choice(things)
    free = [place for place in range(4) if place not in {other.place for other in things}]
    taken = {(other.colour, other.shape) for other in things}
    fresh = [pair for pair in pairs if pair not in taken]

    def swap(changed: Object | None) -> Scene:
        return scene.with_objects([other for other in things if other is not thing] + [changed] * (changed is not None))

    if kind == "add":
        new = random_object(rng, rng.choice(free), pairs=fresh)
        return Edit(kind, f"add {describe(new)}", scene, scene.with_objects([*things, new]))
    if kind == "adjust":
        colours = [colour for colour, shape in fresh if shape == thing.shape]
        if rng.random() < 0.5 and colours:
            colour = rng.choice(colours)
            return Edit(kind, f"make {name(thing)} {colour}", scene, swap(replace(thing, colour=colour)))
        size = "small" if thing.size == "large" else "large"
        return Edit(kind, f"make {name(thing)} {size}", scene, swap(replace(thing, size=size)))
    if kind == "extract":
        return Edit(kind, f"extract {name(thing)}", scene, Scene((thing,), Background(PLAIN["white"])))
    if kind == "replace":
        colour, shape = rng.choice(fresh)
        new = replace(thing, colour=colour, shape=shape)
        return Edit(kind, f"replace {name(thing)} with {describe(Object(shape, colour))}", scene, swap(new))
    if kind == "remove":
        return Edit(kind, f"remove {name(thing)}", scene, swap(None))
    if kind == "background":
        plain = rng.choice(list(PLAIN))
        return Edit(kind, f"make the background {plain}", scene, replace(scene, background=Background(PLAIN[plain])))
    if kind == "style":
        style = rng.choice(list(STYLES))
        return Edit(kind, f"make the picture {style}", scene, replace(scene, style=style))
    if kind == "action":
        place = rng.choice(free)
        return Edit(kind, f"move {name(thing)} to {PLACES[place]}", scene, swap(replace(thing, place=place)))
    if kind == "hybrid":  # one change to an object, one to what is behind it or to another object
        first = edit(rng.choice(("adjust", "remove", "action")), rng, scene, pairs)
        moved = [other for other in first.target.objects if other not in things]
        rest = replace(first.target, objects=tuple(other for other in first.target.objects if other in things))
        second = edit(rng.choice(("background", "adjust")), rng, rest, [pair for pair in pairs if pair not in taken])
        return Edit(kind, f"{first.instruction} and {second.instruction}", scene,
                    second.target.with_objects([*second.target.objects, *moved]))
    raise ValueError(f"unknown kind of edit {kind!r}: one of {', '.join(EDIT_KINDS)}")


def grounding(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """An instruction as a question: what does it change, and into what? "make the red circle blue" -> "top-left , a large
    blue circle top-left". None where the name in it fits two things."""
    change = edit(rng.choice([kind for kind in EDIT_KINDS if kind != "hybrid"]), rng, scene)
    if change.kind in ("background", "style"):
        *_, what, word = change.instruction.split()
        return change.instruction, f"{what} , {word}"
    gone, come = ([thing for thing in one.objects if thing not in other.objects]
                  for one, other in ((scene, change.target), (change.target, scene)))
    if change.kind == "extract":  # the thing that it names is the one that stays
        gone = come = list(change.target.objects)
    if gone and sum(name(other) == name(gone[0]) for other in scene.objects) > 1:
        return None
    return change.instruction, " , ".join([PLACES[(gone or come)[0].place], *map(describe, come)])


# ---------------------------------------------------------------- drawing


def draw(scenes: list[Scene], side: int = 32) -> Tensor:
    """Scenes -> pictures `b 3 H W` in [-1, 1], anti-aliased: a pixel's cover is half minus its signed distance to the edge."""
    unit = side / 32
    slots = max([len(scene.objects) for scene in scenes] + [1])
    numbers = np.zeros((len(scenes), slots, 7), np.float32)  # x, y, cos, sin, radius, shape, used
    colours = np.zeros((len(scenes), slots, 3), np.float32)
    ground = np.array([[*s.background.tint, s.background.amplitude, s.background.angle, s.background.cycles,
                        s.background.phase, *STYLES.get(s.style, (1.0, 0.0))] for s in scenes], np.float32)
    for b, scene in enumerate(scenes):
        for i, thing in enumerate(scene.objects):
            row, column = divmod(thing.place, 2)
            x, y = 8 + 16 * column + thing.offset[0], 8 + 16 * row + thing.offset[1]
            numbers[b, i] = (x * unit, y * unit, math.cos(thing.turn), math.sin(thing.turn),
                             SIZES[thing.size] * unit, SHAPES.index(thing.shape), 1)
            colours[b, i] = COLOURS[thing.colour]

    pixel = np.arange(side, dtype=np.float32) + 0.5
    tint, (amplitude, angle, cycles, phase, scale, shift) = ground[:, :3], ground[:, 3:].T[:, :, None, None]
    along = np.cos(angle) * pixel[None, None, :] + np.sin(angle) * pixel[None, :, None]
    stripes = amplitude * np.sin(2 * np.pi * cycles * along / side + phase)  # b H W
    canvas = tint[:, :, None, None] + stripes[:, None]
    for i in range(slots):
        x, y, cos, sin, radius, shape, used = numbers[:, i].T[:, :, None, None]
        dx, dy = pixel[None, None, :] - x, pixel[None, :, None] - y
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        cover = used * np.clip(0.5 - signed_distance(u, v, radius, shape), 0, 1)
        canvas = canvas + cover[:, None] * (colours[:, i, :, None, None] - canvas)
    canvas = np.clip(scale[:, None] * canvas + shift[:, None], 0, 1)
    return torch.from_numpy(canvas * 2 - 1)


def signed_distance(u, v, radius, shape):
    """Distance in pixels from (u, v) to the edge, negative inside; `shape` indexes SHAPES, all arguments broadcast."""
    bar = 0.36 * radius
    inradius = 0.6 * radius
    a, b = np.abs(u), np.abs(v)
    return np.select([shape == 0, shape == 1, shape == 2], [
        np.hypot(u, v) - radius,
        np.maximum(a, b) - 0.86 * radius,
        np.maximum(v, 0.8660254 * a - 0.5 * v) - inradius,
    ], np.minimum(np.maximum(a - radius, b - bar), np.maximum(b - radius, a - bar)))


# ---------------------------------------------------------------- batches


class DrawnWorld:
    """The five kinds of sample that training asks for, each a pure function of (seed, split, epoch, index).

    `split` is "train" or "test": other seeds, so no scene is in both. Pictures are `b 3 side side` in [-1, 1].
    """

    def __init__(self, side: int = 32, seed: int = 0, split: str = "train", epoch: int = 0):
        self.side, self.key = side, f"{seed}/{split}/{epoch}"

    def rng(self, what: str, index: int) -> random.Random:
        return random.Random(f"{self.key}/{what}/{index}")

    def scene(self, index: int, what: str = "scene") -> Scene:
        rng = self.rng(what, index)
        return repeated_scene(rng, rng.randint(2, 3)) if rng.random() < 0.15 else random_scene(rng)

    def look(self, index: int) -> Scene:
        """The scene; one in four with a plain background or a style, as edits give them."""
        rng, scene = self.rng("look", index), self.scene(index)
        return edit(rng.choice(("background", "style")), rng, scene).target if rng.random() < 0.25 else scene

    def pictures(self, indices) -> Tensor:
        """Pictures alone."""
        return draw([self.look(index) for index in indices], self.side)

    def prompts(self, indices, kind: str = "", captions: float = 0.5, pairs=PAIRS) -> list[Request]:
        """Requests of one kind, or whole captions (a share `captions`) and GenEval's six; `draw` makes their pictures."""
        rngs = [self.rng(f"prompt{kind}", index) for index in indices]
        return [prompt(kind or ("full" if rng.random() < captions else rng.choice(PROMPT_KINDS)), rng, pairs) for rng in rngs]

    def conversations(self, indices) -> tuple[Tensor, list[list[tuple[str, str]]]]:
        """(pictures, one list of (question, answer) each): questions of all kinds, an instruction, the caption last."""
        scenes, talks = [self.look(index) for index in indices], []
        for index, scene in zip(indices, scenes):
            rng = self.rng("talk", index)
            kinds = (*rng.sample(("colour", "shape", "size"), 2), "place", "count", "relation")
            asked = [*(question(scene, kind, rng) for kind in kinds), look_question(scene), grounding(scene, rng)]
            talks.append([pair for pair in asked if pair] + [("describe the picture", caption(scene))])
        return draw(scenes, self.side), talks

    def questions(self, indices, kind: str) -> tuple[list[Scene], list[str], list[str]]:
        """(scenes, questions, answers) of one kind; scenes that allow no such question are passed over."""
        found = []
        for index in indices:
            rng = self.rng(f"question {kind}", index)
            while (asked := question(scene := random_scene(rng), kind, rng)) is None:
                pass
            found.append((scene, *asked))
        return tuple(map(list, zip(*found)))

    def texts(self, indices) -> list[tuple[str, str]]:
        """(given, to learn) without pictures."""
        return [fact_text(self.rng("text", index)) for index in indices]

    def edits(self, indices, kind: str = "") -> list[Edit]:
        """Edits of one kind or of all nine in equal shares; `draw` makes their pictures."""
        rngs = [self.rng(f"edit{kind}", index) for index in indices]
        return [edit(kind or rng.choice(EDIT_KINDS), rng) for rng in rngs]


if __name__ == "__main__":
    world = DrawnWorld()
    images, talks = world.conversations(range(4))
    assert images.shape == (4, 3, 32, 32) and images.abs().max() <= 1
    print("pictures      b 3 H W", tuple(images.shape), f"in [{images.min():.2f}, {images.max():.2f}]")
    for text, answer in talks[0]:
        print(f"question      {text:50} {answer}")
    print("prompt       ", *(request.text for request in world.prompts(range(4))), sep=" | ")
    print("edit         ", *(change.instruction for change in world.edits(range(9))), sep=" | ")
    print("text          given, to learn", world.texts(range(2)))
    if len(sys.argv) > 1:
        from PIL import Image
        changes = [world.edits(range(6), kind) for kind in EDIT_KINDS]
        rows = [draw([e.source for e in row] + [e.target for e in row]) for row in changes]
        sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        Image.fromarray(((sheet + 1) * 127.5).byte().permute(1, 2, 0).numpy()).resize((12 * 96, 9 * 96), 0).save(sys.argv[1])
