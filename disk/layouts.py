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
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field as also
from pathlib import Path

from disk.files import (BadFile, Blob, check_name, field, inside, members, read_record, read_text,
                        records, shown, turns)

PICTURES = ("jpg", "jpeg", "png", "webp")
ROLES = {"txt": "words", "json": "record", "instruction.txt": "instruction",
         **{f"{role}{ext}": name for ext in PICTURES for role, name in (("", "image"), ("source.", "source"), ("target.", "target"))}}
LEFT_ALONE = ("md", "license", "csv", "html", "pdf", "yaml", "yml", "sha256", "part")  # stands beside data, is none
OTHER_PICTURES = ("gif", "bmp", "tif", "tiff", "heic", "avif", "svg", "jp2", "ico", "psd")
SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|anticlockwise|mirror\w*)\b", re.IGNORECASE)
DESCRIBE = "describe the picture"  # what is asked for a caption


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

    def turns_and_caption(self) -> list[tuple[str, str]]:
        """All questions and answers about the picture; the last one asks for the caption, where there is one. One reading."""
        record = self.record()
        pairs = turns(record, self.has["record"].name, "image" in self.has) if "conversations" in record else []
        if "words" in self.has:
            return [*pairs, (DESCRIBE, read_text(self.has["words"]))]
        return [*pairs, (DESCRIBE, field(record, "caption", self.has["record"].name))] if "caption" in record else pairs


@dataclass
class Found:
    """What `scan` saw. `kinds`: what a sample is good for -> the samples; a sample may serve several."""

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


def scan(root: Path) -> Found:
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


