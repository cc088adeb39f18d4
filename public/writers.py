"""Pictures as the official evaluators want them, so that a figure can be compared with the paper's.

    python evaluate.py RUN --write geneval evaluation_metadata.jsonl DIR     DIR/00000/metadata.jsonl, samples/0000K.png
    python evaluate.py RUN --write wise cultural_common_sense.json DIR       DIR/<prompt_id>.png
    python evaluate.py RUN --write imgedit singleturn.json DIR               DIR/<key>.png; its pictures lie beside it
    python evaluate.py RUN --write reconstruction PICTURES DIR               DIR/original, DIR/reconstruction: NAME.png

Prompts are read as their makers publish them and drawn as they stand, the paper's way. What is there already is not
drawn again. The judges are not here: GenEval's is a detector (github.com/djghosh13/geneval), WISE's and ImgEdit's are a
language model, rFID's is `pt_inception-2015-12-05`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from disk.files import Blob, inside, read_picture
from disk.reading import as_tensor
from plumbing.command import UserError, write_beside, write_text
from plumbing.pictures import to_image
from spar import SPAR, Protocol

Row = tuple[str, Blob | None, Path]  # words, the picture that they change, the picture to write
AT_ONCE = 16  # pictures
SIDE = 256  # of reconstructions (paper: ImageNet at 256 px)
SAMPLES = 4  # of each of GenEval's prompts


def entries(path: Path) -> list:
    """A JSON list or object, or JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
        content = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" \
            else json.loads(text)
        if not content:
            raise ValueError("it holds no prompts")
        return list(content.items()) if isinstance(content, dict) else content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def words(value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no prompt")
    return value


def geneval(path: Path, out: Path) -> list[Row]:
    rows = []
    for number, entry in enumerate(entries(path)):
        write_text(out / f"{number:05}" / "metadata.jsonl", json.dumps(entry))
        folder = out / f"{number:05}" / "samples"
        rows += [(words(entry["prompt"]), None, folder / f"{k:05}.png") for k in range(SAMPLES)]
    return rows


def wise(path: Path, out: Path) -> list[Row]:
    return [(words(entry["Prompt"]), None, out / f"{int(entry['prompt_id'])}.png") for entry in entries(path)]


def imgedit(path: Path, out: Path) -> list[Row]:
    if wrong := [key for key, _ in entries(path) if not key or Path(key).name != key]:
        raise ValueError(f"the key {wrong[0]!r} is no file's name")
    return [(words(entry["prompt"]), inside(path.parent, entry["id"]), out / f"{key}.png")
            for key, entry in entries(path)]


def opened(blobs: list[Blob], side: int) -> Tensor:
    return torch.stack([as_tensor(read_picture(blob), side, None) for blob in blobs])


def parts_left(rows: list, ready) -> Iterator[tuple[int, list]]:
    """(number of its first row, rows that are made together), without those that are there already."""
    for start in tqdm(range(0, len(rows), AT_ONCE), desc="writing"):
        part = rows[start:start + AT_ONCE]
        if not all(map(ready, part)):
            yield start, part


def write_drawings(model: SPAR, rows: list[Row], how: Protocol) -> None:
    for start, part in parts_left(rows, lambda row: row[2].exists()):
        texts, sources, places = zip(*part)
        references = opened(sources, model.config.side).to(model.device) if sources[0] else None
        pictures = model.generate(list(texts), references, how.seed + start, how.steps, how.guidance, how.sampler)[0]
        for picture, place in zip(pictures, places):
            write_beside(place, to_image(picture).save)


def write_reconstructions(model: SPAR, folder: Path, out: Path) -> None:
    """Pictures cut to a square of `SIDE` (a smaller run's own side), mirrored outwards to whole tokens, rebuilt and cut
    again."""
    side, token = min(SIDE, model.config.side), model.tokenizer.vision.token
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not names:
        raise UserError(f"{folder} holds no pictures")
    for _, part in parts_left(names, lambda path: (out / "reconstruction" / f"{path.stem}.png").exists()):
        images = opened([inside(folder, path.name) for path in part], side)
        more = -side % token
        padded = F.pad(images, (more // 2, more - more // 2) * 2, mode="reflect")
        copies = model.reconstruct(padded.to(model.device)).cpu()
        copies = copies[..., more // 2:more // 2 + side, more // 2:more // 2 + side]
        for path, image, copy in zip(part, images, copies):
            write_beside(out / "original" / f"{path.stem}.png", to_image(image).save)
            write_beside(out / "reconstruction" / f"{path.stem}.png", to_image(copy).save)


KINDS = {"geneval": geneval, "wise": wise, "imgedit": imgedit}


def write_for(kind: str, model: SPAR, source: Path, out: Path, how: Protocol) -> None:
    """`kind`: of KINDS, or reconstruction. Raises UserError, BadFile."""
    if kind == "reconstruction":
        return write_reconstructions(model, source, out)
    if kind not in KINDS:
        raise UserError(f"--write {kind}: one of {', '.join(KINDS)}, reconstruction")
    try:
        rows = KINDS[kind](source, out)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{source} is not {kind}'s ({type(error).__name__}: {error})") from None
    write_drawings(model, rows, how)
