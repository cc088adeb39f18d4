"""Curves for the eye on two logarithmic axes, drawn with Pillow alone."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, LEFT, TOP = 420, 84, 40  # of the plot, and where it begins
INK, PALE = (30, 30, 35), (225, 225, 230)
COLOURS = [(31, 119, 180), (214, 90, 20), (44, 140, 44), (150, 60, 170)]


def log_log(path: Path, title: str, across: str, up: str, curves: dict[str, list[tuple[float, float]]]) -> Path:
    """Draws each curve, name -> its points (x, y) above 0, with the slope between its ends, and saves it to `path`."""
    points = [[(math.log10(x), math.log10(y)) for x, y in curve] for curve in curves.values()]
    (low_x, high_x), (low_y, high_y) = ((min(values), max(values)) for values in zip(*sum(points, [])))
    low_y, high_y = math.floor(low_y), math.ceil(high_y + 1e-6)
    image = Image.new("RGB", (LEFT + SIDE + 190, TOP + SIDE + 56), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + SIDE * (x - low_x) / max(high_x - low_x, 1e-9),
                TOP + SIDE * (high_y - y) / max(high_y - low_y, 1e-9))

    for power in range(low_y, high_y + 1):
        pen.line([place(low_x, power), place(high_x, power)], PALE)
        pen.text((8, place(low_x, power)[1] - 8), f"1e{power}", INK, font)
    for x in sorted({x for curve in points for x, _ in curve}):
        pen.line([place(x, low_y), place(x, high_y)], PALE)
        pen.text((place(x, low_y)[0] - 10, TOP + SIDE + 6), f"{10**x:.0f}", INK, font)
    for (name, curve), colour in zip(zip(curves, points), COLOURS):
        places = [place(*point) for point in curve]
        pen.line(places, colour, 3)
        for x, y in places:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        slope = (curve[-1][1] - curve[0][1]) / (curve[-1][0] - curve[0][0])
        pen.text((LEFT + SIDE + 10, places[-1][1] - 8), f"{name}: slope {slope:.1f}", colour, font)
    pen.text((LEFT, 12), title, INK, font)
    pen.text((LEFT + SIDE // 2, TOP + SIDE + 30), across, INK, font)
    pen.text((8, 12), up, INK, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path
