"""What a folder of data holds and what is wrong with it: what `python data.py --check` and `--build-vocab` do.

    python data.py --check PATH                           what is there, and for every fault the file, the key, the mend
    python data.py --build-vocab PATH [--tokens 1024]     its byte-pair vocabulary, written to PATH/vocabulary.json
"""

import statistics
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from public import openmoji
from disk.bytepair import FIRST, learn_merges, save_vocabulary
from disk.files import BadFile, Blob, printable, read_picture
from disk.layouts import DataFolder, scan
from disk.reading import as_tensor
from plumbing.command import Parser, UserError


def alphabets(texts) -> str:
    """Shares of the alphabets that the letters of these texts belong to."""
    counts = Counter(unicodedata.name(c, "?").split()[0].title() for text in texts for c in text if c.isalpha())
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common(4)) or "none"


@dataclass
class Inventory:
    """What reading every sample gave."""

    faults: list[tuple[str, str, str]]  # file, key, what is wrong and the mend
    sizes: list[tuple[int, int]] = field(default_factory=list)  # of the pictures, width and height
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0  # spent on pictures

    def read_picture(self, blob: Blob, side: int) -> None:
        start = time.perf_counter()
        image = read_picture(blob)
        as_tensor(image, side, None)
        self.seconds += time.perf_counter() - start
        self.sizes.append(image.size)

    def read_text(self, read: Callable[[], str]) -> None:
        self.texts.append(read())


def read_all(folder: DataFolder, side: int) -> Inventory:
    """Every sample, training's and the test's, as training reads it."""
    inventory = Inventory(list(folder.faults))
    for sample in tqdm(folder.samples() + folder.samples("test"), desc="reading"):
        has = sample.has
        roles = [role for role in ("image", "source", "target") if role in has]
        jobs = [partial(inventory.read_picture, has[role], side) for role in roles]
        if "source" in has:
            jobs.append(partial(inventory.read_text, sample.instruction))
        elif "words" in has:
            jobs.append(partial(inventory.read_text, sample.caption))
        for job in jobs:
            try:
                job()
            except BadFile as bad:
                file = next(iter(has.values())).name.partition(":")[0]
                inventory.faults.append((file, printable(sample.key), str(bad)))
    return inventory


def check(path: Path, side: int = 32) -> tuple[str, bool]:
    """(report, sound): every sample is read as training reads it. Raises BadFile where there is no folder."""
    torch.set_num_threads(1)
    folder = scan(path)
    inventory = read_all(folder, side)
    return "\n".join(report(folder, inventory, side)), not inventory.faults


def report(folder: DataFolder, inventory: Inventory, side: int) -> list[str]:
    """Lines for people."""
    sizes, texts, faults = inventory.sizes, inventory.texts, inventory.faults
    layouts = ", ".join(f"{count} {layout}" for layout, count in folder.layouts.items())
    lines = [f"{folder.root}: {layouts or 'no samples'}"]
    for kind, samples in folder.kinds.items():
        if samples:
            test = sum(sample.is_test for sample in samples)
            lines.append(f"{kind:9} {len(samples) - test} to train on, {test} held out")
    if sizes:
        w, h = zip(*sizes)
        median = f"{statistics.median(w):.0f}×{statistics.median(h):.0f}"
        lines.append(f"sizes     {min(w)}×{min(h)} to {max(w)}×{max(h)}, median {median}")
        speed = len(sizes) / inventory.seconds
        lines.append(f"speed     {speed:.0f} pictures a second on one core, read and cut to {side}×{side}")
    if texts:
        keys = alphabets(sample.key for sample in folder.samples())
        lines.append(f"letters   {alphabets(texts)} in texts; {keys} in keys")
    if folder.left_alone:
        lines.append(f"{folder.left_alone} files of other kinds are left alone")
    lines += [f"fault     {file}{f' [{key}]' if key else ''}: {what}" for file, key, what in faults]
    return [*lines, f"{len(faults)} faults"]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, help="folder: say what it holds and what is wrong")
    parser.add_argument("--build-vocab", type=Path,
                        help="folder: learn byte pairs from its texts, write vocabulary.json there")
    parser.add_argument("--tokens", type=int, default=1024, help="size of the vocabulary")
    parser.add_argument("--side", type=int, default=32, help="side that pictures are cut to")
    options = parser.read()
    path = options.check or options.build_vocab
    if path is None or options.tokens <= FIRST:
        raise UserError(f"--check PATH or --build-vocab PATH is wanted, and --tokens above {FIRST}")
    if str(path) == "openmoji":
        path = openmoji.write(options.side)
    if options.build_vocab:
        merges = learn_merges(tqdm(scan(path).texts(), desc="texts"), options.tokens)
        save_vocabulary(path / "vocabulary.json", merges)
        print(f"{path / 'vocabulary.json'}: {FIRST + len(merges)} tokens")
    if options.check:
        text, sound = check(path, options.side)
        print(text)
        if not sound:
            raise SystemExit(1)
