"""What a path of data holds, once it is found: samples, in which file they stand, and which of them are held out.

    Sample        what one key has: a picture and its words, an edit, a conversation
    Unit          what stands in one shard or list, or in loose files
    DataFolder    all units of a path
    Split         which pictures are for the test
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from disk.files import BadFile, Blob, content_of, printable, read_record, read_text, text_field, turns

KINDS = ("captions", "talks", "edits", "texts", "pictures", "described")  # what a sample is good for
TEXTS = 100_000  # samples that a vocabulary is learned from
DESCRIBE = "describe the picture"  # what is asked for a caption


@dataclass
class Sample:
    """What one key has; blobs, so that a sample is read only when its turn comes."""

    file: str  # the shard or list that it stands in, "" where its parts are files: (file, key) is its identity
    key: str
    has: dict[str, Blob] = field(default_factory=dict)  # role -> where it is
    kinds: tuple[str, ...] = ()  # what it is good for
    is_test: bool = False  # held out from training
    content: int = 0  # of its picture, of an edit's source, without a picture of its record

    def record(self) -> dict:
        return read_record(self.has["record"]) if "record" in self.has else {}

    def caption(self, record: dict | None = None) -> str:
        """`record`: its own, where it has been read already."""
        if "words" in self.has:
            return read_text(self.has["words"])
        record = record or self.record()
        return text_field(record, "text" if "text" in record else "caption", self.has["record"].shown)

    def instruction(self) -> str:
        if "record" in self.has:
            return text_field(self.record(), "instruction", self.has["record"].shown)
        return read_text(self.has["instruction" if "instruction" in self.has else "words"])

    def turns(self, record: dict | None = None) -> list[tuple[str, str]]:
        return turns(record or self.record(), self.has["record"].shown, "image" in self.has)

    def turns_and_caption(self) -> list[tuple[str, str]]:
        """All questions and answers about the picture; the last one asks for the caption, where there is one."""
        record = self.record()
        pairs = self.turns(record) if "conversations" in record else []
        return [*pairs, (DESCRIBE, self.caption(record))] if "captions" in self.kinds else pairs

    def texts(self) -> list[str]:
        """Every text that it has. Raises BadFile."""
        if "edits" in self.kinds:
            return [self.instruction()]
        record = self.record()
        found = [text for pair in self.turns(record) for text in pair] if "conversations" in record else []
        return [*found, self.caption(record)] if "captions" in self.kinds else found


class Samples(Sequence):
    """Samples of several units (loose files, a list, a shard) as one sequence; those of an index are made when asked
    for. `ends`: where each unit ends."""

    def __init__(self, units: list[Sequence[Sample]]):
        self.units = [unit for unit in units if len(unit)]
        self.ends = list(accumulate(map(len, self.units)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        unit = bisect_right(self.ends, i)
        return self.units[unit][i - self.ends[unit] + len(self.units[unit])]


def some_of(samples: Sequence, count: int) -> list[int]:
    """At most `count` places, by a chance that is always the same: equal steps would see one kind alone of several that
    stand in turns."""
    return random.Random(0).sample(range(len(samples)), min(count, len(samples)))


@dataclass
class Unit:
    """What stands in one file that holds many, or in the loose files of the folder (name "")."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # key, what is wrong and the mend
    layouts: dict[str, int] = field(default_factory=dict)  # layout -> samples
    passed: dict[str, list] = field(default_factory=dict)  # what is no data -> how many files, the first one's name

    def of(self, kind: str, split: str) -> list[Sample]:
        return [sample for sample in self.samples
                if sample.is_test == (split == "test") and (kind in sample.kinds or kind == "any")]

    def add(self, sample: Sample, layout: str) -> None:
        """A sound sample, under all that it is good for. Raises BadFile where its record cannot be read."""
        has = sample.has
        record = sample.record() if "source" not in has else {}
        captioned, talks = "words" in has or {"caption", "text"} & record.keys(), "conversations" in record
        good_for = {"edits": "source" in has, "captions": "image" in has and captioned and "source" not in has,
                    "talks": "image" in has and talks, "texts": "image" not in has and talks,
                    "pictures": has.keys() & {"image", "target"}}
        good_for["described"] = good_for["captions"] or good_for["talks"]
        sample.kinds = tuple(kind for kind in KINDS if good_for[kind])
        sample.content = content_of(has.get("source") or has.get("image") or has["record"])
        self.samples.append(sample)
        self.layouts[layout] = self.layouts.get(layout, 0) + 1

    def summary(self) -> dict[str, list]:
        """Its name, or each folder of loose files -> how many samples, a digest of what they are."""
        groups: dict[str, list[str]] = {}
        for sample in self.samples:
            sizes = [(role, blob.size) for role, blob in sorted(sample.has.items())]
            place = self.name or f"{sample.key.rpartition('/')[0]}/"
            groups.setdefault(place, []).append(f"{sample.key} {sample.content} {sizes}")
        return {place: [len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]]
                for place, lines in groups.items()}

    def pass_over(self, name: str, what: str) -> None:
        self.passed.setdefault(what, [0, printable(name)])[0] += 1


@dataclass
class DataFolder:
    """What `scan` makes of a path."""

    root: Path
    units: list[Unit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what else is to be said of it

    def of(self, kind: str, split: str = "train") -> Samples:
        """The samples that are good for a kind of KINDS, or "any"."""
        return Samples([unit.of(kind, split) for unit in self.units])

    @property
    def faults(self) -> list[tuple[str, str, str]]:
        """(file, key, what is wrong and the mend), fit to be printed"""
        return [(printable(unit.name or key), printable(key) if unit.name else "", why)
                for unit in self.units for key, why in unit.faults]

    def counted(self, what: str) -> dict[str, int] | dict[str, list]:
        """layout -> samples, or what was passed over -> [files, the first one]"""
        total = {}
        for unit in self.units:
            for key, value in getattr(unit, what).items():
                known = total.get(key)
                total[key] = value if known is None else (
                    [known[0] + value[0], known[1]] if what == "passed" else known + value)
        return total

    def summary(self) -> dict[str, list]:
        return {name: value for unit in self.units for name, value in unit.summary().items()}

    def texts(self) -> Iterator[str]:
        """The texts of training's samples, of many some, for a vocabulary; what cannot be read is passed over."""
        kinds = [self.of(kind) for kind in ("described", "edits", "texts")]  # pictures alone have no words
        most = min(1.0, TEXTS / max(1, sum(map(len, kinds))))
        for sample in (samples[i] for samples in kinds for i in sorted(some_of(samples, round(most * len(samples))))):
            with suppress(BadFile):
                yield from sample.texts()
        yield from (DESCRIBE, "caption")


# ---------------------------------------------------------------- what is held out


class Split:
    """Which contents are held out: those of the folder `test`, `of_test`, where there are such; else one in twenty. Of
    each of `kinds`, name -> contents, one at least is trained on and, if it has two, one held out, unless each of them
    is all that another kind has."""

    def __init__(self, kinds: dict[str, set[int]], of_test: set[int]):
        self.of_test, self.released, self.added = of_test, set(), {}  # added: content -> the kind that it is for
        if of_test:
            return
        for contents in kinds.values():
            if contents and all(content in self for content in contents):
                self.released.add(max(contents))
        for kind, contents in kinds.items():
            if not any(content in self for content in contents):
                for content in sorted(contents):
                    left = ({*other} - {content} for other in kinds.values() if content in other)
                    if all(any(one not in self for one in other) for other in left):
                        self.added[content] = kind
                        break

    def notes(self, along: int) -> list[str]:
        """What is to be said of it. `along`: samples that are held out and stand in no folder `test`."""
        if self.of_test:
            return [f"{along} samples outside test/ have a picture that is in it: held out as well"] * (along > 0)
        return [f"so few {kind} that none would be held out: one is" for kind in self.added.values()]

    def __contains__(self, content: int) -> bool:
        held = content in self.of_test if self.of_test else content % 20 == 0 and content not in self.released
        return held or content in self.added


def hold_out(folder: DataFolder) -> None:
    """Decides which samples are for the test, by the content of their pictures, of an edit that of its source: what
    has the same picture is on the same side."""
    samples = [sample for unit in folder.units for sample in unit.samples]
    of_test = [sample for sample in samples if in_test(sample)]
    kinds = {kind: {sample.content for sample in samples if kind in sample.kinds} for kind in KINDS}
    split = Split(kinds, {sample.content for sample in of_test})
    for sample in samples:
        sample.is_test = sample.content in split
    folder.notes += split.notes(sum(sample.is_test for sample in samples) - len(of_test))


def in_test(sample: Sample) -> bool:
    """Whether it stands in the folder `test`."""
    return f"{sample.file}/{sample.key}".lstrip("/").startswith("test/")
