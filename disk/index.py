"""An index of shards, for millions of samples: where the parts of each lie, so that a start reads a line a shard.

    python data.py --index PATH       once, and again after a change: only new and changed shards are read

PATH/.index/index.json has for each shard its size and time and what it holds; a table, one .npy a shard, has a row for
each sample. A table is mapped into memory when the turn of its shard comes, and never unpickled. Of loose files and
lists it keeps a digest alone: they are looked at at each start.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from disk.files import BadFile, Blob
from disk.layouts import INDEX, look, scan, scan_tar
from disk.samples import KINDS, DataFolder, Sample, Split, Unit, in_test
from plumbing.command import write_beside, write_text

PARTS = ("words", "record", "instruction", "image", "source", "target")
FEW = 2000  # a kind with more samples than that has some on either side of the split anyway
SLOW = 20  # seconds of a look after which an index is recommended


class Shard:
    """What DataFolder asks of a Unit, from a line of the index and a table."""

    def __init__(self, root: Path, name: str, line: dict):
        self.root, self.name, self.line = root, name, line
        self.faults, self.layouts, self.passed = [*map(tuple, line["faults"])], line["layouts"], line["passed"]

    def of(self, kind: str, split: str) -> "Rows":
        return Rows(self, kind, split)

    def summary(self) -> dict[str, list]:
        return self.line["summary"]

    def sample(self, row: np.void) -> Sample:
        key, path = row["key"].decode(), str(self.root / self.name)
        has = {part: Blob(path, int(start), int(size), f"{key}.{part}", self.name)
               for part, start, size in zip(PARTS, row["start"], row["size"]) if size}
        kinds = tuple(kind for bit, kind in enumerate(KINDS) if row["kinds"] >> bit & 1)
        return Sample(self.name, key, has, kinds, bool(row["test"]), int(row["content"]))


class Rows(Sequence):
    """Those samples of a shard that are good for a kind, on a side of the split."""

    def __init__(self, shard: Shard, kind: str, split: str):
        self.shard, self.kind, self.split = shard, kind, split

    def __len__(self) -> int:
        return self.shard.line["counts"][self.kind][self.split == "test"]

    def __getitem__(self, i: int) -> Sample:
        rows, chosen = mapped(str(self.shard.root / INDEX / self.shard.line["table"]))
        if (self.kind, self.split) not in chosen:
            chosen[self.kind, self.split] = np.flatnonzero(
                is_of(rows, self.kind) & (rows["test"] == (self.split == "test")))
        return self.shard.sample(rows[chosen[self.kind, self.split][i]])


@lru_cache(128)
def mapped(path: str) -> tuple[np.ndarray, dict]:
    """-> (a table, what `Rows` keeps of it)"""
    return table_at(path), {}


def table_at(path: str | Path, mode: str = "r") -> np.ndarray:
    return np.load(path, mmap_mode=mode, allow_pickle=False)


def is_of(rows: np.ndarray, kind: str) -> np.ndarray:
    return rows["kinds"] > 0 if kind == "any" else rows["kinds"] >> KINDS.index(kind) & 1 > 0


# ---------------------------------------------------------------- opening


def open_data(root: Path) -> DataFolder:
    """What a path holds, by its index where there is one. Raises BadFile where that is not of what is there now."""
    path = root / INDEX / "index.json"
    if not path.exists():
        start = time.time()
        folder = scan(root)
        if time.time() - start > SLOW:
            folder.notes.append(f"looking took {time.time() - start:.0f} s, as at every start: with shards, "
                                f"`python data.py --index {root}` once makes it short")
        return folder
    folder, shards = look(root)
    again = f": python data.py --index {root}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        lines, held, digest = dict(known["shards"]), {*known["held"]}, known["loose"]
    except (ValueError, KeyError, TypeError):
        raise BadFile(f"{path} is broken{again}") from None
    for shard, name in shards:
        if stamp(shard) != lines.get(name, {}).get("stamp"):
            raise BadFile(f"{name} {'has changed since' if name in lines else 'is not in'} the index{again}")
        folder.units.append(Shard(folder.root, name, lines.pop(name)))
    if lines:
        raise BadFile(f"{next(iter(lines))} is in the index and no more in the folder{again}")
    if digest_of(folder) != digest:
        raise BadFile(f"what stands beside the shards has changed since the index{again}")
    for sample in loose(folder):
        sample.is_test = sample.content in held
    folder.notes += known["notes"]
    return folder


def stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def loose(folder: DataFolder) -> list[Sample]:
    return [sample for unit in folder.units if isinstance(unit, Unit) for sample in unit.samples]


def digest_of(folder: DataFolder) -> str:
    units = [unit.summary() for unit in folder.units if isinstance(unit, Unit)]
    return hashlib.sha256(json.dumps(units).encode()).hexdigest()


# ---------------------------------------------------------------- writing


def write_index(root: Path, jobs: int = min(os.cpu_count() or 1, 61)) -> DataFolder:  # 61: Windows
    """Reads the shards that are new or have changed, decides what is held out, and writes all of it."""
    if not root.is_dir():
        raise BadFile(f"--index {root}: an index is of a folder")
    folder, shards = look(root)
    path = folder.root / INDEX / "index.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        old = {}
    with ProcessPoolExecutor(jobs) as pool:
        fresh = [(shard, name) for shard, name in shards if old.get(name, {}).get("stamp") != stamp(shard)]
        read = pool.map(partial(index_shard, folder.root), *zip(*fresh), chunksize=4) if fresh else ()
        read = dict(zip((name for _, name in fresh), tqdm(read, total=len(fresh), desc="shards")))
        lines = {name: read.get(name) or old[name] for _, name in shards}
        split = split_of(folder, lines)
        mark_one = partial(mark, np.array(sorted(split.of_test), "u8"), [*split.released], [*split.added])
        tables = [folder.root / INDEX / line["table"] for line in lines.values()]
        for line, counts in zip(lines.values(), tqdm(pool.map(mark_one, tables, chunksize=16), "split", len(tables))):
            line["counts"] = counts
    own = [sample for sample in loose(folder) if sample.content in split]
    along = len(own) + sum(line["counts"]["any"][1] for line in lines.values()) - sum(map(in_test, own)) - sum(
        line["totals"]["any"] for name, line in lines.items() if name.startswith("test/"))
    held = sorted({sample.content for sample in own})
    write_text(path, json.dumps(dict(shards=lines, held=held, loose=digest_of(folder), notes=split.notes(along))))
    for table in path.parent.glob("*.npy"):
        table.unlink() if table not in tables else None
    mapped.cache_clear()
    return open_data(root)


def index_shard(root: Path, path: Path, name: str) -> dict:
    """Writes a shard's table; -> its line of the index, but for the counts."""
    before, unit = stamp(path), scan_tar(path, name)
    keys = [sample.key.encode() for sample in unit.samples]
    rows = np.zeros(len(keys), [("kinds", "u1"), ("test", "?"), ("content", "u8"), ("start", "i8", len(PARTS)),
                                ("size", "i4", len(PARTS)), ("key", f"S{max(map(len, keys), default=1)}")])
    for row, key, sample in zip(rows, keys, unit.samples):
        row["kinds"] = sum(1 << KINDS.index(kind) for kind in sample.kinds)
        row["content"], row["key"] = sample.content, key
        for place, part in enumerate(PARTS):
            if part in sample.has:
                row["start"][place], row["size"][place] = sample.has[part].start, min(sample.has[part].size, 2**31 - 1)
    table = hashlib.sha256(name.encode()).hexdigest()[:16] + ".npy"
    write_beside(root / INDEX / table, partial(np.save, arr=rows, allow_pickle=False))
    totals = {kind: int(is_of(rows, kind).sum()) for kind in (*KINDS, "any")}
    return {"stamp": before, "table": table, "summary": unit.summary(), "totals": totals,
            "faults": unit.faults, "layouts": unit.layouts, "passed": unit.passed}


def split_of(folder: DataFolder, lines: dict[str, dict]) -> Split:
    """The same as `hold_out` decides. Kinds with many samples need no looking after."""
    def contents(name: str, kind: str = "any") -> set[int]:
        rows = table_at(folder.root / INDEX / lines[name]["table"])
        return set(rows["content"][is_of(rows, kind)].tolist())

    own = loose(folder)
    of_test = {sample.content for sample in own if in_test(sample)}.union(
        *(contents(name) for name in lines if name.startswith("test/")))
    kinds = {}
    for kind in KINDS:
        here = {sample.content for sample in own if kind in sample.kinds}
        if len(here) + sum(line["totals"][kind] for line in lines.values()) <= FEW:
            kinds[kind] = here.union(*(contents(name, kind) for name in lines if lines[name]["totals"][kind]))
    return Split(kinds, of_test)


def mark(of_test: np.ndarray, released: list[int], added: list[int], table: Path) -> dict[str, list[int]]:
    """Writes into a table what is held out; -> kind -> how many samples are trained on and held out."""
    rows = table_at(table, "r+")
    content = rows["content"]
    test = np.isin(content, of_test) if len(of_test) else (content % 20 == 0) & ~np.isin(content, released)
    test |= np.isin(content, added)
    if (rows["test"] != test).any():
        rows["test"] = test
        rows.flush()
    return {kind: [int((is_of(rows, kind) & side).sum()) for side in (~test, test)] for kind in (*KINDS, "any")}
