"""Pictures for the eye, drawn with Pillow alone: what a run can do, how it learned, what each stream and layer carries.

`draw_report` writes report/summary.png, losses.png, streams.png and routing.png into a run folder, as far as its stages
allow.
"""

import json
import math
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from disk.index import open_data
from disk.measure import Cell, measure
from disk.reading import DiskData
from disk.samples import DataFolder
from plumbing.run_folder import load_run
from spar import NAMES, SPAR, Protocol
from world.drawing import draw
from world.edits import EDIT_KINDS
from world.judge import detect, fulfils, succeeds
from world.language import DrawnWorld

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


def sheet(sections: list[tuple[str, list[Cell]]], columns: int = 8, extra: list[Image.Image] = ()) -> Image.Image:
    """Titled rows of cells on white, `columns` pictures wide; `extra` images follow below."""
    width = columns * (PIXELS + MARGIN) + MARGIN
    drawn, height = [], MARGIN
    for title, cells in sections:
        drawn.append(("title", title, (MARGIN, height)))
        height, x, lowest = height + TEXT + 10, MARGIN, 0
        for pictures, words, right in cells:
            span = len(pictures) * (PIXELS + 4) - 4
            if x + span > width - MARGIN + 4:
                x, height, lowest = MARGIN, height + lowest + MARGIN, 0
            lines = textwrap.wrap(words, max(8, int(span / 6.4))) or [""]
            drawn.append(("cell", (pictures, lines, {None: INK, True: RIGHT, False: WRONG}[right]), (x, height)))
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
            left, top = x + column * cell, 44 + row * cell
            pen.rectangle((left, top, left + cell - 2, top + cell - 2), shade)
    return image


def routing_pictures(model: SPAR, prompt: str, reference: Tensor | None = None) -> list[Image.Image]:
    """DTR's choice for one prompt: words (and queries) × layers as a heat map, and the query grid of each layer."""
    weights = model.generate([prompt], reference, steps=1, guidance=1)[2][0].cpu()
    queries = model.config.queries
    ids = model.encode_prompts([prompt], reference is not None, to_draw=True)[0][0].cpu()  # as the model reads it
    words = (ids != model.words.image_id).nonzero().flatten()  # at a reference's places f_v goes on, not the mixture
    layers = [f"layer {i}" for i in model.mllm.choice]
    rows = ["<bos>", *model.words.pieces(ids[words[1:]].tolist()), "queries (mean)"]
    table = torch.cat([weights[words], weights[-queries:].mean(0, keepdim=True)])
    return [heat_map(table, rows, layers, f"routing: “{prompt}”"), query_grids(weights[-queries:], layers)]


def loss_curves(run: Path) -> Image.Image:
    """log.jsonl as one small chart per stage: the magnitude of each term (log scale) over the steps;
    circles: of held-out samples."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    stages = [name for name in NAMES if any(line["stage"] == name and "loss" in line for line in lines)]
    wide, high = 320, 200
    image = Image.new("RGB", (3 * wide, math.ceil(len(stages) / 3) * high), "white")
    pen = ImageDraw.Draw(image)
    for place, name in enumerate(stages):
        own, looks = ([line for line in lines if line["stage"] == name and kind in line]
                      for kind in ("loss", "held_out"))
        own = own[max(i for i, line in enumerate(own) if line["step"] == 0):]  # a stage begun anew: its last beginning
        x0, y0 = place % 3 * wide + 44, place // 3 * high + 26
        w, h = wide - 60, high - 66
        symbols = [key for key in own[-1] if key.startswith("L_")]
        values = {s: [(line["step"], abs(line[s])) for line in own if abs(line.get(s, 0)) > 0] for s in symbols}
        flat = [math.log10(value) for pairs in values.values() for _, value in pairs]
        low, top, last = min(flat), max(max(flat), min(flat) + 0.1), max(line["step"] for line in own) or 1
        pen.text((x0, y0 - 22), f"{name}, {last + 1} steps, {own[-1]['seconds']:.0f} s", INK, font())
        pen.rectangle((x0, y0, x0 + w, y0 + h), outline=PALE)
        for value, y in ((top, y0), (low, y0 + h - 10)):
            pen.text((x0 - 42, y), f"{10 ** value:.2g}", PALE, font(11))
        for i, symbol in enumerate(symbols):
            points = [(x0 + step / last * w, y0 + (top - math.log10(value)) / (top - low) * h)
                      for step, value in values[symbol]]
            if len(points) > 1:
                pen.line(points, LINES[i % len(LINES)], 2)
            for line in (line for line in looks if line["held_out"].get(symbol)):
                value = min(max(math.log10(abs(line["held_out"][symbol])), low), top)
                x, y = x0 + line["step"] / last * w, y0 + (top - value) / (top - low) * h
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), "white", LINES[i % len(LINES)])
            pen.text((x0 + i * min(62, w // len(symbols)), y0 + h + 6), symbol, LINES[i % len(LINES)], font(11))
    return image


def draw_report(run: Path, device: str = "cpu", data_folder: DataFolder | None = None) -> str:
    """Writes every picture that the finished stages allow into `run`/report; -> where. `data_folder`: what `scan` saw
    of the run's data on disk, where somebody has it already."""
    model, folder = load_run(run, device), run / "report"
    folder.mkdir(exist_ok=True)
    sections, images = on_disk(run, model, device, data_folder) if model.config.data else drawn(model)
    extra = []
    if {"T1", "T2"} & set(model.finished_stages):
        streams(model, images.to(device)).save(folder / "streams.png")
    if "U1" in model.finished_stages and not model.config.data:
        extra = routing_pictures(model, "two green circles")
        sheet([], extra=extra).save(folder / "routing.png")
    sheet(sections, extra=extra).save(folder / "summary.png")
    if (run / "log.jsonl").exists():  # not where every stage was taken over
        loss_curves(run).save(folder / "losses.png")
    return f"pictures after {model.finished_stages[-1]}: {folder / 'summary.png'}, and beside it losses.png and others"


def report_so_far(run: Path, device: str, stage: str, data_folder: DataFolder | None = None) -> str:
    """The same while training goes on, which is worth more than its pictures: what hinders them is said."""
    try:
        return draw_report(run, device, data_folder)
    except (ValueError, RuntimeError, OSError) as error:
        return f"no pictures after {stage}: {error}"


def on_disk(run: Path, model: SPAR, device: str, data_folder: DataFolder | None) -> tuple[list, Tensor]:
    """-> (sections, some held-out pictures)"""
    data_folder = data_folder or open_data(Path(model.config.data))
    before = load_run(run, device, upto="P1")
    sections = measure(model, before, data_folder, Protocol(count=8), figures=False)[1]
    test = DiskData(data_folder, model.config.side, model.config.seed, 0, "test", mirror="none")
    return sections, test.pictures(range(8))


def draw_data(run: Path, world: DrawnWorld) -> str:
    """Before there is anything that a run can do: `run`/report/data.png, what it is to learn; -> where."""
    (run / "report").mkdir(exist_ok=True)
    scenes, talks = world.conversations(range(8))
    requests, wanted = world.text_to_image_samples(range(8), 0.5)
    instructions, before, after = world.edit_samples(range(8), 0.0)
    sheet([("ask: a question, the answer", [([scene], "? ".join(talk[0]), None) for scene, talk in zip(scenes, talks)]),
           ("draw: a prompt, a picture of it", [([one], text, None) for one, text in zip(wanted, requests)]),
           ("edit: before, after", [([a, b], text, None) for a, b, text in zip(before, after, instructions)]),
           ]).save(run / "report" / "data.png")
    return f"what there is to learn: {run / 'report' / 'data.png'}"


@torch.no_grad()
def drawn(model: SPAR) -> tuple[list, Tensor]:
    """-> (sections, some test pictures). The judge says what is right; an answer must be the one right answer."""
    world, done = DrawnWorld(model.config.side, model.config.seed, "test"), set(model.finished_stages)
    images, sections, device = world.pictures(range(8)), [], model.device
    if done & {"T1", "T2"}:
        pairs = zip(images[:4], model.reconstruct(images.to(device)))
        sections.append(("reconstruct: source, reconstruction", [([a, b], "", None) for a, b in pairs]))
    elif "P2" in done:
        pairs = zip(images[:4], model.tokenizer.decode(model.pixel_latent(images.to(device)), world.side))
        sections.append(("pixel autoencoder: source, reconstruction", [([a, b], "", None) for a, b in pairs]))
    pictures, talks = world.conversations(range(8))
    turns = [talk[i % len(talk)] for i, talk in enumerate(talks)]
    replies = model.answer(pictures.to(device), [question for question, _ in turns])
    sections.append(("ask: a question, the model's answer (red: wrong)", [
        ([picture], f"{question}? {reply}", reply == answer)
        for picture, (question, answer), reply in zip(pictures, turns, replies)]))
    if "U1" in done:
        requests = world.prompts(range(8))
        results = model.generate(model.rewrite([request.text for request in requests]))[0].cpu()
        sections.append(("draw: a prompt, the model's picture (red: not what was asked for)", [
            ([picture], request.text, fulfils(objects, request))
            for picture, objects, request in zip(results, detect(results), requests)]))
    if "U2" in done:
        edits = [world.edits([3], kind)[0] for kind in EDIT_KINDS[:8]]
        sources, texts = draw([edit.source for edit in edits], world.side), [edit.instruction for edit in edits]
        results = model.generate(model.rewrite(texts, sources.to(device)), sources.to(device))[0].cpu()
        sections.append(("edit: before, after (red: not what was asked for)", [
            ([before, after], edit.instruction, succeeds(edit, after[None])[0])
            for before, after, edit in zip(sources, results, edits)]))
    return sections, images


@torch.no_grad()
def streams(model: SPAR, images: Tensor) -> Image.Image:
    """What each stream carries: the picture decoded from both latents, and with one of them set to zero."""
    f_v = model.tokenizer.features(images)
    z_s, z_p, z_f = model.tokenizer.latents(f_v)
    rows = [("source", images), ("z_s and z_p", model.tokenizer.decode(z_f, images.shape[-1]))]
    if z_s is not None and z_p is not None:
        for title, pair in (("z_s alone (z_p = 0)", (z_s, 0 * z_p)), ("z_p alone (z_s = 0)", (0 * z_s, z_p))):
            rows.append((title, model.tokenizer.decode(model.tokenizer.fuse(*pair), images.shape[-1])))
    return sheet([(title, [([picture], "", None) for picture in pictures]) for title, pictures in rows])
