"""The judge of the drawn world: arithmetic, not a model. It reads the objects of a picture from its pixels.

Per quarter of the picture: the saturated pixels' colour names the colour; every pixel's share of that colour over the
ground is the object's cover; the nearest of the covers that `drawing.py` would draw names shape and size. What fits no
colour or no cover well is read as "?" and is never what anybody asked for.

    python -m world.judge          accuracy on clean drawings, attribute by attribute
"""

from functools import cache
from itertools import permutations, product

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from world.drawing import COLOURS, PLAIN, SHAPES, SIZES, STYLES, Object, draw, signed_distance
from world.edits import Edit
from world.language import DrawnWorld, Request, related

COLOUR_TOLERANCE = 0.28  # largest RGB distance (range 0–1 per channel) at which a colour still has its name
COVER_TOLERANCE = 0.25  # largest squared error of a cover, as a share of the drawn cover's square
GROUND_TOLERANCE = 0.05  # largest mean RGB difference of a plain background from its name


@cache
def covers() -> tuple[Tensor, list[tuple[str, str]]]:
    """Every cover that an object can have in its quarter, one a row of 256 pixels, and what it is: (shape, size)."""
    pixel = np.arange(16, dtype=np.float32) + 0.5 - 8
    steps, turns = np.arange(-1.5, 1.51, 0.5), np.linspace(-0.25, 0.25, 5)
    pictures, names = [], []
    for (index, shape), size in product(enumerate(SHAPES), SIZES):
        for x, y, turn in product(steps, steps, turns):
            dx, dy = pixel[None, :] - x, pixel[:, None] - y
            u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
            pictures.append(np.clip(0.5 - signed_distance(u, v, SIZES[size], np.array(index)), 0, 1).ravel())
            names.append((shape, size))
    return torch.tensor(np.array(pictures), dtype=torch.float32), names


def detect(images: Tensor, style: str = "") -> list[list[Object]]:
    """Pictures `b 3 H W` in [-1, 1] -> the objects of each. `style` (see drawing.STYLES) is undone first."""
    scale, shift = STYLES.get(style, (1.0, 0.0))
    rgb = ((F.adaptive_avg_pool2d(images.float(), 32) + 1) / 2 - shift) / scale
    cells = rearrange(rgb, "b c (h y) (w x) -> (b h w) (y x) c", h=2, w=2)  # quarters
    saturation = cells.amax(-1) - cells.amin(-1)
    core = (saturation > 0.75 * saturation.amax(1, keepdim=True)).float() * (saturation > 0.35)
    present = core.sum(1) >= 4
    colour = (cells * core[..., None]).sum(1) / core.sum(1).clamp(min=1)[:, None]
    palette = torch.tensor(list(COLOURS.values()))
    distance, nearest = torch.cdist(colour, palette).min(1)
    calm = (saturation < 0.3).float()[..., None]
    ground = (cells * calm).sum(1) / calm.sum(1).clamp(min=1)
    axis = colour - ground
    cover = torch.einsum("b n c, b c -> b n", cells - ground[:, None], axis)
    cover = cover / axis.square().sum(-1, keepdim=True).clamp(min=1e-6)
    templates, names = covers()
    cover = cover.clamp(0, 1)
    squares = templates.square().sum(1)
    error = (cover.square().sum(1, keepdim=True) - 2 * cover @ templates.T + squares) / squares
    error, best = error.min(1)

    objects: list[list[Object]] = [[] for _ in images]
    for index in present.nonzero()[:, 0].tolist():
        shape, size = names[best[index]] if error[index] < COVER_TOLERANCE else ("?", "?")
        word = list(COLOURS)[nearest[index]] if distance[index] < COLOUR_TOLERANCE else "?"
        objects[index // 4].append(Object(shape, word, size, index % 4))
    return objects


def fulfils(objects: list[Object], request: Request) -> bool:
    """Are the `objects` of a picture the wanted ones, no others, in the wanted relation? What was not said may be
    anything."""
    if len(objects) != len(request.wanted):
        return False
    for order in permutations(objects):
        same = all(wish in ("", None, fact) for thing, wanted in zip(order, request.wanted)
                   for wish, fact in zip(wanted.facts, thing.facts))
        if same and (not request.relation or related(order[0], order[1], request.relation)):
            return True
    return False


def succeeds(change: Edit, images: Tensor) -> list[bool]:
    """Edited pictures `b 3 H W` in [-1, 1] of one change -> of each, whether the wanted objects are there, all others
    are as they were, and a background with a name has its colour."""
    wanted = {thing.facts for thing in change.target.objects}
    tint = change.target.background.tint
    ground = draw([change.target], images.shape[-1])[0].add(1).div(2) - torch.tensor(tint)[:, None, None]
    ground = ground.abs().amax(0) < 1e-3  # the pixels that show the plain background
    results = []
    for image, objects in zip(images, detect(images, change.target.style)):
        right = len(objects) == len(wanted) and {thing.facts for thing in objects} == wanted
        if right and tint in PLAIN.values() and not change.target.style:
            off = image.float().add(1).div(2)[:, ground] - torch.tensor(tint)[:, None]
            right = bool(off.abs().mean(1).max() < GROUND_TOLERANCE)  # of absolutes, so that stripes do not cancel out
        results.append(right)
    return results


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
