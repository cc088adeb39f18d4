"""Every edit's target differs from its source exactly as its words say, in the objects and in the pixels."""

import re
from dataclasses import replace

import pytest
import torch

from world.language import EDIT_KINDS, EDITED, DrawnWorld
from world.drawing import COLOURS, HELD_OUT_PAIRS, PLACES, PLAIN, SHAPES, SIZES, STYLES, Background, Object, draw

COUNT = 300
FIRST_WORDS = {"add": "add", "adjust": "make the", "extract": "extract", "replace": "replace", "remove": "remove",
               "background": "make the background", "style": "make the picture", "action": "move"}


def follow(instruction, scene):
    """The scene that the words ask for, read without world/language.py's own writing."""
    if " and " in instruction:
        for part in instruction.split(" and "):
            scene = follow(part, scene)
        return scene
    if found := re.fullmatch(r"make the background (\w+)", instruction):
        return replace(scene, background=Background(PLAIN[found[1]]))
    if found := re.fullmatch(r"make the picture (\w+)", instruction):
        assert found[1] in STYLES and found[1] != scene.style
        return replace(scene, style=found[1])
    if found := re.fullmatch(r"add an? (\w+) (\w+) (\w+) (\S+)", instruction):
        size, colour, shape, place = found.groups()
        return scene.with_objects([*scene.objects, Object(shape, colour, size, PLACES.index(place))])
    colour, shape, rest = re.fullmatch(r"\w+ the (\w+) (\w+)(.*)", instruction).groups()
    thing, = [t for t in scene.objects if (t.colour, t.shape) == (colour, shape)]  # the name fits one object alone
    others = [t for t in scene.objects if t is not thing]
    verb, words = instruction.split()[0], rest.split()
    if verb == "extract":
        return replace(scene, objects=(thing,), background=Background(PLAIN["white"]))
    if verb == "remove":
        return scene.with_objects(others)
    if verb == "move":
        assert words[0] == "to"
        return scene.with_objects([*others, replace(thing, place=PLACES.index(words[1]))])
    if verb == "replace":
        assert words[0] == "with" and words[1] == ("an" if words[2] == "orange" else "a")
        return scene.with_objects([*others, replace(thing, colour=words[2], shape=words[3])])
    assert verb == "make" and len(words) == 1
    return scene.with_objects([*others, replace(thing, **{"size" if words[0] in SIZES else "colour": words[0]})])


def unsaid(scene, kept):
    """Without the offset and turn of the objects that `kept` does not have."""
    return scene.with_objects(t if t in kept else replace(t, offset=(0.0, 0.0), turn=0.0) for t in scene.objects)


def changes(change):
    """(objects that only the source has, objects that only the target has)"""
    source, target = change.source.objects, change.target.objects
    return [t for t in source if t not in target], [t for t in target if t not in source]


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_the_target_is_what_the_words_ask_for(kind):
    for change in DrawnWorld().edits(range(COUNT), kind):
        parts = change.instruction.split(" and ")
        assert change.kind == kind and len(parts) == (2 if kind == "hybrid" else 1)
        assert kind == "hybrid" or change.instruction.startswith(FIRST_WORDS[kind])
        wanted = follow(change.instruction, change.source)
        kept = change.source.objects if kind == "add" else change.target.objects
        assert unsaid(change.target, kept) == wanted, change.instruction


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_the_objects_that_differ_are_those_of_the_kind(kind):
    numbers, differing = set(), set()
    for change in DrawnWorld().edits(range(COUNT), kind):
        lost, gained = changes(change)
        numbers.add((len(lost), len(gained)))
        if kind in ("adjust", "replace", "action"):
            (a,), (b,) = lost, gained
            differing |= {key for key in ("shape", "colour", "size", "place") if getattr(a, key) != getattr(b, key)}
            assert (a.offset, a.turn) == (b.offset, b.turn)
        if kind in ("add", "action"):
            assert gained[0].place not in {t.place for t in change.source.objects}
        assert kind in ("background", "extract", "hybrid") or change.source.background == change.target.background
        assert (change.source.style == change.target.style) == (kind != "style")
    facts = {"adjust": {"colour", "size"}, "replace": {"colour", "shape"}, "action": {"place"}}
    assert differing == facts.get(kind, set())
    assert numbers == {"add": {(0, 1)}, "adjust": {(1, 1)}, "replace": {(1, 1)}, "action": {(1, 1)}, "remove": {(1, 0)},
                       "background": {(0, 0)}, "style": {(0, 0)}, "extract": {(1, 0), (2, 0)},
                       "hybrid": {(1, 1), (1, 0), (2, 2), (2, 1)}}[kind]


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_the_pixels_that_differ_lie_where_the_edit_is(kind):
    edits = DrawnWorld().edits(range(COUNT), kind)
    differences = (draw([e.source for e in edits]) - draw([e.target for e in edits])).abs().amax(1)
    for change, difference in zip(edits, differences):
        places = {thing.place for things in changes(change) for thing in things}
        everywhere = change.source.background != change.target.background or change.source.style != change.target.style
        for row, column, place in ((0, 0, 0), (0, 16, 1), (16, 0, 2), (16, 16, 3)):
            quarter = difference[row:row + 16, column:column + 16]
            if everywhere:
                assert (quarter > 0.01).float().mean() > 0.4  # all but the inside of a large object
            elif place in places:
                assert quarter.max() > 0.2  # no edit is a no-op
        if not everywhere:
            drawn = torch.stack([disc(thing) for things in changes(change) for thing in things]).any(0)
            assert (difference * ~drawn).max() == 0, change.instruction


def disc(thing):
    """The pixels that an object can touch, `32 32`: none lies further from its middle than a triangle's soft corner."""
    row, column = divmod(thing.place, 2)
    x, y = 8 + 16 * column + thing.offset[0], 8 + 16 * row + thing.offset[1]
    pixel = torch.arange(32) + 0.5
    return (pixel[None, :] - x) ** 2 + (pixel[:, None] - y) ** 2 < (1.2 * SIZES[thing.size] + 1.01) ** 2


def test_all_nine_kinds_come_as_often_as_training_asks_for_them():
    kinds, each = [change.kind for change in DrawnWorld().edits(range(3900))], 3900 / len(EDITED)
    assert set(kinds) == set(EDITED) == set(EDIT_KINDS)
    assert all(kinds.count(kind) == pytest.approx(each * EDITED.count(kind), rel=0.2) for kind in EDIT_KINDS)


def test_every_value_can_be_asked_for_and_objects_stay_inside_the_world():
    edits = [change for kind in EDIT_KINDS for change in DrawnWorld(split="test").edits(range(COUNT), kind)]
    words = {word for change in edits for word in change.instruction.split()}
    assert words >= {*COLOURS, *SHAPES, *SIZES, *PLACES, *PLAIN, *STYLES}
    for scene in [scene for change in edits for scene in (change.source, change.target)]:
        places = [thing.place for thing in scene.objects]
        assert places == sorted(set(places)) and 1 <= len(places) <= 3
        assert not {(t.colour, t.shape) for t in scene.objects} & HELD_OUT_PAIRS
