"""The judge reads clean drawings without error, and errs where, and only where, an object is wrong."""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from parts.metrics import psnr
from world import drawing
from world.language import EDIT_KINDS, PROMPT_KINDS, DrawnWorld, Request, prompt
from world.judge import clean_accuracy, detect, fulfils, succeeds
from world.drawing import COLOURS, HELD_OUT_PAIRS, PLAIN, SHAPES, SIZES, STYLES, Background, Object, Scene, draw

GROUND = Background((0.8, 0.75, 0.8), 0.08, 0.4, 2.0)
CIRCLE, SQUARE = Object("circle", "red", "large", 0), Object("square", "blue", "small", 3)
SCENE = Scene((CIRCLE, SQUARE), GROUND)
FULL = Request("full", "", SCENE.objects, SCENE)
FAULTS = {
    "colour": [replace(CIRCLE, colour="purple"), SQUARE], "shape": [replace(CIRCLE, shape="square"), SQUARE],
    "size": [replace(CIRCLE, size="small"), SQUARE], "place": [replace(CIRCLE, place=2), SQUARE],
    "an object too many": [CIRCLE, replace(CIRCLE, place=1), SQUARE], "an object missing": [SQUARE],
    "colours swapped": [replace(CIRCLE, colour="blue"), replace(SQUARE, colour="red")], "nothing there": [],
}


def see(*objects):
    return detect(draw([Scene((), GROUND).with_objects(objects)]))[0]


def paint(mask, colour):
    """A grey picture with `mask` `32 32` painted in one colour."""
    return torch.where(mask, torch.tensor(colour)[:, None, None] * 2 - 1, torch.full((1, 3, 32, 32), 0.6))


def blur(images, sigma):
    kernel = torch.exp(-torch.arange(-3, 4.0) ** 2 / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(images, (3,) * 4, mode="replicate"), kernel, groups=3)


def worn(images):
    """As a tokenizer of 30 dB gives them back: blurred, with noise, coarse spots and a cast as strong as the
    contrast."""
    generator = torch.Generator().manual_seed(0)
    noise, spots, cast = (torch.randn(len(images), 3, side, side, generator=generator) for side in (32, 8, 1))
    wear = 0.03 * noise + 0.04 * F.interpolate(spots, size=32, mode="bilinear") + 0.015 * cast
    return blur(images, 0.6) + 3 * images.std((1, 2, 3), keepdim=True) * wear


def share(verdicts):
    return sum(verdicts) / len(verdicts)


def faded(scene, ghosts, opacity):
    """The scene's picture, with those objects of it that are `ghosts` at this opacity."""
    without = draw([scene.with_objects(thing for thing in scene.objects if thing not in ghosts)])
    return without + opacity * (draw([scene]) - without)


@pytest.mark.parametrize("side", (32, 64))
def test_clean_drawings_are_read_without_error(side):
    accuracy = clean_accuracy(300, side)
    assert set(accuracy) == {"found", "shape", "colour", "size", "all"} and min(accuracy.values()) >= 0.999


def test_held_out_pairs_and_edited_looks_are_read_without_error():
    world = DrawnWorld(split="test")
    scenes = [prompt("full", world.rng("full", i), tuple(HELD_OUT_PAIRS), taught=False).scene for i in range(150)]
    for ground in PLAIN.values():
        scenes += [replace(scene, background=Background(ground)) for scene in scenes[:50]]
    for style in ("", *STYLES):
        seen = detect(draw([replace(scene, style=style) for scene in scenes]), style)
        right = [{t.facts for t in a} == {t.facts for t in s.objects} for a, s in zip(seen, scenes)]
        assert sum(right) / len(right) >= 0.99


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_and_judged_false(fault):
    wanted, seen = {t.facts for t in SCENE.objects}, see(*FAULTS[fault])
    assert {t.facts for t in see(*SCENE.objects)} == wanted and fulfils(see(*SCENE.objects), FULL)
    assert sorted(t.facts for t in seen) == sorted(t.facts for t in FAULTS[fault]) and not fulfils(seen, FULL)


def test_what_was_not_said_may_be_anything():
    request = Request("single", "a circle", (Object("circle"),), SCENE)
    for thing in (CIRCLE, Object("circle", "green", "small", 2), Object("circle", "orange", "large", 3)):
        assert fulfils(see(thing), request)
    assert not fulfils(see(SQUARE), request)
    assert not fulfils(see(CIRCLE, SQUARE), request) and not fulfils(see(CIRCLE, replace(CIRCLE, place=3)), request)
    assert fulfils(see(SQUARE, CIRCLE), Request("two", "", (Object("square"), Object("circle")), SCENE))


@pytest.mark.parametrize("relation, places", [("left", (0, 3)), ("right", (3, 2)), ("above", (1, 3)),
                                              ("below", (2, 0))])
def test_a_relation_is_demanded_of_the_two_objects_in_their_order(relation, places):
    request = Request("position", "", (Object("circle"), Object("square", "blue")), SCENE, relation)
    a, b = (replace(thing, place=place) for thing, place in zip((CIRCLE, SQUARE), places))
    assert fulfils(see(a, b), request)
    assert not fulfils(see(replace(a, place=b.place), replace(b, place=a.place)), request)
    aside = {"left": (0, 2), "right": (1, 3), "above": (0, 1), "below": (2, 3)}[relation]  # level: neither way
    assert not fulfils(see(replace(a, place=aside[0]), replace(b, place=aside[1])), request)


@pytest.mark.parametrize("kind", (*PROMPT_KINDS, "full", "knowledge"))
def test_a_request_is_fulfilled_by_its_scene_and_mostly_not_by_anothers(kind):
    requests = DrawnWorld().prompts(range(200), kind)
    seen = detect(draw([r.scene for r in requests]))
    assert all(fulfils(a, r) for a, r in zip(seen, requests))
    others = sum(fulfils(a, r) for a, r in zip(seen[1:] + seen[:1], requests)) / len(requests)
    assert others < (0.35 if kind == "single" else 0.15)  # "a circle": every fourth scene of one object has it


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_succeeds_with_its_target_and_not_with_its_source(kind):
    edits = DrawnWorld(split="judge").edits(range(100), kind)
    for change in edits:
        assert succeeds(change, draw([change.target, change.source])) == [True, False], change.instruction


def test_an_edit_fails_where_another_object_changed_too():
    for change in DrawnWorld().edits(range(40), "add"):
        first, *rest = change.target.objects
        other = replace(first, size="small" if first.size == "large" else "large")
        assert succeeds(change, draw([change.target.with_objects([other, *rest])])) == [False]


def mixed_edits(count):
    return [change for kind in EDIT_KINDS for change in DrawnWorld(split="judge").edits(range(count), kind)
            if len(change.target.objects) < 4]


def kept(change):
    """What an edit leaves in its place or moves, and nothing else says of it: no new thing."""
    new = change.kind in ("add", "replace")
    return [t for t in change.target.objects if not (new and t not in change.source.objects)]


def with_fault(change, fault, size, rng):
    """The target's picture with one thing wrong that no object's facts tell; None where the edit allows none."""
    target, things = change.target, [t for t in kept(change) if fault != "turn" or t.shape != "circle"]
    if fault == "ground":
        shade = tuple(x + (size if x < 0.5 else -size) for x in target.background.tint)
        return draw([replace(target, background=replace(target.background, tint=shade))])
    if not things:
        return None
    thing = rng.choice(things)
    others, angle = [t for t in target.objects if t is not thing], rng.uniform(0, 6.28)
    x, y = size * math.cos(angle), size * math.sin(angle)
    if fault == "shift":
        other = replace(thing, offset=(thing.offset[0] + x, thing.offset[1] + y))
    elif fault == "turn":
        other = replace(thing, turn=thing.turn + rng.choice((-size, size)))
    with pytest.MonkeyPatch.context() as patch:
        if fault == "tint":
            r, g, b = COLOURS[thing.colour]
            shade = (c + (abs(d) if c < 0.5 else -abs(d)) for c, d in ((g, x), (b, y)))
            patch.setitem(drawing.COLOURS, "other", (r, *shade))
            other = replace(thing, colour="other")
        return draw([target.with_objects([*others, other])])


def passing(fault, size, wear=lambda images: images):
    """Share of the edits with one fault of this size that succeed all the same."""
    rng, verdicts = random.Random(0), []
    for change in mixed_edits(14):
        scale = STYLES.get(change.target.style, (1.0, 0.0))[0]  # a style shrinks what is wrong with colours
        image = with_fault(change, fault, size / scale if fault in ("ground", "tint") else size, rng)
        verdicts += [] if image is None else succeeds(change, wear(image))
    assert len(verdicts) > 80
    return share(verdicts)


SIDE_EFFECTS = [("ground", 0.1), ("shift", 2.0), ("turn", 0.3), ("tint", 0.22)]


@pytest.mark.parametrize("fault, size", SIDE_EFFECTS)
def test_an_edit_fails_where_what_nobody_named_has_changed(fault, size):
    assert passing(fault, size) <= 0.01 and passing(fault, size, worn) <= 0.01


@pytest.mark.parametrize("fault, size", [("ground", 0.04), ("shift", 0.4), ("turn", 0.05), ("tint", 0.03)])
def test_an_edit_succeeds_with_a_fault_that_a_tokenizer_makes(fault, size):
    assert passing(fault, size) == 1.0


def test_an_edit_succeeds_with_its_target_as_a_tokenizer_gives_it_back():
    changes = mixed_edits(30)
    exact = draw([change.target for change in changes])
    images = worn(exact)
    assert 29 < psnr(exact, images).mean() < 31
    # its spots are larger than a trained tokenizer's, and a few pass for a thing; what that one reaches:
    # results/README.md
    assert share([succeeds(change, image[None])[0] for change, image in zip(changes, images)]) >= 0.96


@pytest.mark.parametrize("kind", ("add", "replace"))
def test_a_new_thing_may_have_any_offset_and_turn(kind):
    for change in DrawnWorld(split="judge").edits(range(30), kind):
        new, = (thing for thing in change.target.objects if thing not in change.source.objects)
        rest = [thing for thing in change.target.objects if thing is not new]
        others = [replace(new, offset=(-x, -y), turn=-new.turn) for x, y in (new.offset, (0.9, -0.9))]
        assert succeeds(change, draw([change.target.with_objects([*rest, other]) for other in others])) == [True] * 2


@pytest.mark.parametrize("kind", ("remove", "action"))
def test_an_edit_fails_where_its_object_has_left_a_ghost_or_a_stain(kind):
    for change in DrawnWorld(split="judge").edits(range(30), kind):
        gone, = (thing for thing in change.source.objects if thing not in change.target.objects)
        both, target = change.target.with_objects([*change.target.objects, gone]), draw([change.target])
        row, column = divmod(gone.place, 2)
        stain = target.clone()
        stain[:, :, 16 * row + 4:16 * row + 12, 16 * column + 4:16 * column + 12] -= 0.3  # gray: no object
        assert succeeds(change, torch.cat([faded(both, [gone], 0.4), stain, target])) == [False, False, True]


@pytest.mark.parametrize("plain", PLAIN)
def test_a_background_edit_fails_with_the_colour_of_another_name(plain):
    for change in [c for c in DrawnWorld().edits(range(60), "background") if c.instruction.endswith(plain)]:
        wrong = [Background(ground) for name, ground in PLAIN.items() if name != plain]
        assert succeeds(change, draw([replace(change.target, background=b) for b in wrong])) == [False] * 2


def test_a_background_left_untouched_never_passes_for_a_plain_one():
    changes = DrawnWorld(split="judge").edits(range(350), "background")
    assert not [c.instruction for c in changes if succeeds(c, draw([c.source]))[0]]


def test_a_background_edit_fails_where_stripes_are_left():
    for change in [c for c in DrawnWorld().edits(range(60), "background") if c.instruction.endswith("gray")]:
        striped = replace(change.target.background, amplitude=0.1, angle=0.5, cycles=2.0)
        assert succeeds(change, draw([replace(change.target, background=striped)])) == [False]


@pytest.mark.parametrize("pair", [("red", "purple"), ("green", "blue"), ("green", "yellow"), ("purple", "orange")])
def test_a_colour_between_two_names_has_none(pair, monkeypatch):
    middle = tuple((a + b) / 2 for a, b in zip(COLOURS[pair[0]], COLOURS[pair[1]]))
    with monkeypatch.context() as patch:
        patch.setitem(drawing.COLOURS, "between", middle)
        pictures = draw([Scene((Object(shape, "between", "large", 2),), GROUND) for shape in SHAPES])
    for shape, (thing,) in zip(SHAPES, detect(pictures)):
        assert thing.facts == (shape, "?", "large", 2)
        assert not fulfils([thing], Request("colours", "", (Object(shape, pair[0]),), SCENE))


def test_a_blob_has_no_shape():
    y, x = torch.meshgrid(torch.arange(32) - 7.5, torch.arange(32) - 7.5, indexing="ij")
    r, noise = torch.hypot(x, y), torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    blobs = [(r < 6.5) & (r > 4), (x.abs() < 2) & (y.abs() < 7), (r < 6) & (y < 0), noise & (r < 7), r < 2.2,
             (x.abs() < 8) & (y.abs() < 8)]
    for blob in blobs:
        (thing,), = detect(paint(blob, COLOURS["red"]))
        assert (thing.shape, thing.colour, thing.size) == ("?", "red", "?")
        assert not any(fulfils([thing], Request("single", "", (Object(shape),), SCENE)) for shape in SHAPES)
    (circle,), = detect(paint(r < SIZES["large"], COLOURS["red"]))
    assert circle.facts == ("circle", "red", "large", 0)


def test_noise_fulfils_nothing():
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(200, 1, 32, 32, generator=generator).mul(2).sub(1).expand(-1, 3, -1, -1)
    coloured = torch.rand(200, 3, 32, 32, generator=generator).mul(2).sub(1)
    requests = [DrawnWorld().prompts(range(200), kind) for kind in ("single", "full", "counting")]
    assert detect(grey) == [[]] * 200
    for images in (grey, coloured):
        assert not any(fulfils(seen, r) for rs in requests for seen, r in zip(detect(images), rs))


def test_small_noise_and_blur_do_not_change_the_verdict():
    requests = DrawnWorld().prompts(range(300))
    images = draw([r.scene for r in requests])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for changed in (images + 0.03 * noise, blur(images, 0.7), blur(images + 0.03 * noise, 0.7)):
        assert sum(fulfils(seen, r) for seen, r in zip(detect(changed), requests)) >= 0.97 * 300


def ghosts_passing(opacity, wear=lambda images: images):
    """Share of the prompts that are fulfilled by objects of this opacity."""
    requests = DrawnWorld().prompts(range(200))
    images = wear(torch.cat([faded(r.scene, r.scene.objects, opacity) for r in requests]))
    return share([fulfils(seen, r) for seen, r in zip(detect(images), requests)])


def test_a_wanted_ghost_is_not_what_was_wanted():
    for opacity, least, most in ((0.3, 0, 0), (0.5, 0, 0.01), (0.7, 0.99, 1), (1.0, 1, 1)):
        assert least <= ghosts_passing(opacity) <= most and min(least, 0.99) <= ghosts_passing(opacity, worn) <= most


def test_an_unwanted_ghost_is_an_object_too_many_and_a_trace_is_nothing():
    requests = [r for r in DrawnWorld().prompts(range(200), "two")]
    for opacity, least, most in ((0.05, 1, 1), (0.4, 0, 0), (0.6, 0, 0)):
        scenes = [r.scene.with_objects([*r.scene.objects, replace(CIRCLE, place=place)]) for r in requests
                  for place in range(4) if place not in {t.place for t in r.scene.objects}]
        images = torch.cat([faded(s, [t for t in s.objects if t.offset == (0.0, 0.0)], opacity) for s in scenes])
        verdicts = [fulfils(seen, r) for seen, r in zip(detect(images), [r for r in requests for _ in range(2)])]
        assert least <= share(verdicts) <= most


def test_what_has_no_colour_or_no_shape_is_never_wanted():
    for thing in (replace(CIRCLE, colour="?"), replace(CIRCLE, shape="?", size="?")):
        for wanted in (Object("circle"), Object("", "red"), Object("", "", "", 0)):
            assert not fulfils([thing], Request("part", "", (wanted,), SCENE))
            assert fulfils([CIRCLE], Request("part", "", (wanted,), SCENE))
