"""The drawn world: scenes of one to three objects, one to a quarter of the picture, made and drawn, not downloaded.

Its facts are of two kinds:

    captioned        shape, colour, size, place, count, relation      what the semantic features must keep
    never captioned  background tint and stripes, exact offset, turn  what only the pixels carry

Some colour × shape pairs are held out: no training picture and no training text has them.

    python -m world.drawing                shape trace
    python -m world.drawing world.png      the same, with a sheet of scenes
"""

import math
import sys
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from PIL import Image
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
HELD_OUT_PAIRS = {("red", "cross"), ("green", "square"), ("blue", "triangle"), ("yellow", "circle")}
FACT_WORDS = {"size": list(SIZES), "colour": list(COLOURS), "shape": list(SHAPES), "place": list(PLACES)}
PAIRS = [pair for pair in product(COLOURS, SHAPES) if pair not in HELD_OUT_PAIRS]


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


def describe(thing: Object) -> str:
    """The facts that are said: "a large red circle top-left", "a circle"."""
    words = [word for word in map(thing.word, FACT_WORDS) if word]
    return ("an " if words[0] == "orange" else "a ") + " ".join(words)


def name(thing: Object) -> str:
    """What an edit or a question calls it: "the red circle"."""
    return f"the {thing.colour} {thing.shape}"


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

# ---------------------------------------------------------------- drawing


def draw(scenes: list[Scene], side: int = 32) -> Tensor:
    """Scenes -> pictures `b 3 H W` in [-1, 1], anti-aliased: a pixel's cover is ½ − its signed distance to the edge."""
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
    return torch.from_numpy(np.clip(scale[:, None] * canvas + shift[:, None], 0, 1) * 2 - 1)


def signed_distance(u, v, radius, shape):
    """Distance in pixels from (u, v) to the edge, negative inside; `shape` indexes SHAPES, all arguments broadcast."""
    bar, inradius = 0.36 * radius, 0.6 * radius
    a, b = np.abs(u), np.abs(v)
    return np.select([shape == 0, shape == 1, shape == 2], [
        np.hypot(u, v) - radius,
        np.maximum(a, b) - 0.86 * radius,
        np.maximum(v, 0.8660254 * a - 0.5 * v) - inradius,
    ], np.minimum(np.maximum(a - radius, b - bar), np.maximum(b - radius, a - bar)))


def save_sheet(rows, path: str, zoom: int = 3) -> None:
    """Rows of pictures `n 3 H W` in [-1, 1] -> a file; each pixel becomes `zoom`² of them; white between."""
    rows = [[torch.nn.functional.pad(picture, (1, 1, 1, 1), value=1.0) for picture in row] for row in rows]
    sheet = torch.cat([torch.cat(row, 2) for row in rows], 1)
    levels = ((sheet + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    size = zoom * sheet.shape[2], zoom * sheet.shape[1]
    Image.fromarray(levels).resize(size, Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    things = [Object(shape, colour, size, place) for place, (colour, shape) in enumerate(PAIRS) for size in SIZES]
    scenes = [Scene((replace(thing, place=thing.place % 4),), Background((0.8, 0.75, 0.8), 0.08, 0.4, 2.0))
              for thing in things]
    images = draw(scenes)
    assert images.shape == (40, 3, 32, 32) and images.abs().max() <= 1
    print("scene        ", scenes[0])
    print("pictures      b 3 H W", tuple(images.shape), f"in [{images.min():.2f}, {images.max():.2f}]")
    if len(sys.argv) > 1:
        save_sheet(images.split(8), sys.argv[1])
