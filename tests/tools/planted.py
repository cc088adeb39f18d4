"""Small data sets for the tests, sound ones and ones with planted faults."""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image


def picture(colour=(200, 40, 40), size=(20, 16), mode="RGB", kind="png", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, side: int = 16) -> bytes:
    file, value = io.BytesIO(), bytearray()
    state = seed * 2654435761 % 2**32
    for _ in range(3 * side * side):
        state = (1664525 * state + 1013904223) % 2**32
        value.append(state >> 24)
    Image.frombytes("RGB", (side, side), bytes(value)).save(file, "png")
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed_png(width: int, height: int, bits: int = 8) -> bytes:
    """A png that says to be so large, with hardly any data."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)) +
            chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for key, value in fields.items():
        setattr(header, key, value)
    tar.addfile(header, io.BytesIO(content))


def shard(path: Path, files: list[tuple], **options) -> Path:
    """`files`: (name, content) or (name, content, fields of the header)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content, *fields in files:
            add(tar, name, content, **(fields[0] if fields else {}))
    return path


COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "white": (250, 250, 250)}


def folder_of_captions(root: Path, count: int = 24) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        word, colour = list(COLOURS.items())[i % 4]
        (root / f"{i:03}.png").write_bytes(picture([c - i for c in colour]))
        (root / f"{i:03}.txt").write_text(f"a {word} field number {i}")
    return root


def shards(root: Path, count: int = 24, each: int = 8) -> Path:
    for start in range(0, count, each):
        files = []
        for i in range(start, min(start + each, count)):
            word, colour = list(COLOURS.items())[i % 4]
            talk = [{"from": "human", "value": "<image>\nwhat colour is it ?"}, {"from": "gpt", "value": word}]
            files += [(f"{i:03}.png", picture([c - i for c in colour])),
                      (f"{i:03}.txt", f"a {word} field number {i}".encode()),
                      (f"{i:03}.json", json.dumps({"conversations": talk}).encode())]
        shard(root / f"{start // each:03}.tar", files)
    return root


def llava(root: Path, count: int = 24) -> Path:
    (root / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        word, colour = list(COLOURS.items())[i % 4]
        (root / "images" / f"{i}.jpg").write_bytes(picture(colour, kind="jpeg"))
        talk = [{"from": "human", "value": "<image>\nwhat colour ?"}, {"from": "gpt", "value": word},
                {"from": "human", "value": "and again ?"}, {"from": "gpt", "value": f"still {word}"}]
        records.append({"id": i, "image": f"images/{i}.jpg", "conversations": talk})
    records.append({"id": "words",
                    "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]})
    (root / "talks.json").write_text(json.dumps(records, indent=1))
    return root


def triples(root: Path, count: int = 24) -> Path:
    (root / "pictures").mkdir(parents=True)
    lines = []
    for i in range(count):
        for word, colour in (("red", COLOURS["red"]), ("blue", COLOURS["blue"])):
            (root / "pictures" / f"{i}-{word}.webp").write_bytes(picture([c - i for c in colour], kind="webp"))
        lines.append(json.dumps({"source": f"pictures/{i}-red.webp", "target": f"pictures/{i}-blue.webp",
                                 "instruction": "make it blue"}))
    (root / "edits.jsonl").write_text("\n".join(lines) + "\n")
    return root


def everything(root: Path) -> Path:
    """All kinds of data that the nine stages ask for."""
    shards(root / "a"), triples(root / "b")
    return root


def gif() -> bytes:
    return picture(kind="gif")


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(file, "webp", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def record(**fields) -> str:
    return json.dumps([{"id": 1, **fields}])


TALK = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "this"}]

def stopping_tar(path: Path) -> None:
    """Its third header is none."""
    shard(path, [("q.png", picture()), ("q.txt", b"a"), ("r.png", picture()), ("r.txt", b"a")])
    content = path.read_bytes()
    path.write_bytes(content[:2048] + b"\xaa" * 512 + content[2560:])


# name -> (files to write into a sound folder of captions: name -> content, or a function of the folder; words of the
# fault)
FAULTS = {
    "missing picture": ({"x.txt": b"a caption"}, "has no picture"),
    "empty caption": ({"x.png": picture(), "x.txt": b"  \n"}, "is empty"),
    "0-byte caption": ({"x.png": picture(), "x.txt": b""}, "0 bytes"),
    "0-byte picture": ({"x.png": b"", "x.txt": b"a"}, "0 bytes"),
    "broken jpg": ({"x.jpg": picture(kind="jpeg", size=(64, 64))[:500], "x.txt": b"a"}, "is broken"),
    "broken png": ({"x.png": noise(1)[:300], "x.txt": b"a"}, "is broken"),
    "text as a jpg": ({"x.jpg": b"<html>not found</html>", "x.txt": b"a"}, "no png, jpg or webp inside"),
    "gif": ({"x.gif": gif()}, "is a gif"),
    "gif by another name": ({"x.png": gif(), "x.txt": b"a"}, "no png, jpg or webp inside"),
    "animated webp": ({"x.webp": animated(), "x.txt": b"a"}, "2 frames"),
    "16-bit png": ({"x.png": picture(mode="I;16"), "x.txt": b"a"}, "16 or more bits"),
    "CMYK jpg": ({"x.jpg": picture(mode="CMYK", kind="jpeg"), "x.txt": b"a"}, "is CMYK"),
    "endless strip": ({"x.png": picture(size=(4000, 2)), "x.txt": b"a"}, "longer than 20 to 1"),
    "non-UTF-8 caption": ({"x.png": picture(), "x.txt": "schön".encode("latin-1")}, "not UTF-8"),
    "two pictures of one key": ({"x.png": picture(), "x.jpg": picture(kind="jpeg"), "x.txt": b"a"}, "twice"),
    "half an edit": ({"x.source.png": picture(), "x.instruction.txt": b"do"}, "an edit needs"),
    "edit without words": ({"x.source.png": picture(), "x.target.png": picture()}, "an edit needs"),
    "link": (lambda root: (root / "x.png").symlink_to(root / "000.png"), "is a link"),
    "link to a folder": (lambda root: (root / "x").symlink_to("/etc"), "is a link"),
    "pipe": (lambda root: os.mkfifo(root / "x.png"), "no plain file"),
    "name that is no UTF-8": (lambda root: open(os.fsencode(root) + b"/\xff.png", "wb").close(), "not UTF-8"),
    "packed shard": ({"x.tar.gz": b"\x1f\x8b"}, "is packed"),
    "0-byte tar": ({"x.tar": b""}, "0 bytes"),
    "garbage tar": ({"x.tar": b"garbage" * 1000}, "no plain tar"),
    "truncated tar": (lambda root: (shard(root / "x.tar", [("q.png", noise(3, 64)), ("q.txt", b"a")]),
                                    (root / "x.tar").write_bytes((root / "x.tar").read_bytes()[:4000])),
                      "past the shard's end"),
    "tar that stops": (lambda root: stopping_tar(root / "x.tar"), "stops being a tar"),
    "duplicate key in a tar": (lambda root: shard(root / "x.tar",
                                                  [("q.png", picture()), ("q.png", picture()), ("q.txt", b"a")]),
                               "twice"),
    "link in a tar": (lambda root: shard(root / "x.tar",
                                         [("q.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})]),
                      "is a link"),
    "absolute name in a tar": (lambda root: shard(root / "x.tar", [("/q.png", picture())]), "absolute path"),
    "name with .. in a tar": (lambda root: shard(root / "x.tar", [("../q.png", picture())]), "leads out"),
    "wrong JSON": ({"x.json": b'[{"image": '}, "is broken"),
    "JSON of another kind": ({"x.json": b'{"a": 1} 7'}, "is broken"),
    "no records": ({"x.json": b"[]"}, "no records"),
    "wrong type of conversations": ({"x.json": record(image="000.png", conversations="hello").encode()},
                                    "must list turns by twos"),
    "a turn too few": ({"x.json": record(image="000.png", conversations=TALK[:1]).encode()}, "must list turns by twos"),
    "unknown speaker": ({"x.json": record(image="000.png",
                                          conversations=[{"from": "user", "value": "a"}, TALK[1]]).encode()},
                        "from 'human' to 'gpt'"),
    "value that is a number": ({"x.json": record(image="000.png",
                                                 conversations=[TALK[0], {"from": "gpt", "value": 7}]).encode()},
                               "is a int"),
    "image token without image": ({"x.json": record(conversations=[{"from": "human", "value": "<image> what"},
                                                                   TALK[1]]).encode()}, "<image> without a picture"),
    "record of a picture that is missing": ({"x.json": record(image="gone.png", conversations=TALK).encode()},
                                            "is not in the data's folder"),
    "absolute path": ({"x.json": record(image="/etc/passwd", conversations=TALK).encode()}, "absolute path"),
    "path that leads out": ({"x.json": record(image="../../secret.png", conversations=TALK).encode()}, "leads out"),
    "image that is a number": ({"x.json": record(image=7, conversations=TALK).encode()}, "is a int"),
    "half a character": ({"x.json": record(image="000.png",
                                           conversations=[TALK[0], {"from": "gpt", "value": "\ud800"}]).encode()},
                         "half a character"),
    "key record that is a list": ({"x.png": picture(), "x.json": b"[1]"}, "is a list"),
}


def plant(name: str, root: Path) -> str:
    """A sound folder with one fault; -> words of its line."""
    folder_of_captions(root)
    files, words = FAULTS[name]
    if callable(files):
        files(root)
    else:
        for file, content in files.items():
            (root / file).write_bytes(content)
    return words
