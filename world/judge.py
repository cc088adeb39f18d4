"""The judge of the drawn world: arithmetic, not a model. It reads the objects of a picture from its pixels.

Per quarter of the picture: the pixels furthest from the ground's colour, gray aside, are an object's core; their way
from the ground names the colour, and gives the opacity; every pixel's share of that way is the object's cover; the
nearest of the covers that `drawing.py` would draw names shape and size. What fits no colour or no cover well, or is too
faint, is read as "?" and is never what anybody asked for. An edit must match its exact target in all else, too.

    python -m world.judge          accuracy on clean drawings, attribute by attribute
"""

from dataclasses import replace
from functools import cache
from itertools import permutations, product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from world.drawing import COLOURS, SHAPES, SIZES, STYLES, Background, Object, Scene, draw
from world.edits import Edit
from world.language import DrawnWorld, Request, related

COLOUR_TOLERANCE = 0.28  # largest RGB distance (range 0–1 per channel) at which a colour still has its name
COVER_TOLERANCE = 0.25  # largest squared error of a cover, as a share of the drawn cover's square
OPACITY = 0.6  # least opacity of an object: how far its core went from the ground's colour to the named one
TRACE = 0.1  # least RGB distance, gray aside, of a pixel that is seen: an opacity of 0.13 (blue) to 0.3 (green)
EDIT_TOLERANCES = torch.tensor([0.06, 0.15, 1.0, 0.16])  # of `side_effects`; above what a tokenizer of 30 dB does


def quarters(images: Tensor, style: str) -> Tensor:
    """Pictures `b 3 H W` in [-1, 1] -> RGB in [0, 1] of the 256 pixels of each quarter `b 4 256 3`, `style` undone."""
    scale, shift = STYLES.get(style, (1.0, 0.0))
    rgb = ((F.adaptive_avg_pool2d(images.float(), 32) + 1) / 2 - shift) / scale
    return rearrange(rgb, "b c (h y) (w x) -> b (h w) (y x) c", h=2, w=2)


@cache
def covers() -> tuple[Tensor, list[Object]]:
    """Every object that a quarter can have, and its cover there, one a row of 256 pixels in [0, 1]."""
    steps, turns = torch.linspace(-1.5, 1.5, 7).tolist(), torch.linspace(-0.25, 0.25, 5).tolist()
    things = [Object(shape, "red", size, 0, (x, y), turn)
              for shape, size, x, y, turn in product(SHAPES, SIZES, steps, steps, turns)]
    red = draw([Scene((thing,), Background((0.0, 0.0, 0.0))) for thing in things])[:, 0, :16, :16]
    return (red.flatten(1) + 1) / 2 / COLOURS["red"][0], things


def detect(images: Tensor, style: str = "") -> list[list[Object]]:
    """Pictures `b 3 H W` in [-1, 1] -> the objects of each, with the nearest cover's offset and turn. `style` (see
    drawing.STYLES) is undone first. A ghost, fainter than OPACITY, is an object of colour "?", a trace is nothing."""
    cells = quarters(images, style)
    rim = F.pad(torch.zeros(14, 14), (1,) * 4, value=1.0).flatten() > 0  # of a quarter: hardly an object reaches it
    ground = cells[:, :, rim].flatten(1, 2).median(1).values.repeat_interleave(4, 0)
    cells = cells.flatten(0, 1) - ground[:, None]
    tints = cells - cells.mean(-1, keepdim=True)  # stripes are gray: they leave no trace here
    strength = tints.norm(dim=-1)
    present = (strength > TRACE).sum(1) >= 8
    core = (strength >= 0.75 * strength.amax(1, keepdim=True)).float()
    colour, tint = ((part * core[..., None]).sum(1) / core.sum(1)[:, None] for part in (cells, tints))
    full = torch.tensor(list(COLOURS.values())) - ground[:, None]  # what each colour would be at full opacity
    full_tint = full - full.mean(-1, keepdim=True)
    opacity = ((full_tint * tint[:, None]).sum(-1) / full_tint.square().sum(-1)).clamp(min=0.05)
    distance, nearest = (colour[:, None] / opacity[..., None] - full).norm(dim=-1).min(1)
    named = (distance < COLOUR_TOLERANCE) & (opacity.gather(1, nearest[:, None])[:, 0] >= OPACITY)
    cover = (tints * tint[:, None]).sum(-1) / tint.square().sum(-1, keepdim=True).clamp(min=1e-6)
    templates, things = covers()
    error, best = torch.cdist(cover.clamp(0, 1), templates).min(1)
    fits = error.square() < COVER_TOLERANCE * templates[best].square().sum(1)

    objects: list[list[Object]] = [[] for _ in images]
    for index in present.nonzero()[:, 0].tolist():
        word = list(COLOURS)[nearest[index]] if named[index] else "?"
        thing = replace(things[best[index]], colour=word, place=index % 4)
        objects[index // 4].append(thing if fits[index] else replace(thing, shape="?", size="?"))
    return objects


def fulfils(objects: list[Object], request: Request) -> bool:
    """Are the `objects` of a picture the wanted ones, no others, in the wanted relation? What was not said is free."""
    if len(objects) != len(request.wanted) or any("?" in thing.facts for thing in objects):
        return False
    for order in permutations(objects):
        same = all(wish in ("", None, fact) for thing, wanted in zip(order, request.wanted)
                   for wish, fact in zip(wanted.facts, thing.facts))
        if same and (not request.relation or related(order[0], order[1], request.relation)):
            return True
    return False


def moments(cover: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    """Covers `b 4 256` -> (centre x + iy, `fold`-th moment about it, whose angle is `fold` times the turn), `b 4`."""
    pixel = torch.arange(16) - 7.5
    z = torch.complex(pixel.repeat(16), pixel.repeat_interleave(16))
    centre = (cover * z).sum(-1) / cover.sum(-1).clamp(min=1e-6)
    return centre, (cover * (z - centre[..., None]) ** fold).sum(-1)


def side_effects(change: Edit, images: Tensor, objects: list[list[Object]]) -> Tensor:
    """Edited pictures `b 3 H W` in [-1, 1], the `objects` that `detect` sees -> how far the worst quarter is from the
    exact target `b 4`: ground (RMSE of RGB in [0, 1]), and an object's tint (RGB distance), shift (32nds of the side)
    and turn (radians); offset and turn of a new object are free, since nobody said them."""
    target, style = change.target, change.target.style
    new = set(target.objects) - set(change.source.objects) if change.kind in ("add", "replace") else set()
    read = [{thing.facts: thing for thing in seen} for seen in objects]
    scenes = [target.with_objects(there.get(thing.facts, thing) if thing in new else thing for thing in target.objects)
              for there in read]
    drawn = draw([*scenes, replace(target, objects=())], images.shape[-1])
    rgb, goal, ground = (quarters(pictures, style) for pictures in (images, drawn[:-1], drawn[-1:]))
    axis, fold, kept = torch.zeros(4, 256, 3), torch.full((4, 1), 4.0), torch.zeros(2, 4)
    for thing in target.objects:
        axis[thing.place] = torch.tensor(COLOURS[thing.colour]) - ground[0, thing.place]
        fold[thing.place] = 3.0 if thing.shape == "triangle" else 4.0
        kept[:, thing.place] = torch.tensor([thing not in new, thing not in new and thing.shape != "circle"])
    off = (rgb - goal) * STYLES.get(style, (1.0, 0.0))[0]
    cover, right = (((x - ground) * axis).sum(-1) / axis.square().sum(-1).clamp(min=1e-6) for x in (rgb, goal))
    near = F.max_pool2d(rearrange(right, "b n (y x) -> b n y x", x=16), 3, 1, 1).flatten(2) > 0.01
    miss = ((off.square().mean(-1) * ~near).sum(-1) / (~near).sum(-1).clamp(min=1)).sqrt()
    tint = (off * right[..., None]).sum(2).norm(dim=-1) / right.sum(-1).clamp(min=1e-6)
    (centre, moment), (middle, spread) = (moments(x, fold) for x in ((cover * near).clamp(0, 1), right))
    shift, turn = (centre - middle).abs(), (moment * spread.conj()).angle().abs() / fold[:, 0]
    return torch.stack([miss, tint, shift * kept[0], turn * kept[1]], -1).amax(1)


def succeeds(change: Edit, images: Tensor) -> list[bool]:
    """Edited pictures `b 3 H W` in [-1, 1] of one change -> of each, whether the objects' facts are the target's and
    nothing else differs from it by more than EDIT_TOLERANCES."""
    wanted, detected = {thing.facts for thing in change.target.objects}, detect(images, change.target.style)
    clean = (side_effects(change, images, detected) < EDIT_TOLERANCES).all(1)
    return [{thing.facts for thing in objects} == wanted and same for objects, same in zip(detected, clean.tolist())]


def clean_accuracy(count: int = 2000, side: int = 32) -> dict[str, float]:
    """Share of the objects in `count` drawings that `detect` gets right, for each attribute and for all at once."""
    world = DrawnWorld(side, split="judge")
    scenes = [world.scene(index) for index in range(count)]
    right = {"found": 0, "shape": 0, "colour": 0, "size": 0, "all": 0}
    for scene, objects in zip(scenes, detect(draw(scenes, side))):
        by_place = {thing.place: thing for thing in objects}
        for thing in scene.objects:
            other = by_place.pop(thing.place, Object("?", "?", "?"))
            right["found"] += other.place is not None
            for key in ("shape", "colour", "size"):
                right[key] += getattr(thing, key) == getattr(other, key)
            right["all"] += thing.facts == other.facts
        right["all"] -= len(by_place)  # an object that is not there counts against it
    total = sum(len(scene.objects) for scene in scenes)
    return {key: value / total for key, value in right.items()}


if __name__ == "__main__":
    for side in (32, 64, 448):
        accuracy = clean_accuracy(2000 if side < 100 else 100, side)
        print(f"side {side:3}   " + "   ".join(f"{key} {value:.4f}" for key, value in accuracy.items()))
        assert min(accuracy.values()) >= 0.999
