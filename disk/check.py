"""What a folder of data holds and what is wrong with it: the commands of `python data.py --check` and `--build-vocab`."""

import statistics
import time
import unicodedata
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from disk import openmoji
from disk.bytepair import FIRST, learn_merges, save_vocabulary
from disk.layouts import scan
from disk.reading import as_tensor
from disk.files import BadFile, printable, read_picture
from plumbing.command import Parser, UserError, run_command


def alphabets(texts) -> str:
    """Shares of the alphabets that the letters of these texts belong to."""
    counts = Counter(unicodedata.name(c, "?").split()[0].title() for text in texts for c in text if c.isalpha())
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common(4)) or "none"


def check(path: Path, side: int = 32) -> tuple[str, bool]:
    """(report, sound): every sample is read as training reads it."""
    found = scan(path)
    sizes, spent, texts, read = [], 0.0, [], 0
    faults = list(found.faults)
    torch.set_num_threads(1)
    for sample in tqdm(found.samples() + found.samples("test"), desc="reading"):
        has = sample.has
        jobs = [lambda role=role: picture(has[role]) for role in ("image", "source", "target") if role in has]
        jobs += [sample.instruction] if "source" in has else [sample.caption] if "words" in has else []

        def picture(blob):
            nonlocal spent, read
            start = time.perf_counter()
            image = read_picture(blob)
            as_tensor(image, side, None)
            spent, read = spent + time.perf_counter() - start, read + 1
            sizes.append(image.size)

        for job in jobs:
            try:
                said = job()
                texts += [said] if said else []
            except BadFile as bad:
                faults.append((next(iter(has.values())).name.partition(":")[0], printable(sample.key), str(bad)))
    lines = [f"{path}: " + (", ".join(f"{count} {layout}" for layout, count in found.layouts.items()) or "no samples")]
    for kind, samples in found.kinds.items():
        if samples:
            held = sum(sample.held_out for sample in samples)
            lines.append(f"{kind:9} {len(samples) - held} to train on, {held} held out")
    if sizes:
        w, h = zip(*sizes)
        lines.append(f"sizes     {min(w)}×{min(h)} to {max(w)}×{max(h)}, median {statistics.median(w):.0f}×{statistics.median(h):.0f}")
        lines.append(f"speed     {read / spent:.0f} pictures a second on one core, read and cut to {side}×{side}")
    if texts:
        lines.append(f"letters   {alphabets(texts)} in texts; {alphabets(s.key for s in found.samples())} in keys")
    if found.left_alone:
        lines.append(f"{found.left_alone} files of other kinds are left alone")
    lines += [f"fault     {file}{f' [{key}]' if key else ''}: {what}" for file, key, what in faults]
    lines.append(f"{len(faults)} faults")
    return "\n".join(lines), not faults


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, help="folder: say what it holds and what is wrong")
    parser.add_argument("--build-vocab", type=Path, help="folder: learn byte pairs from its texts, write vocabulary.json there")
    parser.add_argument("--tokens", type=int, default=1024, help="size of the vocabulary")
    parser.add_argument("--side", type=int, default=32, help="side that pictures are cut to")
    given = parser.read()
    path = given.check or given.build_vocab
    if path is None or given.tokens <= FIRST:
        raise UserError(f"--check PATH or --build-vocab PATH is wanted, and --tokens above {FIRST}")
    if str(path) == "openmoji":
        path = openmoji.write(given.side)
    if given.build_vocab:
        merges = learn_merges(tqdm(scan(path).texts(), desc="texts"), given.tokens)
        save_vocabulary(path / "vocabulary.json", merges)
        print(f"{path / 'vocabulary.json'}: {FIRST + len(merges)} tokens")
    if given.check:
        report, sound = check(path, given.side)
        print(report)
        if not sound:
            raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
