"""Data on disk: what a folder holds, found out by looking, and the order in which training reads it.

    x.jpg|png|webp + x.txt                          a caption; x.json may hold {"conversations": …} or {"caption": …}
    x.source.png + x.target.png + x.instruction.txt an edit
    000.tar 001.tar …                               the same names inside (WebDataset: key = name up to the first dot)
    *.json|jsonl  [{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}, …]      LLaVA
    *.json|jsonl  [{"source": …, "target": …, "instruction": …}, …]                                             edits

All of it may stand in one folder, and in folders inside. A folder `test` is held out; without one, one key in twenty is.

    python data.py --check PATH          what is there, and for every fault the file, the key and the mend
    python data.py --build-vocab PATH    its byte-pair vocabulary, written to PATH/vocabulary.json

Sample `number` of a stage is a pure function of (seed, stage, number), a broken one's substitute included.
"""

import hashlib
import os
import random
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field as also
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from files import BadFile, Blob, check_name, field, inside, members, read_picture, read_record, read_text, records, shown, turns

PICTURES = ("jpg", "jpeg", "png", "webp")
ROLES = {"txt": "words", "json": "record", "instruction.txt": "instruction",
         **{f"{role}{ext}": name for ext in PICTURES for role, name in (("", "image"), ("source.", "source"), ("target.", "target"))}}
LEFT_ALONE = ("md", "license", "csv", "html", "pdf", "yaml", "yml", "sha256", "part")  # stands beside data, is none
OTHER_PICTURES = ("gif", "bmp", "tif", "tiff", "heic", "avif", "svg", "jp2", "ico", "psd")
SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|anticlockwise|mirror\w*)\b", re.IGNORECASE)
DESCRIBE = "describe the picture"  # what is asked for a caption
WINDOW = 1024  # shards are read forward, and mixed inside windows of so many samples
SUBSTITUTES = 20  # tried in a bad sample's place


@dataclass
class Sample:
    """What one key has; blobs, so that a sample is read only when its turn comes."""

    key: str
    unit: int  # which file it came from: what is in one shard is read together
    held_out: bool
    has: dict[str, Blob] = also(default_factory=dict)  # role -> where it is

    def record(self) -> dict:
        return read_record(self.has["record"]) if "record" in self.has else {}

    def caption(self) -> str:
        if "words" in self.has:
            return read_text(self.has["words"])
        return field(self.record(), "caption", self.has["record"].name)

    def instruction(self) -> str:
        if "record" in self.has:
            return field(self.record(), "instruction", self.has["record"].name)
        return read_text(self.has["instruction" if "instruction" in self.has else "words"])

    def turns(self) -> list[tuple[str, str]]:
        return turns(self.record(), self.has["record"].name, "image" in self.has)

    def said(self) -> list[tuple[str, str]]:
        """All questions and answers about the picture; the last one asks for the caption, where there is one. One reading."""
        record = self.record()
        pairs = turns(record, self.has["record"].name, "image" in self.has) if "conversations" in record else []
        if "words" in self.has:
            return [*pairs, (DESCRIBE, read_text(self.has["words"]))]
        return [*pairs, (DESCRIBE, field(record, "caption", self.has["record"].name))] if "caption" in record else pairs


@dataclass
class Found:
    """What `look` saw. `kinds`: what a sample is good for -> the samples; a sample may serve several."""

    root: Path
    kinds: dict[str, list[Sample]] = also(default_factory=lambda: {"captions": [], "talks": [], "edits": [], "texts": [], "pictures": []})
    faults: list[tuple[str, str, str]] = also(default_factory=list)  # file, key, what is wrong and the mend
    layouts: dict[str, int] = also(default_factory=dict)  # layout -> samples
    left_alone: int = 0

    def samples(self, split: str = "train") -> list[Sample]:
        once = {id(sample): sample for samples in self.kinds.values() for sample in samples if sample.held_out == (split == "test")}
        return list(once.values())

    def texts(self):
        """Every text of training's samples, for a vocabulary; what cannot be read is passed over."""
        for sample in self.samples():
            has = sample.has
            ways = ([sample.instruction] if "source" in has else
                    [sample.caption] * ("words" in has or "record" in has) + [sample.turns] * ("record" in has))
            for way in ways:
                try:
                    found = way()
                    yield from [found] if isinstance(found, str) else [text for pair in found for text in pair]
                except BadFile:
                    pass
        yield from (DESCRIBE, "caption")


# ---------------------------------------------------------------- looking


def look(root: Path) -> Found:
    """Finds the samples under `root`. Reads names, headers and records, no pictures. Raises BadFile where there is no folder."""
    if not root.is_dir():
        raise BadFile(f"--data {root}: no such folder")
    found, listed, lists = Found(root), {}, []

    def fault(name: str, key: str, what) -> None:
        found.faults.append((shown(name), shown(key), str(what)))

    def place(groups: dict, name: str, blob: Blob, unit: int) -> None:
        """One file into its key's sample."""
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        ending, key = ending.lower(), f"{folder}/{stem}" if folder else stem
        role = ROLES.get(ending)
        if role is None:
            last = ending.rpartition(".")[2]
            if last in OTHER_PICTURES:
                fault(blob.name, key, f"is a {last}: save it as png, jpg or webp")
            elif last in PICTURES or last in ("txt", "json"):
                fault(blob.name, key, f"'.{ending}' means nothing here: name it key.{last}, key.source.{last} or key.target.{last}")
            else:
                found.left_alone += 1
            return
        sample = groups.setdefault(key, Sample(key, unit, name.startswith("test/")))
        if role in sample.has:
            fault(blob.name, key, f"has its {role} twice: give each sample a key of its own")
        else:
            sample.has[role] = blob

    for unit, path in enumerate(plain_files(root, fault)):
        name = path.relative_to(root).as_posix()
        ending = name.rpartition(".")[2].lower()
        if ending == "tar":
            groups = {}
            try:
                for member in members(path, name):
                    if isinstance(member, Blob):
                        inner = member.name.split(":", 1)[1].removeprefix("./")
                        place(groups, ("test/" if name.startswith("test/") else "") + inner, member, unit)
                    else:
                        fault(name, *member)
            except BadFile as bad:
                fault(name, "", bad)
            sort_out(groups.values(), found, fault, "shards")
        elif re.search(r"\.(tar\.\w+|tgz|zip|7z|rar|parquet|arrow)$", name.lower()):
            fault(name, "", "is packed: unpack it, or store it as a plain .tar")
        elif ending == "jsonl" or ending == "json" and path.name != "vocabulary.json":
            lists.append((unit, name, path))  # a sample's own record, or a list: told by whether there is a picture of that key
        elif path.name != "vocabulary.json":
            place(listed, name, Blob(str(path), 0, path.lstat().st_size, shown(name)), unit)
    for unit, name, path in lists:
        if name.partition(".")[0] in listed and name.endswith(".json"):
            place(listed, name, Blob(str(path), 0, path.lstat().st_size, shown(name)), unit)
            continue
        try:
            blobs = list(records(path, shown(name)))
            if not blobs:
                raise BadFile(f"{shown(name)} has no records: a list of objects is wanted, [{{…}}, {{…}}]")
        except BadFile as bad:
            fault(name, "", bad)
            continue
        for number, blob in enumerate(blobs):
            read_listed(path.parent, Sample(f"{name}#{number}", unit, name.startswith("test/"), {"record": blob}), found, fault, listed)
    sort_out(listed.values(), found, fault, "folder")
    if found.kinds["pictures"] and not any(sample.held_out for sample in found.kinds["pictures"]):
        for sample in found.samples():
            sample.held_out = int(hashlib.sha256(sample.key.encode()).hexdigest(), 16) % 20 == 0
    return found


def plain_files(root: Path, fault: Callable) -> list[Path]:
    """Sorted by name; what is a link, no plain file or has no name in UTF-8 is a fault. Names with a leading dot are passed over."""
    files = []
    for folder, folders, names in os.walk(root):
        for name in sorted(folders + names):
            path = Path(folder) / name
            full = path.relative_to(root).as_posix()
            mode = path.lstat().st_mode
            if name.startswith("."):
                folders[:] = [other for other in folders if other != name]
                continue
            try:
                check_name(full)
                if stat.S_ISLNK(mode):
                    raise BadFile("is a link: put the file itself there")
                if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                    raise BadFile("is no plain file: remove it")
            except BadFile as bad:
                fault(full, "", bad)
                folders[:] = [other for other in folders if other != name]
                continue
            files += [path] if stat.S_ISREG(mode) else []
        folders.sort()
    return sorted(files)


def read_listed(folder: Path, sample: Sample, found: Found, fault: Callable, listed: dict) -> None:
    """One record of a list: LLaVA's, or an edit. The pictures that it names, from the list's own `folder` on, are no samples of
    their own."""
    blob = sample.has["record"]
    try:
        record = read_record(blob)
        wanted = ("source", "target") if "instruction" in record else ("image",) if "image" in record else ()
        for role in wanted:
            name = record.get(role)
            if not isinstance(name, str):
                raise BadFile(f"{blob.name}: {role!r} is {'missing' if name is None else 'a ' + type(name).__name__}, "
                              "where a picture's name is wanted")
            sample.has[role] = inside(folder, name)
            bare = os.path.relpath(folder / name, found.root).partition(".")[0]
            if bare in listed and set(listed[bare].has) == {"image"}:
                del listed[bare]
        if "instruction" in record:
            sample.instruction()
        else:
            sample.turns()
    except BadFile as bad:
        fault(sample.key.partition("#")[0], str(sample.key.rpartition("#")[2]), bad)
        return
    keep(sample, found, "instruction triples" if "instruction" in record else "LLaVA records")


def sort_out(samples, found: Found, fault: Callable, layout: str) -> None:
    """What each key of a folder or shard is good for; what lacks a part is a fault."""
    for sample in samples:
        has, blob = sample.has, next(iter(sample.has.values()))
        file = blob.name.partition(":")[0]
        try:
            if "source" in has or "target" in has:
                if not {"source", "target"} <= has.keys() or not {"instruction", "words", "record"} & has.keys():
                    raise BadFile(f"an edit needs key.source.png, key.target.png and key.instruction.txt; this has {', '.join(has)}")
            elif "image" not in has:
                raise BadFile(f"{blob.name} has no picture: add key.png (or jpg, webp) or remove it")
            for part in has.values():
                if part.size == 0:
                    raise BadFile(f"{part.name} has 0 bytes: write it again or remove it")
            if "record" in has and "source" not in has:
                record = sample.record()
                if "conversations" in record:
                    sample.turns()
                elif "caption" in record and "words" not in has:
                    sample.caption()
        except BadFile as bad:
            fault(file, sample.key, bad)
            continue
        keep(sample, found, layout)


def keep(sample: Sample, found: Found, layout: str) -> None:
    kinds, has = found.kinds, sample.has
    found.layouts[layout] = found.layouts.get(layout, 0) + 1
    record = sample.record() if "record" in has and "source" not in has else {}
    if "source" in has:
        kinds["edits"].append(sample)
    if "image" in has and ("words" in has or "caption" in record):
        kinds["captions"].append(sample)
    if "conversations" in record:
        kinds["talks" if "image" in has else "texts"].append(sample)
    if has.keys() & {"image", "target"}:
        kinds["pictures"].append(sample)


# ---------------------------------------------------------------- order and reading

NEEDS = {"P1": ("captions", "talks"), "P2": ("pictures",), "P3": ("captions",), "T1": ("pictures",), "T2": ("pictures",),
         "T3": ("pictures",), "U1": ("captions",), "U2": ("captions", "edits"), "U3": ("captions", "edits")}
EXAMPLES = {"captions": "pictures with captions: cat.png, and cat.txt with: a cat on a mat",
            "edits": "edits: 1.source.png and 1.target.png, and 1.instruction.txt with: make it red (or go without, --edits 0)",
            "pictures": "pictures: a.png, b.jpg, c.webp …", "talks": "conversations"}


def check_kinds(found: Found, stages: list[str], edits: float) -> None:
    """Raises BadFile where a stage lacks its kind of data, with an example."""
    for stage in stages:
        needs = [kind for kind in NEEDS[stage] if kind != "edits" or edits > 0]
        have = [kind for kind in needs if any(not sample.held_out for sample in found.kinds[kind])]
        lacking = needs[:1] if not have else [kind for kind in needs if kind not in have and stage != "P1"]
        if lacking:
            more = f"; `python data.py --check {found.root}` names {len(found.faults)} faults" if found.faults else ""
            raise BadFile(f"stage {stage} needs {EXAMPLES[lacking[0]]}; {found.root} has none{more}")


class DiskData:
    """What training asks of `data.DrawnWorld`, from samples on disk. Pictures are `b 3 side side` in [-1, 1].

    `batch`, `edits`: of each `batch` numbers the last `edits` ask for edits, so that numbers of each kind follow closely.
    `bad`: (key, what is wrong) of the samples that were replaced since it was last emptied.
    """

    def __init__(self, found: Found, side: int, seed: int, epoch: int, split: str = "train", flip: bool = True,
                 batch: int = 1, edits: int = 0):
        self.side, self.key, self.flip, self.batch, self.n_edits = side, f"{seed}/{split}/{epoch}", flip, batch, edits
        self.kinds = {kind: [sample for sample in samples if sample.held_out == (split == "test")]
                      for kind, samples in found.kinds.items()}
        described = {sample.key: sample for kind in ("captions", "talks") for sample in self.kinds[kind]}
        self.kinds["described"], self.orders, self.bad = list(described.values()), {}, []

    def rng(self, what: str, index: int) -> random.Random:
        return random.Random(f"{self.key}/{what}/{index}")

    def generator(self, what: str, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng(what, index).getrandbits(60))

    def order(self, kind: str, epoch: int) -> list[int]:
        """A pass over all samples of a kind: shards in any order, their samples mixed inside windows."""
        if self.orders.get(kind, (None,))[0] != epoch:
            rng, units = self.rng(f"order {kind}", epoch), {}
            for i, sample in enumerate(self.kinds[kind]):
                units.setdefault(sample.unit, []).append(i)
            shards = list(units.values())
            rng.shuffle(shards)
            line, mixed = [i for shard in shards for i in shard], []
            for start in range(0, len(line), WINDOW):
                window = line[start:start + WINDOW]
                rng.shuffle(window)
                mixed += window
            self.orders[kind] = epoch, mixed
        return self.orders[kind][1]

    def read(self, kind: str, number: int, make: Callable):
        """make(sample, rng) for the sample whose turn it is; where that is bad, for one that stands in, always the same."""
        samples = self.kinds[kind]
        if not samples:
            raise BadFile(f"needs {EXAMPLES[kind]}; there are none")
        epoch, place = divmod(number, len(samples))
        chosen = self.order(kind, epoch)[place]
        for attempt in range(SUBSTITUTES):
            try:
                return make(samples[chosen], self.rng(f"crop {kind}", number))
            except BadFile as bad:
                self.bad.append((samples[chosen].key, str(bad)))
                chosen = self.rng(f"instead {kind} {number}", attempt).randrange(len(samples))
        raise BadFile(f"{SUBSTITUTES} samples in a row are bad, the last one: {self.bad[-1][1]}")

    def dense(self, number: int, edits: bool) -> int:
        """The how-manieth request (edit) a number is."""
        step, place = divmod(number, self.batch)
        draws = self.batch - self.n_edits
        return step * self.n_edits + place - draws if edits else step * draws + place

    # ------------------------------------------------------------ what stages ask for

    def pictures(self, indices) -> Tensor:
        """Pictures alone, cropped at random and half of them mirrored (method of T1 to T3)."""
        def make(sample, rng):
            has = sample.has
            role = "image" if "image" in has else rng.choice(("source", "target"))
            return as_tensor(read_picture(has[role]), self.side, rng, self.flip)
        return torch.stack([self.read("pictures", i, make) for i in indices])

    def described(self, indices) -> tuple[Tensor, list[list[tuple[str, str]]], list[tuple[str, str] | None]]:
        """(pictures, questions and answers about each, and each one's caption where it has one), for P1."""
        def make(sample, rng):
            pairs = sample.said()
            picture = self.upright(sample.has["image"], " ".join(text for pair in pairs for text in pair), rng)
            captioned = bool(pairs) and pairs[-1][0] == DESCRIBE
            return picture, pairs[:-1] if captioned else pairs, pairs[-1] if captioned else None
        pictures, talks, captions = zip(*(self.read("described", i, make) for i in indices))
        return torch.stack(pictures), list(talks), list(captions)

    def texts(self, indices) -> list[tuple[str, str]]:
        """(given, to learn) without a picture: conversations without one, else captions, so that P3's words are known."""
        if self.kinds["texts"]:
            return [self.read("texts", i, lambda sample, rng: rng.choice(sample.turns())) for i in indices]
        if self.kinds["captions"]:
            return [("caption", self.read("captions", i, lambda sample, rng: sample.caption())) for i in indices]
        return []

    def things(self, indices) -> None:
        """L_name's: what stands where is known of the drawn world alone."""

    def drawings(self, indices, captions: float = 1.0) -> tuple[list[str], Tensor]:
        """(captions, their pictures)."""
        if not len(indices):
            return [], torch.empty(0, 3, self.side, self.side)

        def make(sample, rng):
            words = sample.caption()
            return words, self.upright(sample.has["image"], words, rng)
        words, pictures = zip(*(self.read("captions", self.dense(i, False), make) for i in indices))
        return list(words), torch.stack(pictures)

    def changes(self, indices, outcomes: float = 0.0) -> tuple[list[str], Tensor, Tensor]:
        """(instructions, pictures before, pictures after)."""
        def make(sample, rng):
            pair = [self.upright(sample.has[role], "left", rng) for role in ("source", "target")]  # never mirrored: they belong together
            return sample.instruction(), *pair
        found = [self.read("edits", self.dense(i, True), make) for i in indices]
        words, before, after = zip(*found) if found else ((), (), ())
        nothing = torch.empty(0, 3, self.side, self.side)
        return list(words), torch.stack(before) if found else nothing, torch.stack(after) if found else nothing

    def upright(self, blob: Blob, words: str, rng: random.Random) -> Tensor:
        """The middle of a picture that words belong to, mirrored half of the time unless they name a side."""
        return as_tensor(read_picture(blob), self.side, None if SIDES.search(words) or not self.flip else rng, crop=False)


def as_tensor(image: Image.Image, side: int, rng: random.Random | None, flip: bool = True, crop: bool = True) -> Tensor:
    """The shorter side resized, a square cut out (at random with `crop`, else the middle), mirrored half of the time."""
    scale = side / min(image.size)
    w, h = (max(side, round(x * scale)) for x in image.size)
    left, top = (rng.randint(0, w - side), rng.randint(0, h - side)) if rng and crop else ((w - side) // 2, (h - side) // 2)
    box = (left / scale, top / scale, min(image.width, (left + side) / scale), min(image.height, (top + side) / scale))
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if rng and flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return levels.permute(2, 0, 1).float() / 127.5 - 1
