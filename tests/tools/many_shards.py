"""Very many shards, and what a start on them takes: from the command to the first batch of real pictures.

    python -m tests.tools.many_shards ROOT 3600 10000       writes 3600 shards of 10000 pictures each (1 KiB a picture)
    python data.py --index ROOT
    python -m tests.tools.many_shards ROOT                  starts on them, once for each of several stages
    python -m tests.tools.many_shards ROOT speed            pictures a second of any data, without a model
"""

import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

BLOCK = 512


def png(number: int) -> bytes:
    """A picture of 4 × 4 pixels, another for each number."""
    file = io.BytesIO()
    Image.frombytes("RGB", (4, 4), np.random.default_rng(number).bytes(48)).save(file, "png")
    return file.getvalue()


def header(name: str, size: int) -> bytes:
    """Of a plain file in a tar (POSIX.1-1988, ustar)."""
    fields = [(name.encode(), 100), (b"0000644", 8), (b"0000000", 8), (b"0000000", 8), (b"%011o" % size, 12),
              (b"00000000000", 12), (b" " * 8, 8), (b"0", 1), (b"", 100), (b"ustar", 6), (b"00", 2)]
    block = b"".join(value.ljust(width, b"\0") for value, width in fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def write(root: Path, shards: int, each: int) -> None:
    """All are really there. Pictures differ inside a shard, and in their last bytes, behind the picture's end, between
    shards."""
    pictures = [png(number) for number in range(1000)]
    heads = [header(f"{i:06}.png", len(pictures[i % 1000]) + 12) + pictures[i % 1000] for i in range(each)]
    root.mkdir(parents=True)
    for shard in tqdm(range(shards), desc="shards"):
        files = ((head + b"%05d %06d" % (shard, i)).ljust(2 * BLOCK, b"\0") for i, head in enumerate(heads))
        (root / f"{shard:05}.tar").write_bytes(b"".join(files) + b"\0" * 2 * BLOCK)


def opened(root: Path, stage: str):
    """-> (the folder, the stage's batches), as training opens them."""
    import train
    from disk.reading import open_folders
    from spar import make_config
    config = make_config(data=str(root), edits=(0.0,) * 9)
    folder, one = open_folders({stage: config.data}, {stage}, {stage: 0.0})[stage], train.stage_named(stage)
    return folder, train.Batches(config, stage, one.sample, one.shares(config), data_folder=folder)


def start(root: Path, stage: str) -> None:
    """What a training process does up to its first batch."""
    began = time.time()
    folder, batches = opened(root, stage)
    looked, batch = time.time() - began, batches[0]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{stage}: {len(folder.of('pictures'))} samples, opened after {looked:.1f} s, first batch "
          f"{tuple(batch['images'].shape)} after {time.time() - began:.1f} s, {len(batch['bad'])} bad, "
          f"peak {memory:.2f} GiB")


def speed(root: Path, count: int = 1500) -> None:
    """A training process's way to its batches of pictures alone, by itself and with two workers, in turns."""
    import torch
    from torch.utils.data import DataLoader
    torch.set_num_threads(1)
    _, batches = opened(root, "T1")
    for workers in (0, 2) * 3:
        loader = iter(DataLoader(batches, batch_size=None, sampler=range(count), num_workers=workers))
        next(loader)
        began = time.time()
        read = sum(len(batch["images"]) for batch in loader)
        print(f"{workers} workers: {read / (time.time() - began):.0f} pictures a second")


if __name__ == "__main__":
    home, *numbers = sys.argv[1:]
    if len(numbers) == 2:
        write(Path(home), *map(int, numbers))
    elif numbers == ["speed"]:
        speed(Path(home))
    elif numbers:
        start(Path(home), numbers[0])
    else:
        for stage in ("P2", "T1", "T3"):
            subprocess.run([sys.executable, "-m", "tests.tools.many_shards", home, stage], check=True)
