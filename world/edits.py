"""Edits of the drawn world: an instruction, the scene before it and the scene that it asks for."""

import random
from dataclasses import dataclass, replace

from world.drawing import PAIRS, PLACES, PLAIN, STYLES, Background, Object, Scene, describe, name
from world.scenes import may_be_shown, options, random_scene, somewhere

EDIT_KINDS = ("add", "adjust", "extract", "replace", "remove", "background", "style", "hybrid", "action")  # ImgEdit's


@dataclass(frozen=True)
class Edit:
    kind: str
    instruction: str
    source: Scene
    target: Scene
    outcome: str  # what it changes, and into what: "top-left , a large blue circle top-left"


def edit(kind: str, rng: random.Random, scene: Scene | None = None) -> Edit:
    """One of ImgEdit's nine kinds with its exact target, which training may show too. The target differs from the
    source as the words say, no more. Raises ValueError for another kind, for a hybrid of a scene with one object, and
    where a given scene has no such edit."""
    for _ in range(100):
        few, many = {"add": (1, 2), "extract": (2, 3), "hybrid": (2, 3), "remove": (2, 3)}.get(kind, (1, 3))
        source = scene or random_scene(rng, rng.randint(few, many))
        change = proposed(kind, rng, source)
        if change and len(change.target.objects) <= 3 and may_be_shown(change.target.objects):
            return change
    raise ValueError(f"no edit {kind!r} of {len(source.objects)} objects: kinds are {', '.join(EDIT_KINDS)}; "
                     "a hybrid needs two objects")


def proposed(kind: str, rng: random.Random, scene: Scene, pairs=PAIRS) -> Edit | None:
    thing = rng.choice(scene.objects)
    if kind in ("add", "adjust", "replace", "remove", "action"):
        return object_edit(kind, rng, scene, thing, pairs)
    if kind in ("extract", "background", "style"):
        return picture_edit(kind, rng, scene, thing)
    return hybrid_edit(rng, scene, pairs) if kind == "hybrid" and len(scene.objects) > 1 else None


def object_edit(kind: str, rng: random.Random, scene: Scene, thing: Object, pairs) -> Edit:
    """An object more, an object less, or another in the place of `thing`."""
    free = [place for place in range(4) if place not in {other.place for other in scene.objects}]
    fresh = unused_pairs(scene, pairs)
    if kind == "add":
        things = options(rng.choice(free), tuple(PAIRS), True)
        new = somewhere(rng, rng.choice([thing for thing in things if (thing.colour, thing.shape) in fresh]))
        return Edit(kind, f"add {describe(new)}", scene, scene.with_objects([*scene.objects, new]),
                    f"{PLACES[new.place]} , {describe(new)}")
    others, place = [other for other in scene.objects if other is not thing], PLACES[thing.place]
    if kind == "remove":
        return Edit(kind, f"remove {name(thing)}", scene, scene.with_objects(others), place)
    instruction, new = variant(kind, rng, thing, fresh, free)
    return Edit(kind, instruction, scene, scene.with_objects([*others, new]), f"{place} , {describe(new)}")


def variant(kind: str, rng: random.Random, thing: Object, fresh: list, free: list[int]) -> tuple[str, Object]:
    """(instruction, what `thing` becomes). `fresh`: pairs of colour and shape to choose from; `free`: quarters."""
    if kind == "action":
        place = rng.choice(free)
        return f"move {name(thing)} to {PLACES[place]}", replace(thing, place=place)
    if kind == "replace":
        colour, shape = rng.choice(fresh)
        instruction = f"replace {name(thing)} with {describe(Object(shape, colour))}"
        return instruction, replace(thing, colour=colour, shape=shape)
    colours = [colour for colour, shape in fresh if shape == thing.shape]
    if rng.random() < 0.5 and colours:
        colour = rng.choice(colours)
        return f"make {name(thing)} {colour}", replace(thing, colour=colour)
    size = "small" if thing.size == "large" else "large"
    return f"make {name(thing)} {size}", replace(thing, size=size)


def picture_edit(kind: str, rng: random.Random, scene: Scene, thing: Object) -> Edit:
    """What is behind the objects, the style of the whole picture, or `thing` alone on white."""
    if kind == "extract":
        return Edit(kind, f"extract {name(thing)}", scene, Scene((thing,), Background(PLAIN["white"])),
                    f"{PLACES[thing.place]} , {describe(thing)}")
    word = rng.choice(list(PLAIN if kind == "background" else STYLES))
    if kind == "background":
        target = replace(scene, background=Background(PLAIN[word]))
        return Edit(kind, f"make the background {word}", scene, target, f"background , {word}")
    return Edit(kind, f"make the picture {word}", scene, replace(scene, style=word), f"picture , {word}")


def hybrid_edit(rng: random.Random, scene: Scene, pairs) -> Edit:
    """One change to an object, then one to what is behind it or to another object: the second is offered neither the
    object that the first has changed nor a pair of colour and shape that the scene had."""
    first = proposed(rng.choice(("adjust", "remove", "action")), rng, scene, pairs)
    new = [thing for thing in first.target.objects if thing not in scene.objects]
    rest = replace(first.target, objects=tuple(thing for thing in first.target.objects if thing in scene.objects))
    second = proposed(rng.choice(("background", "adjust")), rng, rest, unused_pairs(scene, pairs))
    return Edit("hybrid", f"{first.instruction} and {second.instruction}", scene,
                second.target.with_objects([*second.target.objects, *new]), f"{first.outcome} and {second.outcome}")


def unused_pairs(scene: Scene, pairs) -> list[tuple[str, str]]:
    """Those of `pairs` (colour, shape) that no object of the scene has."""
    return [pair for pair in pairs if pair not in {(thing.colour, thing.shape) for thing in scene.objects}]
