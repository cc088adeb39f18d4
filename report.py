"""Pictures for the eye, drawn with Pillow alone: what a run can do, how it learned, what each stream and layer carries.

    python report.py runs/toy      writes report/summary.png, losses.png, streams.png and routing.png into the run folder
"""

import json
import math
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import EDIT_KINDS, DrawnWorld
from runs import Parser, UserError, load_config, load_run, run_command
from spar import NAMES, SPAR
from world import draw

PIXELS = 96  # shown side of one picture
MARGIN, TEXT = 12, 13
INK, PALE, RIGHT, WRONG = (30, 30, 35), (150, 150, 155), (0, 120, 60), (190, 30, 30)
LINES = [(31, 119, 180), (214, 90, 20), (44, 140, 44), (150, 60, 170), (120, 90, 60)]


def font(size: int = TEXT) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def to_image(picture: Tensor, side: int | None = None) -> Image.Image:
    """`3 H W` in [-1, 1] -> RGB picture; `side`: shown that large, each pixel a square."""
    levels = ((picture.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    return image.resize((side, side), Image.Resampling.NEAREST) if side else image


Cell = tuple[list[Tensor], str, tuple]  # pictures side by side, the words under them, their colour


def sheet(sections: list[tuple[str, list[Cell]]], columns: int = 8, extra: list[Image.Image] = ()) -> Image.Image:
    """Titled rows of cells on white, `columns` pictures wide; `extra` images follow below."""
    width = columns * (PIXELS + MARGIN) + MARGIN
    drawn, height = [], MARGIN
    for title, cells in sections:
        drawn.append(("title", title, (MARGIN, height)))
        height, x, lowest = height + TEXT + 10, MARGIN, 0
        for pictures, words, colour in cells:
            span = len(pictures) * (PIXELS + 4) - 4
            if x + span > width - MARGIN + 4:
                x, height, lowest = MARGIN, height + lowest + MARGIN, 0
            lines = textwrap.wrap(words, max(8, int(span / 6.4))) or [""]
            drawn.append(("cell", (pictures, lines, colour), (x, height)))
            lowest = max(lowest, PIXELS + 4 + len(lines) * (TEXT + 3))
            x += span + MARGIN
        height += lowest + MARGIN
    canvas = Image.new("RGB", (max([width, *(e.width + 2 * MARGIN for e in extra)]),
                               height + sum(e.height + MARGIN for e in extra)), "white")
    pen = ImageDraw.Draw(canvas)
    for kind, content, (x, y) in drawn:
        if kind == "title":
            pen.text((x, y), content, INK, font(TEXT + 2))
            continue
        pictures, lines, colour = content
        for i, picture in enumerate(pictures):
            canvas.paste(to_image(picture, PIXELS), (x + i * (PIXELS + 4), y))
        for i, line in enumerate(lines):
            pen.text((x, y + PIXELS + 4 + i * (TEXT + 3)), line, colour, font())
    for image in extra:
        canvas.paste(image, (MARGIN, height))
        height += image.height + MARGIN
    return canvas


def heat_map(weights: Tensor, rows: list[str], columns: list[str], title: str) -> Image.Image:
    """`r c` in [0, 1] with the names of its rows and columns; the number stands in each field."""
    size, left = 22, 110
    image = Image.new("RGB", (left + 60 * len(columns) + MARGIN, 50 + size * len(rows) + MARGIN), "white")
    pen = ImageDraw.Draw(image)
    pen.text((0, 0), title, INK, font(TEXT + 2))
    for c, name in enumerate(columns):
        pen.text((left + 60 * c + 4, 28), name, INK, font())
    for r, name in enumerate(rows):
        pen.text((0, 50 + size * r + 3), name[:15], INK, font())
        for c in range(len(columns)):
            share = float(weights[r, c])
            x, y = left + 60 * c, 50 + size * r
            pen.rectangle((x, y, x + 58, y + size - 2), tuple(int(255 - share * (255 - k)) for k in (20, 70, 150)))
            pen.text((x + 16, y + 3), f"{share:.2f}", "white" if share > 0.5 else INK, font(11))
    return image


def query_grids(weights: Tensor, columns: list[str]) -> Image.Image:
    """Weights of the queries `q c` as one small square grid for each layer."""
    side, cell = round(len(weights) ** 0.5), max(4, 88 // round(len(weights) ** 0.5))
    image = Image.new("RGB", (len(columns) * (cell * side + 2 * MARGIN), cell * side + 50), "white")
    pen = ImageDraw.Draw(image)
    pen.text((0, 0), "what each query takes of each layer", INK, font(TEXT + 2))
    for c, name in enumerate(columns):
        x = c * (cell * side + 2 * MARGIN)
        pen.text((x, 24), name, INK, font())
        for q in range(len(weights)):
            shade = tuple(int(255 - float(weights[q, c]) * (255 - k)) for k in (20, 70, 150))
            row, column = divmod(q, side)
            pen.rectangle((x + column * cell, 44 + row * cell, x + (column + 1) * cell - 2, 44 + (row + 1) * cell - 2), shade)
    return image


def routing_pictures(model: SPAR, prompt: str, reference: Tensor | None = None) -> list[Image.Image]:
    """DTR's choice for one prompt: words (and queries) × layers as a heat map, and the query grid of each layer."""
    weights = model.generate([prompt], reference, steps=1, guidance=1)[2][0].cpu()
    words = ["<bos>", *model.words.pieces(prompt)]  # as the model reads them
    queries = model.config.queries
    layers = [f"layer {i}" for i in model.mllm.choice]
    rows = ["<bos>", *(["picture (mean)"] if reference is not None else []), *words[1:], "queries (mean)"]
    seen = len(weights) - len(words) - queries  # visual tokens of the reference, between <bos> and the words
    shown = [weights[:1], *([weights[1:1 + seen].mean(0, keepdim=True)] if seen else []), weights[1 + seen:-queries],
             weights[-queries:].mean(0, keepdim=True)]
    return [heat_map(torch.cat(shown), rows, layers, f"routing: “{prompt}”"), query_grids(weights[-queries:], layers)]


def loss_curves(run: Path) -> Image.Image:
    """log.jsonl as one small chart per stage: the magnitude of each term (log scale) over the steps."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    stages = [name for name in NAMES if any(line["stage"] == name for line in lines)]
    wide, high = 320, 200
    image = Image.new("RGB", (3 * wide, math.ceil(len(stages) / 3) * high), "white")
    pen = ImageDraw.Draw(image)
    for place, name in enumerate(stages):
        here = [line for line in lines if line["stage"] == name]
        here = here[max(i for i, line in enumerate(here) if line["step"] == 0):]  # a stage begun anew: its last beginning
        x0, y0 = place % 3 * wide + 44, place // 3 * high + 26
        w, h = wide - 60, high - 66
        symbols = [key for key in here[-1] if key.startswith("L_")]
        values = {s: [(line["step"], abs(line[s])) for line in here if abs(line.get(s, 0)) > 0] for s in symbols}
        flat = [math.log10(value) for pairs in values.values() for _, value in pairs]
        low, top, last = min(flat), max(max(flat), min(flat) + 0.1), max(line["step"] for line in here) or 1
        pen.text((x0, y0 - 22), f"{name}, {last + 1} steps, {here[-1]['seconds']:.0f} s", INK, font())
        pen.rectangle((x0, y0, x0 + w, y0 + h), outline=PALE)
        for value, y in ((top, y0), (low, y0 + h - 10)):
            pen.text((x0 - 42, y), f"{10 ** value:.2g}", PALE, font(11))
        for i, symbol in enumerate(symbols):
            points = [(x0 + step / last * w, y0 + (top - math.log10(v)) / (top - low) * h) for step, v in values[symbol]]
            if len(points) > 1:
                pen.line(points, LINES[i % len(LINES)], 2)
            pen.text((x0 + i * min(62, w // len(symbols)), y0 + h + 6), symbol, LINES[i % len(LINES)], font(11))
    return image


def draw_report(run: Path, device: str = "cpu") -> None:
    """Writes every picture that the finished stages allow into `run`/report."""
    model = load_run(run, device)
    world, folder, done = DrawnWorld(model.config.side, model.config.seed, "test"), run / "report", set(model.finished)
    folder.mkdir(exist_ok=True)
    sections, extra = [], []
    images = world.pictures(range(8))
    if done & {"T1", "T2"}:
        copies = model.reconstruct(images.to(device))
        sections.append(("reconstruct: source, reconstruction", [([a, b], "", INK) for a, b in zip(images[:4], copies)]))
        streams(model, images.to(device)).save(folder / "streams.png")
    if "P1" in done:
        pictures, talks = world.conversations(range(8))
        turns = [talk[i % len(talk)] for i, talk in enumerate(talks)]
        said = model.answer(pictures.to(device), [question for question, _ in turns])
        sections.append(("ask: a question, the model's answer", [
            ([picture], f"{question}? {reply}", RIGHT if reply == answer else WRONG)
            for picture, (question, answer), reply in zip(pictures, turns, said)]))
    if "U1" in done:
        requests = world.prompts(range(8))
        drawn = model.generate(model.rewrite([request.text for request in requests]))[0]
        sections.append(("draw: a prompt, the model's picture", [([p], r.text, INK) for p, r in zip(drawn, requests)]))
        edits = [world.edits([3], kind)[0] for kind in EDIT_KINDS[:8]]
        sources = draw([edit.source for edit in edits], world.side).to(device)
        after = model.generate(model.rewrite([edit.instruction for edit in edits], sources), sources)[0]
        sections.append(("edit: before, after", [([a, b], e.instruction, INK) for a, b, e in zip(sources, after, edits)]))
        routing = routing_pictures(model, requests[1].text)
        sheet([], extra=routing).save(folder / "routing.png")
        extra = routing
    sheet(sections, extra=extra).save(folder / "summary.png")
    if (run / "log.jsonl").exists():  # not where every stage was taken over
        loss_curves(run).save(folder / "losses.png")


@torch.no_grad()
def streams(model: SPAR, images: Tensor) -> Image.Image:
    """What each stream carries: the picture decoded from both latents, and with one of them set to zero."""
    f_v = model.tokenizer.features(images)
    z_s, z_p, z_f = model.tokenizer.latents(f_v)
    rows = [("source", images), ("z_s and z_p", model.tokenizer.decode(z_f, images.shape[-1]))]
    if z_s is not None and z_p is not None:
        for title, pair in (("z_s alone (z_p = 0)", (z_s, 0 * z_p)), ("z_p alone (z_s = 0)", (0 * z_s, z_p))):
            rows.append((title, model.tokenizer.decode(model.tokenizer.fuse(*pair), images.shape[-1])))
    return sheet([(title, [([picture], "", INK) for picture in pictures]) for title, pictures in rows])


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, as train.py wrote it")
    run = parser.read().run
    if load_config(run).data:
        raise UserError(f"{run} learned from data on disk: `python evaluate.py {run}` draws its report")
    draw_report(run)


if __name__ == "__main__":
    run_command(main)
