"""Scenes at random, and what no training text says.

Of each kind of prompt one combination in five is untaught, chosen by a hash. It is held out by what the words mean, not
by their wording: no training scene shows it, so no caption, question, request or outcome of an edit can imply it.

    single      size, shape, place                two        size and shape of two things, in any order
    colours     size, colour, shape               binding    colour and shape of two things, in any order
    counting    number, colour, shape             position   shape, left of or above, shape
    knowledge   a word that is told alone ("grass"), and the colour or shape that it comes with

    python -m world.scenes                 how many of each kind are untaught, and what is left to training
"""

import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import combinations, product

from world.drawing import FACT_WORDS, NUMBERS, PAIRS, PLACES, SIZES, Background, Object, Scene

Combination = tuple[str, ...]  # kind, then its words
FACTS = {"grass": "green", "tomato": "red", "sky": "blue", "lemon": "yellow", "grape": "purple", "carrot": "orange",
         "wheel": "circle", "window": "square", "tent": "triangle", "plus": "cross"}  # told in words, never shown

# ---------------------------------------------------------------- combinations


def unordered(kind: str, *things: str) -> Combination:
    return kind, *sorted(things)


def related(first: Object, second: Object, relation: str) -> bool:
    """Is `first` left of (right of, above, below) `second`? By quarter: same column is neither left nor right."""
    axis = 1 if relation in ("left", "right") else 0
    a, b = (divmod(thing.place, 2)[axis] for thing in (first, second))
    return a < b if relation in ("left", "above") else a > b


def position(first: str, relation: str, second: str) -> Combination:
    """Of two shapes; "right of" and "below" are the same the other way round."""
    if relation in ("right", "below"):
        first, relation, second = second, {"right": "left", "below": "above"}[relation], first
    return "position", first, relation, second


def pair_combinations(a: Object, b: Object) -> list[Combination]:
    """Of two things in one picture; things of one name are not two but counted."""
    ways = [("two", f"{a.size} {a.shape}", f"{b.size} {b.shape}"),
            ("binding", f"{a.colour} {a.shape}", f"{b.colour} {b.shape}")]
    named = [unordered(*way) for way in ways if way[1] != way[2]]
    return named + [position(first.shape, relation, second.shape) for first, second in ((a, b), (b, a))
                    for relation in ("left", "above") if a.shape != b.shape and related(first, second, relation)]


def implied(things) -> set[Combination]:
    """Every combination that holds in a picture of these objects, all their facts known."""
    singles = {("single", t.size, t.shape, PLACES[t.place]) for t in things}
    colours = {("colours", t.size, t.colour, t.shape) for t in things}
    pairs = {one for pair in combinations(things, 2) for one in pair_combinations(*pair)}
    counts = Counter((t.colour, t.shape) for t in things)
    return singles | colours | pairs | {("counting", NUMBERS[n], *alike) for alike, n in counts.items() if n > 1}


def all_combinations() -> dict[str, list[Combination]]:
    """Kind -> its combinations, taught or not."""
    things = [Object(shape, colour, size, place) for colour, shape in PAIRS for size in SIZES for place in range(4)]
    every = set().union(*(implied([thing]) for thing in things),
                        *(pair_combinations(*pair) for pair in combinations(things, 2)))
    every |= {("counting", number, colour, shape) for number in NUMBERS[2:] for colour, shape in PAIRS}
    every |= {("knowledge", word, other) for word, value in FACTS.items() for pair in PAIRS if value in pair
              for other in pair if other != value}
    return {kind: sorted(one for one in every if one[0] == kind) for kind in sorted({one[0] for one in every})}


def parts(combination: Combination) -> list[tuple]:
    """Of a pair each of the two, of three words any two of them with their places."""
    words = combination[1:]
    return list(words) if combination[0] in ("two", "binding") else list(combinations(enumerate(words), len(words) - 1))


def one_in_five(every: list[Combination]) -> list[Combination]:
    """In the order of a hash; of those that share a part at most a third, so that each word is taught with each."""
    sharing, taken, chosen = Counter(part for one in every for part in parts(one)), Counter(), []
    for one in sorted(every, key=lambda words: sha256(" ".join(words).encode()).digest()):
        if len(chosen) < len(every) // 5 and all(taken[part] < math.ceil(sharing[part] / 3) for part in parts(one)):
            chosen.append(one)
            taken.update(parts(one))
    return chosen


UNTAUGHT = frozenset(one for every in all_combinations().values() for one in one_in_five(every))


def may_be_shown(things) -> bool:
    """Whether training may have a picture of these objects."""
    return UNTAUGHT.isdisjoint(implied(things))


@cache
def options(place: int, pairs: tuple, taught: bool) -> list[Object]:
    """Every object that may stand there."""
    things = [Object(shape, colour, size, place) for (colour, shape), size in product(pairs, SIZES)]
    return [thing for thing in things if not taught or may_be_shown([thing])]


@cache
def may_meet(a: Object, b: Object) -> bool:
    return UNTAUGHT.isdisjoint(pair_combinations(a, b))


# ---------------------------------------------------------------- at random


def random_background(rng: random.Random) -> Background:
    base = rng.uniform(0.68, 0.84)
    return Background(tuple(base + rng.uniform(-0.09, 0.09) for _ in range(3)), rng.uniform(0.06, 0.14),
                      rng.uniform(0, math.pi), rng.uniform(1.0, 2.5), rng.uniform(0, 2 * math.pi))


def somewhere(rng: random.Random, thing: Object) -> Object:
    """The object at a random offset and turn."""
    offset = rng.uniform(-1, 1), rng.uniform(-1, 1)
    return replace(thing, offset=offset, turn=rng.uniform(-0.25, 0.25))


def random_scene(rng: random.Random, count: int = 0, pairs=PAIRS, taught: bool = True) -> Scene:
    """`count` objects (0: one to three), no two alike in both shape and colour. `taught`: training may have it."""
    count = count or rng.randint(1, 3)
    return Scene((), random_background(rng)).with_objects(some_objects(rng, rng.sample(range(4), count), pairs, taught))


def some_objects(rng: random.Random, places: list[int], pairs, taught: bool, alike: bool = False) -> list[Object]:
    """One to each place: all `alike` in shape and colour, or no two of them."""
    plain: list[Object] = []  # without offset and turn
    while len(plain) < len(places):
        fitting = [thing for thing in options(places[len(plain)], tuple(pairs), taught) if all(
            ((thing.colour, thing.shape) == (other.colour, other.shape)) == alike
            and (not taught or may_meet(other, thing)) for other in plain)]
        plain = [*plain, rng.choice(fitting)] if fitting else []
        if alike and taught and len(plain) == len(places) and not may_be_shown(plain):  # their number
            plain = []
    return [somewhere(rng, thing) for thing in plain]


def repeated_scene(rng: random.Random, count: int, pairs=PAIRS, taught: bool = True) -> Scene:
    """`count` objects of one shape and colour; sizes and places differ."""
    things = some_objects(rng, rng.sample(range(4), count), pairs, taught, alike=True)
    return Scene((), random_background(rng)).with_objects(things)


if __name__ == "__main__":
    for kind, every in all_combinations().items():
        hidden = [" ".join(one[1:]) for one in every if one in UNTAUGHT]
        print(f"{kind:9} {len(hidden):3} of {len(every):3} untaught: {', '.join(hidden[:4])}, …")
    print("objects that training has, of 40 to a place:", *(len(options(i, tuple(PAIRS), True)) for i in range(4)))
    seen = Counter(thing.word(fact) for i in range(2000) for thing in random_scene(random.Random(i)).objects
                   for fact in FACT_WORDS)
    print("in 2000 scenes:", dict(seen))
