"""What a folder of data holds and what is wrong with it: what `python data.py --check` and `--build-vocab` do.

    python data.py --check PATH                           what is there, and for every fault the file, the key, the mend
    python data.py --index PATH                           where the samples of its shards lie (index.py)
    python data.py --build-vocab PATH [--tokens 1024]     its byte-pair vocabulary, written to PATH/vocabulary.json
"""

import statistics
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from public import openmoji
from disk.bytepair import FIRST, BytePairTokenizer, learn_merges, load_vocabulary, save_vocabulary
from disk.files import BadFile, Blob, printable, read_picture
from disk.index import open_data, write_index
from disk.layouts import data_path
from disk.reading import Order, as_tensor
from disk.samples import KINDS, DataFolder
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
    uneven: list[str] = field(default_factory=list)  # edits whose two pictures differ in shape
    seconds: float = 0.0  # spent on pictures

    def read_picture(self, blob: Blob, side: int) -> None:
        start = time.perf_counter()
        image = read_picture(blob)
        as_tensor(image, side, None)
        self.seconds += time.perf_counter() - start
        self.sizes.append(image.size)


def read_all(folder: DataFolder, side: int) -> Inventory:
    """Every sample, training's and the test's, as training reads it."""
    inventory = Inventory(list(folder.faults))
    sides = [folder.of("any", split) for split in ("train", "test")]
    for sample in tqdm(chain(*sides), desc="reading", total=sum(map(len, sides))):
        roles = [role for role in ("image", "source", "target") if role in sample.has]
        try:
            for role in roles:
                inventory.read_picture(sample.has[role], side)
            inventory.texts += sample.texts()
        except BadFile as bad:
            inventory.faults.append((printable(sample.file), printable(sample.key), str(bad)))
            continue
        if len(roles) == 2 and inventory.sizes[-1] != inventory.sizes[-2]:
            shapes = ", ".join(f"{w}×{h}" for w, h in inventory.sizes[-2:])
            inventory.uneven.append(f"{printable(sample.key)} ({shapes})")
    return inventory


def check(path: Path, side: int = 32, tokens: int = 1024, longest: int = 48) -> tuple[str, bool]:
    """(report, sound): every sample is read as training reads it. Raises BadFile where there is no folder."""
    torch.set_num_threads(1)
    folder = open_data(path)
    inventory = read_all(folder, side)
    return "\n".join(report(folder, inventory, side, tokens, longest)), not inventory.faults


def too_long(folder: DataFolder, texts: list[str], tokens: int, longest: int) -> str:
    """How many texts the folder's vocabulary, or one learned now, makes longer than is kept."""
    own = folder.root / "vocabulary.json"
    merges = load_vocabulary(own, longest).merges if own.exists() else learn_merges(texts, tokens)
    words = BytePairTokenizer(merges, 1 << 20)
    cut = sum(len(words.encode(text)) > longest for text in texts)
    return f"{cut} of {len(texts)} texts are longer than {longest} tokens (--longest): what is behind is not read"


def report(folder: DataFolder, inventory: Inventory, side: int, tokens: int, longest: int) -> list[str]:
    """Lines for people."""
    sizes, texts, faults = inventory.sizes, inventory.texts, inventory.faults
    layouts = ", ".join(f"{count} {layout}" for layout, count in folder.counted("layouts").items())
    lines = [f"{folder.root}: {layouts or 'no samples'}"]
    for kind in KINDS[:-1]:
        counts = [len(folder.of(kind, split)) for split in ("train", "test")]
        if sum(counts):
            lines.append(f"{kind:9} {counts[0]} to train on, {counts[1]} held out")
    if sizes:
        w, h = zip(*sizes)
        median = f"{statistics.median(w):.0f}×{statistics.median(h):.0f}"
        lines.append(f"sizes     {min(w)}×{min(h)} to {max(w)}×{max(h)}, median {median}")
        speed = len(sizes) / inventory.seconds
        lines.append(f"speed     {speed:.0f} pictures a second on one core, read and cut to {side}×{side}")
    if texts:
        keys = alphabets(sample.key for sample in folder.of("any"))
        lines.append(f"letters   {alphabets(texts)} in texts; {keys} in keys")
        lines.append(f"longest   {too_long(folder, texts, tokens, longest)}")
    alone = [sample for split in ("train", "test") for sample in folder.of("pictures", split)
             if {*sample.has} == {"image"}]
    if alone and len(alone) < len(folder.of("captions")):
        names = ", ".join(printable(sample.key) for sample in alone[:3])
        lines.append(f"alone     {len(alone)} pictures have no caption, where most have one: {names}")
    if inventory.uneven:
        lines.append(f"uneven    {len(inventory.uneven)} edits have two pictures of different shapes: "
                     f"{'; '.join(inventory.uneven[:3])}")
    passed = folder.counted("passed").items()
    lines += [f"passed    over: {count} {what}, the first {first}" for what, (count, first) in passed]
    lines += [f"note      {note}" for note in folder.notes]
    lines.append("mirrored  pictures alone, half of the time; none that words go with (--mirror all: these too; none)")
    lines += [f"fault     {file}{f' [{key}]' if key else ''}: {what}" for file, key, what in faults]
    return [*lines, f"{len(faults)} faults"]


def how_well_mixed(folder: DataFolder) -> list[str]:
    """How far apart two samples that stand side by side in a shard come to be read, by the shards of a window."""
    samples = folder.of("any")
    lines = [f"{len(folder.units) - 1} shards and lists, {len(samples)} samples to train on, "
             f"{len(folder.of('any', 'test'))} held out, {len(folder.faults)} faults",
             f"mixed: two neighbours of a shard are read {len(samples) / 3:.0f} samples apart if all are mixed"]
    for window in (16, 64):
        order = Order(samples, "0", window)
        first = order.mixed(0, 0) if len(samples) else []
        places = {number: place for place, number in enumerate(first)}
        apart = [abs(place - places[number + 1]) for number, place in places.items() if number + 1 in places]
        lines.append(f"{window:9} shards a window: {statistics.mean(apart or [0]):.0f} apart")
    return lines


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", help="folder, or shards: say what it holds and what is wrong")
    parser.add_argument("--build-vocab",
                        help="folder: learn byte pairs from its texts, write vocabulary.json there")
    parser.add_argument("--index", help="folder of shards: write down where their samples lie, for a short start")
    parser.add_argument("--tokens", type=int, default=1024, help="size of the vocabulary")
    parser.add_argument("--longest", type=int, default=48, help="tokens of a text that are kept")
    parser.add_argument("--side", type=int, default=32, help="side that pictures are cut to")
    options = parser.read()
    text = next((one for one in (options.index, options.check, options.build_vocab) if one is not None), None)
    if text is None or options.tokens <= FIRST:
        raise UserError(f"--check, --index or --build-vocab PATH is wanted, and --tokens above {FIRST}")
    path = openmoji.write(options.side) if text == "openmoji" else Path(data_path(text))
    if options.index is not None:
        print("\n".join(how_well_mixed(write_index(path))))
    if options.build_vocab:
        folder = open_data(path)
        merges = learn_merges(tqdm(folder.texts(), desc="texts"), options.tokens)
        save_vocabulary(folder.root / "vocabulary.json", merges)
        print(f"{folder.root / 'vocabulary.json'}: {FIRST + len(merges)} tokens")
    if options.check is not None:
        text, sound = check(path, options.side, options.tokens, options.longest)
        print(text)
        if not sound:
            raise SystemExit(1)
