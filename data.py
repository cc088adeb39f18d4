"""What a step reads: pictures, words and noise as tensors, one function for each kind of stage.

Two things give the same five kinds of sample: the drawn world (world/) and data on disk (disk/).

    method                 sample            drawn world                       data on disk               read by
    dialogue_samples       picture, turns    questions of all kinds, caption   LLaVA's turns, captions    P1
    texts                  words alone       facts, requests written out       the same without, captions P1
    pictures               picture           any scene                         any picture                P2, T1 to T3
    text_to_image_samples  request, picture  captions, GenEval's six kinds     captions                   P3, U1 to U3
    edit_samples           request, pictures ImgEdit's nine kinds              instruction triples        U2, U3

A batch is a pure function of (seed, stage, step): nothing is kept from one to the next. So it is the same whichever
process makes it, ahead of time or not, before a restart or after it, and several processes can share one.

    python data.py [data.png]              the shapes of each kind of batch, samples in words (and a sheet of pictures)
    python data.py --check PATH            what data on disk holds, and for every fault the file, the key and the mend
    python data.py --build-vocab PATH      its byte-pair vocabulary, PATH/vocabulary.json
    python data.py --index PATH            where the samples of its shards lie, PATH/.index, for millions of them

Letters: b batch, h w rows and columns of the latent, p its channels.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

from diffusion import Noise, logit_normal_times
from disk.files import BadFile
from disk.reading import DiskData
from disk.samples import DataFolder
from parts.words import TextTokenizer, Turns, WordTokenizer, dialogue
from spar import NAMES, Config
from world.drawing import FACT_WORDS
from world.language import WORDS, DrawnWorld, show_samples

Batch = dict[str, Tensor | Turns | Noise | tuple[Tensor, ...]]


@dataclass
class Batches(torch.utils.data.Dataset):
    """Step -> its batch. Of the pictures that a step has over all processes, this one takes rank, rank + ranks, …"""

    config: Config
    name: str  # of the stage
    make: Callable  # one of the functions below
    shares: dict[str, float]  # of edits, of whole captions, of edits whose outcome is said
    rank: int = 0
    ranks: int = 1
    words: TextTokenizer = field(default_factory=lambda: WordTokenizer(WORDS))
    data_folder: DataFolder | None = None  # what `--data` holds; None: the drawn world
    parts: int = 1  # that a process works on one after the other: each is what a process of so many more would have
    split: str = "train"

    def __post_init__(self):
        whole, index, self.config = self.config, NAMES.index(self.name), self.config.at(self.name)
        self.batch = self.config.batch[index]
        self.world = open_world(self.config, index, self.data_folder, self.edits_among(self.batch), self.split)
        if self.batch % self.ranks:
            raise ValueError(f"{self.name} has a batch of {self.batch}, which {self.ranks} processes cannot share: "
                             f"--batch {max(1, round(self.batch / self.ranks)) * self.ranks} is the nearest")
        self.early = None  # what stands in for it in the first steps of T3, with smaller pictures
        parted = [copy.copy(self) for _ in range(self.parts)] if self.parts > 1 else []  # all of one world
        for part, source in enumerate(parted):
            source.rank, source.ranks, source.parted = self.rank * self.parts + part, self.ranks * self.parts, []
        self.parted = parted
        if self.name == "T3" and whole.early and whole.of_stage("sides", "T2"):
            sides = whole.sides[:5] + whole.sides[4:5] + whole.sides[6:]
            self.early = replace(self, config=replace(whole, sides=sides, early=0.0))

    def __getitem__(self, step: int) -> Batch | list[Batch]:
        """"bad": (file, key, what is wrong) of samples that others stand in for; "stop": why there is no batch."""
        if self.early and step < self.config.early * self.config.of_stage("steps", "T3"):
            return self.early[step]
        if self.parted:
            return [source[step] for source in self.parted]
        try:
            batch = self.make(self, range(step * self.batch, (step + 1) * self.batch))
        except BadFile as bad:  # told by the training process: out of a worker it would come with a traceback
            batch = {"stop": str(bad)}
        if self.data_folder:
            batch["bad"], self.world.bad = self.world.bad, []
        return batch

    def edits_among(self, batch: int) -> int:
        return round(batch * self.shares.get("edits", 0))

    def share_of(self, numbers):
        """Those of a step's numbers that this process works on."""
        return numbers[self.rank::self.ranks]

    def prompts(self, texts: list[str], has_image: bool = False) -> tuple[Tensor, Tensor]:
        """-> (ids `b t`, mask `b t`)"""
        return self.words.requests(texts, self.config.grid**2 if has_image else 0)

    def some_emptied(self, texts: list[str], numbers: list[int]) -> list[str]:
        """# paper leaves open: the share of prompts emptied for classifier-free guidance; here 10 % (`drop_words`)."""
        share = self.config.drop_words
        return ["" if self.world.rng("emptied", i).random() < share else text for i, text in zip(numbers, texts)]

    def noise(self, numbers: range) -> Noise:
        """Each picture's noise is a function of its number, so no process or restart changes it."""
        draws, config, world = self.config.noises_per_picture, self.config, self.world
        sigma = logit_normal_times(draws * len(numbers), world.generator("times", numbers[0]), config.shift)
        sigma = torch.cat([self.share_of(part) for part in sigma.split(len(numbers))])
        shape = draws, config.p, config.grid, config.grid
        noise = [torch.randn(*shape, generator=world.generator("noise", i)) for i in self.share_of(numbers)]
        return Noise(sigma, rearrange(noise, "b draws p h w -> (draws b) p h w"))


# ---------------------------------------------------------------- one function for each kind of stage


def language_batch(source: Batches, numbers: range) -> Batch:
    """P1: pictures; questions about them, captions and words without a picture, of all of which those of like length
    stand together ("turns 0", …); and what stands where, for L_name."""
    numbers, world, words = source.share_of(numbers), source.world, source.words
    images, talks, captions = world.dialogue_samples(numbers)
    begin, picture = [words.bos_id], [words.image_id] * source.config.grid**2
    batch = {"images": images, "prefix": words.pad([begin + picture for _ in images] + [begin])[0]}
    turns = [(turn, i, "L_lm") for i, talk in enumerate(talks) for turn in talk]
    turns += [(turn, i, "L_caption") for i, turn in enumerate(captions) if turn]
    alone = [2 * i + second for i in numbers for second in (0, 1)]  # words behind <bos> alone, two for each picture
    turns += [(turn, len(images), "L_text") for turn in world.texts(alone)]
    turns = sorted((sum(text.count(" ") for text in turn), turn, i, kind) for turn, i, kind in turns)
    for number, part in enumerate(of_like_length(turns)):
        batch[f"turns {number}"] = dialogue(words, *zip(*(row[1:] for row in part)))
    if things := world.things(numbers):
        batch["things"] = things
        batch["names"] = tuple(torch.tensor([words.ids[word] for word in options]) for options in FACT_WORDS.values())
    return batch


def of_like_length(rows: list[tuple], cuts: int = 2) -> list[list[tuple]]:
    """Rows (length, …), sorted, cut in two where padding each part to its longest adds least, and the parts again."""
    if not cuts or len(rows) < 2:
        return [rows] if rows else []
    cut = min(range(1, len(rows)), key=lambda i: i * rows[i - 1][0] + (len(rows) - i) * rows[-1][0])
    return of_like_length(rows[:cut], cuts - 1) + of_like_length(rows[cut:], cuts - 1)


def picture_batch(source: Batches, numbers: range) -> Batch:
    """P2, T1 to T3: pictures alone."""
    return {"images": source.world.pictures(source.share_of(numbers))}


def text_to_image_batch(source: Batches, numbers: range) -> Batch:
    """P3: requests, pictures that fulfil them, noise."""
    own = source.share_of(numbers)
    texts, images = source.world.text_to_image_samples(own, source.shares["captions"])
    return {"images": images, "words": source.prompts(source.some_emptied(texts, own)), "noise": source.noise(numbers)}


def unified_batch(source: Batches, numbers: range) -> Batch:
    """U1 to U3: requests, then edits with their references; the pictures wanted, in this order; noise."""
    own, edits = source.share_of(numbers), numbers[len(numbers) - source.edits_among(len(numbers)):]
    to_draw, to_edit = [i for i in own if i not in edits], [i for i in own if i in edits]
    texts, drawings = source.world.text_to_image_samples(to_draw, source.shares["captions"])
    instructions, before, after = source.world.edit_samples(to_edit, source.shares["outcomes"])
    batch = {"images": torch.cat([drawings, after]), "noise": source.noise(numbers)}
    if texts:
        batch["words"] = source.prompts(source.some_emptied(texts, to_draw))
    if instructions:
        batch["instructions"] = source.prompts(source.some_emptied(instructions, to_edit), has_image=True)
        batch["references"] = before
    return batch


def open_world(config: Config, epoch: int, data_folder: DataFolder | None, edits: int = 0,
               split: str = "train") -> DrawnWorld | DiskData:
    """Where a stage's samples come from; its number is their epoch's."""
    if data_folder is None:
        return DrawnWorld(config.side, config.training_seed, split, epoch)
    seed, batch = config.training_seed, config.batch[epoch]
    return DiskData(data_folder, config.side, seed, epoch, split, config.mirror, batch, edits, config.fit)


def to(batch, device):
    """The same tensors on another device."""
    if isinstance(batch, dict):
        return {key: to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple):
        parts = [to(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


def read(batches: Iterator, where: str) -> tuple[list[Batch], list, float]:
    """-> (the parts of a batch, the samples that others stand in for, seconds of waiting). Raises BadFile, which says
    `where`, where there is no batch."""
    start, bad = time.time(), []
    batch = next(batches)
    parts = batch if isinstance(batch, list) else [batch]
    for part in parts:
        bad += part.pop("bad", [])
        if hopeless := part.pop("stop", ""):
            raise BadFile(f"{where}: {hopeless}")
    return parts, bad, time.time() - start


def show(path: str = "") -> None:
    """Prints the shapes of each stage's batch and a few samples in words; with a path, writes a sheet of pictures."""
    kinds = {"P1": language_batch, "T1": picture_batch, "P3": text_to_image_batch, "U2": unified_batch}
    for name, make in kinds.items():
        batch = Batches(Config(), name, make, {"edits": 0.5, "captions": 0.5, "outcomes": 0.5})[0]
        for key, value in batch.items():
            parts = [value] if isinstance(value, Tensor) else value
            print(f"{name}  {key:13}", *(tuple(part.shape) for part in parts if part is not None))
        assert batch["images"].shape[1:] == (3, 32, 32)
    show_samples(path)


if __name__ == "__main__":
    if any(argument.startswith("--") for argument in sys.argv[1:]):
        from disk.check import main
        from plumbing.command import run_command
        run_command(main)
    else:
        show(*sys.argv[1:2])
