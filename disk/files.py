"""Reading what a stranger made: pictures, words, records and tar shards, of which nothing may run code, leave its
folder or fill the memory.

A `Blob` is a range of bytes of a plain file, with a name for people: a whole file, a member of a tar shard, or one
record of a JSON list. Nothing is ever unpacked. Whatever is wrong raises `BadFile`, in one line that says the mend.
"""

import csv
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import unicodedata
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # of one picture
MAX_PICTURE = 100 << 20  # bytes of its file
MAX_TEXT = 1 << 20  # bytes of one text or record
MAX_HEADER = 1 << 16  # bytes of a name in a tar
CONTENT = 1 << 16  # bytes that tell one picture from another
BEHIND = "; it and what is behind it are not read"  # of a list or table
LONGEST_SHAPE = 20  # long side ÷ short side of a picture


class BadFile(ValueError):
    """What is wrong with a file or a sample, and the mend, in one line."""


class Blob(NamedTuple):
    path: str
    start: int
    size: int
    name: str  # inside the folder, or inside the shard or list `file`
    file: str = ""

    @property
    def shown(self) -> str:
        """Its name for people; never taken apart again."""
        return printable(f"{self.file}:{self.name}" if self.file else self.name)

    def read(self, limit: int) -> bytes:
        if self.size == 0:
            raise BadFile(f"{self.shown} has 0 bytes: write it again or remove it")
        if self.size > limit:
            raise BadFile(f"{self.shown} has {self.size} bytes, more than {limit}: shrink it")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise BadFile(f"{self.shown} cannot be read ({error.strerror}): give the right to read it, "
                          "or remove it") from None
        if len(data) < self.size:
            raise BadFile(f"{self.shown} ends too early: write it again")
        return data


def content_of(blob: Blob) -> int:
    """By which a picture, or a record, is known again: of its size and its first 64 KiB."""
    data = blob._replace(size=min(blob.size, CONTENT)).read(CONTENT)
    return int.from_bytes(hashlib.sha256(blob.size.to_bytes(8, "little") + data).digest()[:7], "little")


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
    if not name or not name.isprintable() and any(unicodedata.category(c) == "Cc" for c in name):
        raise BadFile("its name is empty or has control characters: rename it")


def inside(root: Path, name: str) -> Blob:
    """The plain file `name` under `root`; links lead nowhere."""
    check_name(name)
    try:
        path, wanted = root / name, os.path.join(os.path.realpath(root), os.path.normpath(name))
        if os.path.normcase(os.path.realpath(path)) != os.path.normcase(wanted):
            raise BadFile(f"{printable(name)} is a link or behind one: put the file itself there")
        status = os.lstat(path)
    except OSError:
        raise BadFile(f"{printable(name)} is not in the data's folder: add it, or remove the record") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(f"{printable(name)} is no plain file: remove it")
    return Blob(str(path), 0, status.st_size, name)


# ---------------------------------------------------------------- one file's content


def read_picture(blob: Blob) -> Image.Image:
    """-> RGB, upright (EXIF), transparency on white. Refuses what would lose something: more frames, 16 bits, CMYK."""
    data = without_words(blob.read(MAX_PICTURE))
    try:
        with (warnings.catch_warnings(action="ignore"),
              Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image):
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise BadFile(f"{blob.shown} has {w}×{h} pixels, more than {MAX_PIXELS // 10**6} million: shrink it")
            if max(w, h) > LONGEST_SHAPE * min(w, h):
                raise BadFile(f"{blob.shown} is {w}×{h}, longer than {LONGEST_SHAPE} to 1: crop it")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise BadFile(f"{blob.shown} has {image.n_frames} frames: save one of them")
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                raise BadFile(f"{blob.shown} is {image.mode}: save it as RGB")
            if image.mode in ("I", "F") or ";" in image.mode:
                raise BadFile(f"{blob.shown} has 16 or more bits a channel: save it with 8")
            image = upright(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadFile(f"{blob.shown} is no png, jpg or webp inside: save it as one") from None
    except BadFile:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        reason = printable(str(error) or type(error).__name__)
        raise BadFile(f"{blob.shown} is broken ({reason}): write it again or remove it") from None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, where that can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises a dozen kinds for metadata that are broken
        return image


def without_words(data: bytes) -> bytes:
    """A png without its texts and its profile, which may be broken or huge; anything else as it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at:at + 4], "big")
        parts += [data[at:end]] * (data[at + 4:at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"))
        at = end
    return b"".join(parts)


def read_text(blob: Blob) -> str:
    """-> words on one line."""
    try:
        text = blob.read(MAX_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadFile(f"{blob.shown} is not UTF-8: save it as UTF-8") from None
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if not text:
        raise BadFile(f"{blob.shown} is empty: write a caption or remove it with its picture")
    return text


def read_record(blob: Blob) -> dict:
    """One JSON object, or the row of a table as one."""
    try:
        text = blob.read(MAX_TEXT).decode("utf-8-sig")
        record = dict(zip(columns(blob.path), next(csv.reader([text])))) if blob.path.lower().endswith(".csv") else \
            json.loads(text)
    except UnicodeDecodeError:
        raise BadFile(f"{blob.shown} is not UTF-8: save it as UTF-8") from None
    except RecursionError:
        raise BadFile(f"{blob.shown} is nested too deep: a record is one flat object") from None
    except ValueError as error:
        raise BadFile(f"{blob.shown} is no JSON ({printable(str(error))}): write it with a JSON library") from None
    if not isinstance(record, dict):
        raise BadFile(f"{blob.shown} is a {type(record).__name__}, where an object {{…}} is wanted")
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
    talk, system = record.get("conversations"), ""
    if isinstance(talk, list) and talk and isinstance(talk[0], dict) and talk[0].get("from") == "system":
        talk, system = talk[1:], text_field(talk[0], "value", name) + " "
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
        question, system = system + question.replace("<image>", " "), ""  # what a system turn says stands before all
        pairs.append((" ".join(question.split()), text_field(gpt, "value", name)))
    return pairs


# ---------------------------------------------------------------- files that hold many


def records(path: Path, name: str) -> Iterator[Blob]:
    """The objects of a JSON list, of JSON lines, or the rows of a table (csv), one after the other; the file is never
    in memory as a whole. Raises BadFile where it is none of these; what came before has been given."""
    if path.suffix.lower() == ".csv":
        yield from islice(rows(path, name), 1, None)
        return
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
                raise BadFile(f"record {number} is nested too deep: a record is one flat object{BEHIND}") from None
            except ValueError:
                raise BadFile(f"record {number} is broken or longer than {MAX_TEXT} bytes: "
                              f"a list of objects is wanted, [{{…}}, {{…}}]{BEHIND}") from None
            yield Blob(str(path), file.tell() - len(text) + at, end - at, str(number), name)
            at, number = end, number + 1


def rows(path: Path, name: str) -> Iterator[Blob]:
    """The rows of a table, the one with the columns' names first. A row goes on while a quote is open; raises BadFile
    where one stays open."""
    with open(path, "rb") as file:
        start, quotes, number = 3 if file.read(3) == b"\xef\xbb\xbf" else 0, 0, 0
        file.seek(start)
        for line in iter(lambda: file.readline(MAX_TEXT), b""):
            quotes += line.count(b'"')
            if quotes % 2 == 0 and line.strip():
                yield Blob(str(path), start, file.tell() - start, str(number), name)
                number += 1
            if quotes % 2 == 0:
                start = file.tell()
        if quotes % 2:
            raise BadFile(f"a quote stays open behind row {number - 1}{BEHIND}")


@lru_cache(64)
def columns(path: str) -> list[str]:
    """The names that a table's first row gives its columns."""
    first = next(rows(Path(path), path)).read(MAX_TEXT).decode("utf-8-sig")
    return next(csv.reader([first]))


class Header(tarfile.TarInfo):
    """A member's header, long names bounded: they are read into memory."""

    def _proc_member(self, tar):
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and self.size > MAX_HEADER:
            raise tarfile.HeaderError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)


def members(path: Path, name: str) -> Iterator[tuple[str, Blob | BadFile]]:
    """A shard read as a stream, header by header, several tars written one behind the other too: (name, plain file or
    what is wrong with it). Raises BadFile where it stops being a tar."""
    at = 0
    try:
        size = os.path.getsize(path)
        if size == 0:
            raise BadFile("has 0 bytes: write it again or remove it")
        with open(path, "rb") as file:
            while at < size:
                file.seek(at)
                with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:
                    for member in tar:
                        tar.members = []  # a shard of millions would stay in memory
                        if not member.isdir():
                            yield member.name, a_file(member, path, name, size)
                    end = next_block(file, tar.offset)
                if end == at:  # no header there
                    raise BadFile(f"stops being a tar at byte {at}: write the shard again")
                at = end
    except BadFile:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        reason = printable(str(error).splitlines()[0])
        raise BadFile(f"is no plain tar from byte {at} on ({reason}): write the shard again, uncompressed") from None


def a_file(member: tarfile.TarInfo, path: Path, name: str, size: int) -> Blob | BadFile:
    """A shard's member, or why it is none. Raises BadFile where it ends behind the shard."""
    if not member.isfile() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no plain file"
        return BadFile(f"is {kind}: put the file itself into the shard")
    if member.offset_data + member.size > size:
        raise BadFile(f"{printable(member.name)} reaches past the shard's end: write the shard again")
    try:
        check_name(member.name)
    except BadFile as bad:
        return bad
    return Blob(str(path), member.offset_data, member.size, member.name, name)


def next_block(file, at: int) -> int:
    """Where in a tar's file, from its end mark on, the next block that is not all zeros begins; else its length."""
    file.seek(at)
    while piece := file.read(1 << 20):
        if rest := piece.lstrip(b"\0"):
            return at + (len(piece) - len(rest)) // 512 * 512
        at += len(piece)
    return at
