"""The order in which training reads data on disk, and a sample as tensors.

Sample `number` of a stage is a pure function of (seed, stage, number), a broken one's substitute included. A pass is a
permutation of the units (shards, lists, loose files), cut into windows of `WINDOW` units, and a permutation inside each
window: with no more units than that it is a permutation of all samples, the exact shuffle.
"""

import random
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from disk.files import BadFile, Blob, read_picture
from disk.index import open_data
from disk.samples import DESCRIBE, KINDS, DataFolder, Samples

WINDOW = 16  # units whose samples are mixed
SUBSTITUTES = 20  # tried in a bad sample's place

# ---------------------------------------------------------------- order and reading

NEEDS = {"P1": ("captions", "talks"), "P2": ("pictures",), "P3": ("captions",),
         "T1": ("pictures",), "T2": ("pictures",), "T3": ("pictures",),
         "U1": ("captions",), "U2": ("captions", "edits"), "U3": ("captions", "edits")}
EXAMPLES = {"captions": "pictures with captions: cat.png, and cat.txt with: a cat on a mat",
            "edits": "edits: 1.source.png and 1.target.png, and 1.instruction.txt with: make it red "
                     "(or go without, --edits 0)",
            "pictures": "pictures: a.png, b.jpg, c.webp …", "talks": "conversations"}


def check_kinds(folder: DataFolder, stages: list[str], edits: dict[str, float]) -> None:
    """Raises BadFile where a stage lacks its kind of data, with an example."""
    for stage in stages:
        needs = [kind for kind in NEEDS[stage] if kind != "edits" or edits[stage] > 0]
        have = [kind for kind in needs if len(folder.of(kind))]
        lacking = needs[:1] if not have else [kind for kind in needs if kind not in have and stage != "P1"]
        if lacking:
            faults = len(folder.faults)
            more = f"; `python data.py --check {folder.root}` names {faults} faults" if faults else ""
            raise BadFile(f"stage {stage} needs {EXAMPLES[lacking[0]]}; {folder.root} has none{more}")


def open_folders(paths: dict[str, str], trained: set[str], edits: dict[str, float]) -> dict[str, DataFolder | None]:
    """Stage -> what its folder holds, None: the drawn world. `paths`: stage -> folder, `edits`: stage -> share of
    editing. Raises BadFile where one of the stages `trained` lacks its kind of data."""
    folders = {path: open_data(Path(path)) for path in dict.fromkeys(paths.values()) if path}
    for path, folder in folders.items():
        check_kinds(folder, [stage for stage in paths if paths[stage] == path and stage in trained], edits)
    return {stage: folders.get(path) for stage, path in paths.items()}


class DiskData:
    """What training asks of `world.language.DrawnWorld`, from samples on disk. Pictures are `b 3 side side` in [-1, 1].

    `batch`, `edits`: of each `batch` numbers the last `edits` ask for edits, so that the numbers of each kind, counted
    alone, have no gaps.
    `mirror`: which pictures are mirrored half of the time: none, those that no words go with (alone), or all.
    `bad`: (file, key, what is wrong) of the samples that were replaced since it was last emptied.
    """

    def __init__(self, folder: DataFolder, side: int, seed: int, epoch: int, split: str = "train",
                 mirror: str = "alone", batch: int = 1, edits: int = 0, fit: str = "middle"):
        self.side, self.key, self.mirror, self.fit = side, f"{seed}/{split}/{epoch}", mirror, fit
        self.batch, self.n_edits = batch, edits
        self.kinds = {kind: folder.of(kind, split) for kind in KINDS}
        self.orders, self.bad = {}, []

    def rng(self, what: str, index: int) -> random.Random:
        """`what` is part of the seed, not a name: another word there makes another order."""
        return random.Random(f"{self.key}/{what}/{index}")

    def generator(self, what: str, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng(what, index).getrandbits(60))

    def order(self, kind: str) -> "Order":
        if kind not in self.orders:
            self.orders[kind] = Order(self.kinds[kind], f"{self.key}/order {kind}")
        return self.orders[kind]

    def read(self, kind: str, number: int, make: Callable):
        """make(sample, rng) for the sample whose turn it is; where that is bad, for one that stands in, always the
        same. Raises BadFile where there is none of the kind, and where `SUBSTITUTES` in a row are bad."""
        samples = self.kinds[kind]
        if not samples:
            raise BadFile(f"needs {EXAMPLES[kind]}; there are none")
        index = self.order(kind)[number]
        for attempt in range(SUBSTITUTES):
            sample = samples[index]
            try:
                return make(sample, self.rng(f"crop {kind}", number))
            except BadFile as bad:
                self.bad.append((sample.file, sample.key, str(bad)))
                index = self.rng(f"instead {kind} {number}", attempt).randrange(len(samples))
        raise BadFile(f"{SUBSTITUTES} samples in a row are bad, the last one: {self.bad[-1][-1]}")

    def number_of_request(self, number: int) -> int:
        """Requests counted alone, without the edits between them."""
        step, place = divmod(number, self.batch)
        return step * (self.batch - self.n_edits) + place

    def number_of_edit(self, number: int) -> int:
        """Edits counted alone: they are the last of each batch."""
        step, place = divmod(number, self.batch)
        return step * self.n_edits + place - (self.batch - self.n_edits)

    # ------------------------------------------------------------ what stages ask for

    def pictures(self, indices) -> Tensor:
        """Pictures alone, cropped at random and half of them mirrored (method of T1 to T3)."""
        def make(sample, rng):
            has = sample.has
            role = "image" if "image" in has else rng.choice(("source", "target"))
            return as_tensor(read_picture(has[role]), self.side, rng, self.mirror != "none", "random")
        return torch.stack([self.read("pictures", i, make) for i in indices])

    def dialogue_samples(self, indices) -> tuple[Tensor, list[list[tuple[str, str]]], list[tuple[str, str] | None]]:
        """(pictures, questions and answers about each, and each one's caption where it has one), for P1."""
        def make(sample, rng):
            pairs = sample.turns_and_caption()
            picture = self.with_words(sample.has["image"], rng)
            has_caption = bool(pairs) and pairs[-1][0] == DESCRIBE
            return picture, pairs[:-1] if has_caption else pairs, pairs[-1] if has_caption else None
        pictures, talks, captions = zip(*(self.read("described", i, make) for i in indices))
        return torch.stack(pictures), list(talks), list(captions)

    def texts(self, indices) -> list[tuple[str, str]]:
        """(given, to learn) without a picture: conversations without one, else captions: P3's words, in P1."""
        if self.kinds["texts"]:
            return [self.read("texts", i, lambda sample, rng: rng.choice(sample.turns())) for i in indices]
        if self.kinds["captions"]:
            return [("caption", self.read("captions", i, lambda sample, rng: sample.caption())) for i in indices]
        return []

    def things(self, indices) -> None:
        """L_name's: what stands where is known of the drawn world alone."""

    def text_to_image_samples(self, indices, captions: float = 1.0) -> tuple[list[str], Tensor]:
        """(captions, their pictures). A caption is whole in any case: `captions` is for the drawn world."""
        if not len(indices):
            return [], torch.empty(0, 3, self.side, self.side)

        def make(sample, rng):
            words = sample.caption()
            return words, self.with_words(sample.has["image"], rng)
        words, pictures = zip(*(self.read("captions", self.number_of_request(i), make) for i in indices))
        return list(words), torch.stack(pictures)

    def edit_samples(self, indices, outcomes: float = 0.0) -> tuple[list[str], Tensor, Tensor]:
        """(instructions, pictures before, pictures after). What comes of an edit is known of the drawn world alone."""
        if not len(indices):
            return [], *torch.empty(2, 0, 3, self.side, self.side)

        def make(sample, rng):  # both mirrored or none
            turn = rng.getrandbits(60)
            pair = (self.with_words(sample.has[x], random.Random(turn)) for x in ("source", "target"))
            return sample.instruction(), *pair
        words, before, after = zip(*(self.read("edits", self.number_of_edit(i), make) for i in indices))
        return list(words), torch.stack(before), torch.stack(after)

    def with_words(self, blob: Blob, rng: random.Random) -> Tensor:
        """The middle of a picture that words belong to. They may name a side, in any language."""
        return as_tensor(read_picture(blob), self.side, rng if self.mirror == "all" else None, fit=self.fit)


class Order:
    """number -> which of the samples it is; pass after pass. All that is kept is the order of the units of one pass and
    one window of their samples."""

    def __init__(self, samples: Samples, key: str, window: int = WINDOW):
        self.samples, self.key, self.window = samples, key, window
        self.pass_, self.now = (None,), (None,)  # the last results of `units` and of `mixed`, behind what was asked

    def permutation(self, count: int, what: str) -> list[int]:
        seed = random.Random(f"{self.key}/{what}").getrandbits(60)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    def units(self, epoch: int) -> tuple[list[int], list[int]]:
        """-> (the units in their order, where each window ends)"""
        if self.pass_[0] != epoch:
            units = self.permutation(len(self.samples.units), f"{epoch}")
            ends = list(accumulate(len(self.samples.units[unit]) for unit in units))
            self.pass_ = epoch, units, ends[self.window - 1::self.window] + ends[-1:] * (len(ends) % self.window > 0)
        return self.pass_[1:]

    def mixed(self, epoch: int, window: int) -> list[int]:
        """The samples of a window, mixed."""
        if self.now[0] != (epoch, window):
            units, samples = self.units(epoch)[0][window * self.window:(window + 1) * self.window], self.samples
            starts = [samples.ends[unit] - len(samples.units[unit]) for unit in units]
            line = [i for start, unit in zip(starts, units) for i in range(start, samples.ends[unit])]
            order = self.permutation(len(line), f"{epoch}/{window}")
            self.now = (epoch, window), [line[i] for i in order]
        return self.now[1]

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, len(self.samples))
        ends = self.units(epoch)[1]
        window = bisect_right(ends, place)
        return self.mixed(epoch, window)[place - (ends[window - 1] if window else 0)]


def as_tensor(image: Image.Image, side: int, rng: random.Random | None, flip: bool = True,
              fit: str = "middle") -> Tensor:
    """-> `3 side side` in [-1, 1]: the shorter side resized, a square cut out (`fit`: at random, or the middle; or
    squash: all of it squeezed), mirrored half of the time with `flip`. Without `rng` neither chance nor mirror."""
    scale = side / min(image.size)
    w, h = (max(side, round(x * scale)) for x in image.size)
    left, top = (w - side) // 2, (h - side) // 2
    if rng and fit == "random":
        left, top = rng.randint(0, w - side), rng.randint(0, h - side)
    box = (left / scale, top / scale, min(image.width, (left + side) / scale), min(image.height, (top + side) / scale))
    box = (0, 0, *image.size) if fit == "squash" else box
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if rng and flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return levels.permute(2, 0, 1).float() / 127.5 - 1
