"""The order in which training reads data on disk, and a sample as tensors.

Sample `number` of a stage is a pure function of (seed, stage, number), a broken one's substitute included.
"""

import random
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from disk.files import BadFile, Blob, read_picture
from disk.layouts import DESCRIBE, SIDES, Found


WINDOW = 1024  # shards are read forward, and mixed inside windows of so many samples
SUBSTITUTES = 20  # tried in a bad sample's place
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
            pairs = sample.turns_and_caption()
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
