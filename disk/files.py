"""Reading what a stranger made: pictures, words, records and tar shards, of which nothing may run code, leave its
folder or fill the memory.

A `Blob` is a range of bytes of a plain file, with a name for people: a whole file, a member of a tar shard, or one
record of a JSON list. Nothing is ever unpacked. Whatever is wrong raises `BadFile`, in one line that says the mend.
"""

import io
import json
import os
import re
import stat
import tarfile
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # of one picture
MAX_PICTURE = 100 << 20  # bytes of its file
MAX_TEXT = 1 << 20  # bytes of one text or record
MAX_HEADER = 1 << 16  # bytes of a name in a tar
LONGEST_SHAPE = 20  # long side ÷ short side of a picture


class BadFile(ValueError):
    """What is wrong with a file or a sample, and the mend, in one line."""


class Blob(NamedTuple):
    path: str
    start: int
    size: int
    name: str  # for people, its ending tells the kind: "shard.tar:000.jpg"

    def read(self, limit: int) -> bytes:
        if self.size == 0:
            raise BadFile(f"{self.name} has 0 bytes: write it again or remove it")
        if self.size > limit:
            raise BadFile(f"{self.name} has {self.size} bytes, more than {limit}: shrink it")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise BadFile(f"{self.name} cannot be read ({error.strerror}): give the right to read it, "
                          "or remove it") from None
        if len(data) < self.size:
            raise BadFile(f"{self.name} ends too early: write it again")
        return data


# ---------------------------------------------------------------- names


def printable(name: str) -> str:
    """A name as it may be printed: one line, no control characters, not endless."""
    clean = "".join(c if c.isprintable() else "?" for c in name)
    return clean if len(clean) <= 120 else clean[:117] + "…"


def check_name(name: str) -> None:
    """Raises BadFile for a name inside a data set that is absolute, leads out of it, or is not text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadFile("its name is not UTF-8: rename it") from None
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        raise BadFile("its name is an absolute path: name it relative to the data's folder")
    if ".." in name.replace("\\", "/").split("/"):
        raise BadFile("its name leads out of the data's folder: remove the '..'")
    if not name or any(unicodedata.category(c) == "Cc" for c in name):
        raise BadFile("its name is empty or has control characters: rename it")


def inside(root: Path, name: str) -> Blob:
    """The plain file `name` under `root`; links lead nowhere."""
    check_name(name)
    try:
        path = root / name
        if os.path.realpath(path) != os.path.join(os.path.realpath(root), os.path.normpath(name)):
            raise BadFile(f"{printable(name)} is a link or behind one: put the file itself there")
        status = os.lstat(path)
    except OSError:
        raise BadFile(f"{printable(name)} is not in the data's folder: add it, or remove the record") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(f"{printable(name)} is no plain file: remove it")
    return Blob(str(path), 0, status.st_size, printable(name))


# ---------------------------------------------------------------- one file's content


def read_picture(blob: Blob) -> Image.Image:
    """-> RGB, upright (EXIF), transparency on white. Refuses what would lose something: more frames, 16 bits, CMYK."""
    data = blob.read(MAX_PICTURE)
    try:
        with (warnings.catch_warnings(action="ignore"),
              Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image):
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise BadFile(f"{blob.name} has {w}×{h} pixels, more than {MAX_PIXELS // 10**6} million: shrink it")
            if max(w, h) > LONGEST_SHAPE * min(w, h):
                raise BadFile(f"{blob.name} is {w}×{h}, longer than {LONGEST_SHAPE} to 1: crop it")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise BadFile(f"{blob.name} has {image.n_frames} frames: save one of them")
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                raise BadFile(f"{blob.name} is {image.mode}: save it as RGB")
            if image.mode in ("I", "F") or ";" in image.mode:
                raise BadFile(f"{blob.name} has 16 or more bits a channel: save it with 8")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadFile(f"{blob.name} is no png, jpg or webp inside: save it as one") from None
    except BadFile:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        reason = printable(str(error) or type(error).__name__)
        raise BadFile(f"{blob.name} is broken ({reason}): write it again or remove it") from None


def read_text(blob: Blob) -> str:
    """-> words on one line."""
    try:
        text = blob.read(MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadFile(f"{blob.name} is not UTF-8: save it as UTF-8") from None
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if not text:
        raise BadFile(f"{blob.name} is empty: write a caption or remove it with its picture")
    return text


def read_record(blob: Blob) -> dict:
    """One JSON object."""
    try:
        record = json.loads(blob.read(MAX_TEXT).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadFile(f"{blob.name} is not UTF-8: save it as UTF-8") from None
    except RecursionError:
        raise BadFile(f"{blob.name} is nested too deep: a record is one flat object") from None
    except ValueError as error:
        raise BadFile(f"{blob.name} is no JSON ({printable(str(error))}): write it with a JSON library") from None
    if not isinstance(record, dict):
        raise BadFile(f"{blob.name} is a {type(record).__name__}, where an object {{…}} is wanted")
    return record


def text_field(record: dict, key: str, name: str) -> str:
    """A record's text. Raises BadFile where it is missing, no text or empty."""
    value = record.get(key)
    if not isinstance(value, str):
        raise BadFile(f"{name}: {key!r} is {'missing' if value is None else 'a ' + type(value).__name__}, "
                      "where a text is wanted")
    value = unicodedata.normalize("NFC", " ".join(value.split()))
    if not value:
        raise BadFile(f"{name}: {key!r} is empty: fill it in or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadFile(f"{name}: {key!r} holds half a character: write it anew") from None
    return value


def turns(record: dict, name: str, has_image: bool) -> list[tuple[str, str]]:
    """LLaVA's conversations -> (question, answer) pairs."""
    talk = record.get("conversations")
    if not isinstance(talk, list) or not talk or len(talk) % 2 or not all(isinstance(turn, dict) for turn in talk):
        raise BadFile(f"{name}: 'conversations' must list turns by twos, "
                      '{"from": "human", …} then {"from": "gpt", …}')
    pairs = []
    for human, gpt in zip(talk[::2], talk[1::2]):
        if human.get("from") != "human" or gpt.get("from") != "gpt":
            raise BadFile(f"{name}: turns must go from 'human' to 'gpt' and back")
        question = text_field(human, "value", name)
        if "<image>" in question and not has_image:
            raise BadFile(f"{name}: <image> without a picture: add 'image' or remove the sign")
        pairs.append((" ".join(question.replace("<image>", " ").split()), text_field(gpt, "value", name)))
    return pairs


# ---------------------------------------------------------------- files that hold many


def records(path: Path, name: str) -> Iterator[Blob]:
    """The objects of a JSON list, or of JSON lines, one after the other; the file is never in memory as a whole.
    Raises BadFile where it is neither."""
    decoder, between = json.JSONDecoder(), re.compile(r"[ \t\r\n,\[\]]*")
    with open(path, "rb") as file:
        file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)
        text, at, number = "", 0, 0  # latin-1: a character is a byte, so places in it are places in the file
        while True:
            if len(text) - at < MAX_TEXT:
                text, at = text[at:] + file.read(4 * MAX_TEXT).decode("latin-1"), 0
            at = between.match(text, at).end()
            if at == len(text):
                return
            try:
                if text[at] != "{":
                    raise ValueError
                _, end = decoder.raw_decode(text, at)
            except RecursionError:
                raise BadFile(f"{name}: record {number} is nested too deep: a record is one flat object") from None
            except ValueError:
                raise BadFile(f"{name}: record {number} is broken or longer than {MAX_TEXT} bytes: "
                              "a list of objects is wanted, [{…}, {…}]") from None
            yield Blob(str(path), file.tell() - len(text) + at, end - at, f"{name}[{number}].json")
            at, number = end, number + 1


class Header(tarfile.TarInfo):
    """A member's header, long names bounded: they are read into memory."""

    def _proc_member(self, tar):
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and self.size > MAX_HEADER:
            raise tarfile.HeaderError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)


def members(path: Path, name: str) -> Iterator[Blob | tuple[str, BadFile]]:
    """A shard read as a stream, header by header: its plain files, and for what is none (name, what is wrong).
    Raises BadFile where it stops being a tar."""
    size = os.path.getsize(path)
    if size == 0:
        raise BadFile(f"{name} has 0 bytes: write it again or remove it")
    try:
        with tarfile.open(path, "r:", tarinfo=Header) as tar:
            for member in tar:
                tar.members = []  # a shard of millions would stay in memory
                if member.isdir():
                    continue
                full = f"{name}:{printable(member.name)}"
                if member.isfile() and not member.issparse():
                    if member.offset_data + member.size > size:
                        raise BadFile(f"{full} reaches past the shard's end: write the shard again")
                    try:
                        check_name(member.name)
                        yield Blob(str(path), member.offset_data, member.size, full)
                    except BadFile as bad:
                        yield member.name, bad
                else:
                    kind = "a link" if member.issym() or member.islnk() else "no plain file"
                    yield member.name, BadFile(f"is {kind}: put the file itself into the shard")
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(512).strip(b"\0"):
                raise BadFile(f"{name} stops being a tar at byte {end}: write the shard again")
    except BadFile:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        reason = printable(str(error).splitlines()[0])
        raise BadFile(f"{name} is no plain tar ({reason}): write the shard again, uncompressed") from None
