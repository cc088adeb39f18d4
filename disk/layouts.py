"""Data on disk: what a folder holds, found out by looking at names, headers and records.

    x.jpg|png|webp + x.txt   a caption; x.json may hold {"conversations": …} or {"caption": …}
    x.source.png + x.target.png + x.instruction.txt      an edit (BLIP3o: x.input.jpg, x.output.jpg, x.txt)
    000.tar 001.tar …        the same names inside (WebDataset: key = name up to the first dot)
    *.json|jsonl             LLaVA: [{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}]
    *.json|jsonl             edits: [{"source": …, "target": …, "instruction": …}, …]

All of it may stand in one folder, and in folders inside. A folder `test` is held out; without one, one key in twenty.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from disk.files import (BadFile, Blob, check_name, inside, members, printable, read_record, read_text, records,
                        text_field, turns)

PICTURES = ("jpg", "jpeg", "png", "webp")
ROLES = {  # ending of a file -> what it is to its key
    "txt": "words", "json": "record", "instruction.txt": "instruction", **{ending: "image" for ending in PICTURES},
    **{f"{name}.{ending}": role for role, names in (("source", ("source", "input")), ("target", ("target", "output")))
       for name in names for ending in PICTURES}}
OTHER_PICTURES = ("gif", "bmp", "tif", "tiff", "heic", "avif", "svg", "jp2", "ico", "psd")
PACKED = re.compile(r"\.(tar\.\w+|tgz|zip|7z|rar|parquet|arrow)$")
SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|anticlockwise|mirror\w*)\b", re.IGNORECASE)
DESCRIBE = "describe the picture"  # what is asked for a caption


@dataclass
class Sample:
    """What one key has; blobs, so that a sample is read only when its turn comes."""

    key: str
    unit: int  # which file it came from: what is in one shard is read together
    is_test: bool  # held out from training
    has: dict[str, Blob] = field(default_factory=dict)  # role -> where it is

    def record(self) -> dict:
        return read_record(self.has["record"]) if "record" in self.has else {}

    def caption(self) -> str:
        if "words" in self.has:
            return read_text(self.has["words"])
        return text_field(self.record(), "caption", self.has["record"].name)

    def instruction(self) -> str:
        if "record" in self.has:
            return text_field(self.record(), "instruction", self.has["record"].name)
        return read_text(self.has["instruction" if "instruction" in self.has else "words"])

    def turns(self) -> list[tuple[str, str]]:
        return turns(self.record(), self.has["record"].name, "image" in self.has)

    def turns_and_caption(self) -> list[tuple[str, str]]:
        """All questions and answers about the picture; the last one asks for the caption, where there is one."""
        record = self.record()
        pairs = turns(record, self.has["record"].name, "image" in self.has) if "conversations" in record else []
        if "words" in self.has:
            return [*pairs, (DESCRIBE, read_text(self.has["words"]))]
        if "caption" in record:
            return [*pairs, (DESCRIBE, text_field(record, "caption", self.has["record"].name))]
        return pairs


@dataclass
class DataFolder:
    """What `scan` makes of a folder. `kinds`: what a sample is good for -> the samples; a sample may serve several."""

    root: Path
    kinds: dict[str, list[Sample]] = field(default_factory=lambda: {
        "captions": [], "talks": [], "edits": [], "texts": [], "pictures": []})
    faults: list[tuple[str, str, str]] = field(default_factory=list)  # file, key, what is wrong and the mend
    layouts: dict[str, int] = field(default_factory=dict)  # layout -> samples
    left_alone: int = 0  # files of kinds that are not data

    def samples(self, split: str = "train") -> list[Sample]:
        once = {id(sample): sample for samples in self.kinds.values() for sample in samples
                if sample.is_test == (split == "test")}
        return list(once.values())

    def texts(self) -> Iterator[str]:
        """Every text of training's samples, for a vocabulary; what cannot be read is passed over."""
        for sample in self.samples():
            has = sample.has
            if "source" in has:
                ways = [sample.instruction]
            else:
                ways = [sample.caption] * ("words" in has or "record" in has) + [sample.turns] * ("record" in has)
            for way in ways:
                try:
                    words = way()
                except BadFile:
                    continue
                yield from [words] if isinstance(words, str) else [text for pair in words for text in pair]
        yield from (DESCRIBE, "caption")

    def fault(self, file: str, key: str, what: BadFile | str) -> None:
        self.faults.append((printable(file), printable(key), str(what)))

    def add(self, sample: Sample, layout: str) -> None:
        """A sound sample, under all that it is good for."""
        kinds, has = self.kinds, sample.has
        self.layouts[layout] = self.layouts.get(layout, 0) + 1
        record = sample.record() if "record" in has and "source" not in has else {}
        if "source" in has:
            kinds["edits"].append(sample)
        if "image" in has and ("words" in has or "caption" in record):
            kinds["captions"].append(sample)
        if "conversations" in record:
            kinds["talks" if "image" in has else "texts"].append(sample)
        if has.keys() & {"image", "target"}:
            kinds["pictures"].append(sample)


# ---------------------------------------------------------------- scanning a folder


def scan(root: Path) -> DataFolder:
    """Finds the samples under `root`. Reads names, headers and records, no pictures. Raises BadFile where there is no
    folder; any other fault is listed in the result."""
    if not root.is_dir():
        raise BadFile(f"--data {root}: no such folder")
    folder, samples, lists = DataFolder(root), {}, []
    for unit, path in enumerate(plain_files(folder)):
        name = path.relative_to(root).as_posix()
        ending = name.rpartition(".")[2].lower()
        if ending == "tar":
            scan_tar(folder, path, name, unit)
        elif PACKED.search(name.lower()):
            folder.fault(name, "", "is packed: unpack it, or store it as a plain .tar")
        elif path.name == "vocabulary.json":
            continue
        elif ending in ("json", "jsonl"):
            lists.append((path, name, unit))
        else:
            place(folder, samples, name, whole_file(path, name), unit)
    for path, name, unit in lists:  # last: only now is it known which pictures there are
        if name.endswith(".json") and name.partition(".")[0] in samples:  # a picture's own record, not a list
            place(folder, samples, name, whole_file(path, name), unit)
        else:
            scan_list(folder, samples, path, name, unit)
    add_sound(folder, samples, "folder")
    choose_test(folder)
    return folder


def plain_files(folder: DataFolder) -> list[Path]:
    """Sorted by name; links, no plain files, names not in UTF-8 are faults; a leading dot is passed over."""
    files = []
    for parent, folders, names in os.walk(folder.root):
        for name in sorted(folders + names):
            path = Path(parent) / name
            full = path.relative_to(folder.root).as_posix()
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
                folder.fault(full, "", bad)
                folders[:] = [other for other in folders if other != name]
                continue
            files += [path] if stat.S_ISREG(mode) else []
        folders.sort()
    return sorted(files)


def whole_file(path: Path, name: str) -> Blob:
    return Blob(str(path), 0, path.lstat().st_size, printable(name))


def place(folder: DataFolder, samples: dict[str, Sample], name: str, blob: Blob, unit: int) -> None:
    """One file into its key's sample; `samples`: those of a folder or of a shard, by key."""
    parent, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    ending, key = ending.lower(), f"{parent}/{stem}" if parent else stem
    role = ROLES.get(ending)
    if role is None:
        last = ending.rpartition(".")[2]
        if last in OTHER_PICTURES:
            folder.fault(blob.name, key, f"is a {last}: save it as png, jpg or webp")
        elif last in PICTURES or last in ("txt", "json"):
            folder.fault(blob.name, key, f"'.{ending}' means nothing here: name it key.{last}, key.source.{last} or "
                                         f"key.target.{last}")
        else:
            folder.left_alone += 1
        return
    sample = samples.setdefault(key, Sample(key, unit, name.startswith("test/")))
    if role in sample.has:
        folder.fault(blob.name, key, f"has its {role} twice: give each sample a key of its own")
    else:
        sample.has[role] = blob


def scan_tar(folder: DataFolder, path: Path, name: str, unit: int) -> None:
    """The samples of a shard; of one that stops being a tar those before the break."""
    samples, prefix = {}, "test/" if name.startswith("test/") else ""
    try:
        for member in members(path, name):
            if isinstance(member, Blob):
                inner = member.name.split(":", 1)[1].removeprefix("./")
                place(folder, samples, prefix + inner, member, unit)
            else:
                folder.fault(name, *member)
    except BadFile as bad:
        folder.fault(name, "", bad)
    add_sound(folder, samples, "shards")


def scan_list(folder: DataFolder, samples: dict[str, Sample], path: Path, name: str, unit: int) -> None:
    """The records of a JSON list or of JSON lines. A picture that a record names leaves the folder's own `samples`."""
    try:
        blobs = list(records(path, printable(name)))
        if not blobs:
            raise BadFile(f"{printable(name)} has no records: a list of objects is wanted, [{{…}}, {{…}}]")
    except BadFile as bad:
        folder.fault(name, "", bad)
        return
    for number, blob in enumerate(blobs):
        sample = Sample(f"{name}#{number}", unit, name.startswith("test/"), {"record": blob})
        try:
            layout = find_pictures(folder, samples, path.parent, sample)
        except BadFile as bad:
            folder.fault(name, str(number), bad)
        else:
            folder.add(sample, layout)


def find_pictures(folder: DataFolder, samples: dict[str, Sample], parent: Path, sample: Sample) -> str:
    """Gives a record's sample the pictures that it names, by their paths from the list's own folder `parent` on, and
    reads its words once; -> which layout it has. Raises BadFile."""
    blob = sample.has["record"]
    record = read_record(blob)
    is_edit = "instruction" in record
    for role in ("source", "target") if is_edit else ("image",) if "image" in record else ():
        name = record.get(role)
        if not isinstance(name, str):
            raise BadFile(f"{blob.name}: {role!r} is {'missing' if name is None else 'a ' + type(name).__name__}, "
                          "where a picture's name is wanted")
        sample.has[role] = inside(parent, name)
        key = os.path.relpath(parent / name, folder.root).partition(".")[0]
        if key in samples and set(samples[key].has) == {"image"}:  # it stands in the folder: no sample of its own
            del samples[key]
    sample.instruction() if is_edit else sample.turns()
    return "instruction triples" if is_edit else "LLaVA records"


def add_sound(folder: DataFolder, samples: dict[str, Sample], layout: str) -> None:
    """What each key of a folder or shard is good for; what lacks a part is a fault."""
    for sample in samples.values():
        file = next(iter(sample.has.values())).name.partition(":")[0]
        try:
            check_parts(sample)
        except BadFile as bad:
            folder.fault(file, sample.key, bad)
        else:
            folder.add(sample, layout)


def check_parts(sample: Sample) -> None:
    """Raises BadFile where a sample lacks a part, has an empty one or a record that cannot be read."""
    has = sample.has
    if "source" in has or "target" in has:
        if not {"source", "target"} <= has.keys() or not {"instruction", "words", "record"} & has.keys():
            raise BadFile("an edit needs key.source.png, key.target.png and key.instruction.txt; this has "
                          f"{', '.join(has)}")
    elif "image" not in has:
        raise BadFile(f"{next(iter(has.values())).name} has no picture: add key.png (or jpg, webp) or remove it")
    for part in has.values():
        if part.size == 0:
            raise BadFile(f"{part.name} has 0 bytes: write it again or remove it")
    if "record" in has and "source" not in has:
        record = sample.record()
        if "conversations" in record:
            sample.turns()
        elif "caption" in record and "words" not in has:
            sample.caption()


def choose_test(folder: DataFolder) -> None:
    """Where no folder is called test, one key in twenty is for the test, whatever else is in the folder."""
    if folder.kinds["pictures"] and not any(sample.is_test for sample in folder.kinds["pictures"]):
        for sample in folder.samples():
            sample.is_test = int(hashlib.sha256(sample.key.encode()).hexdigest(), 16) % 20 == 0
