"""What a step reads: pictures, words and noise as tensors, one function for each kind of stage.

A batch is a pure function of (seed, stage, step): nothing is kept from one to the next. So it is the same whichever process
makes it, ahead of time or not, before a restart or after it, and several processes can share one.

    python batches.py              the shapes of each stage's batch
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from data import WORDS, DrawnWorld
from diffusion import logit_normal_times
from disk import DiskData, Found
from files import BadFile
from mllm import TextTokenizer, WordTokenizer
from spar import NAMES, Config

Batch = dict[str, Tensor | tuple[Tensor, ...]]
Words = tuple[Tensor, Tensor]  # ids `b t`, mask `b t`


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
    found: Found | None = None  # what `--data` holds; None: the drawn world

    def __post_init__(self):
        index = NAMES.index(self.name)
        self.batch = self.config.batch[index]
        self.world = open_world(self.config, index, self.found, self.edits_among(self.batch))
        if self.batch % self.ranks:
            raise ValueError(f"{self.name} has a batch of {self.batch}, which {self.ranks} processes cannot share: see --batch")

    def __getitem__(self, step: int) -> Batch:
        """"bad": (key, what is wrong) of the samples that others stand in for; "stop": why there is no batch at all."""
        try:
            batch = self.make(self, range(step * self.batch, (step + 1) * self.batch))
        except BadFile as bad:  # told by the training process: out of a worker it would come with a traceback
            batch = {"stop": str(bad)}
        if self.found:
            batch["bad"], self.world.bad = self.world.bad, []
        return batch

    def edits_among(self, batch: int) -> int:
        return round(batch * self.shares.get("edits", 0))

    def mine(self, items):
        return items[self.rank::self.ranks]

    def prompts(self, texts: list[str], has_image: bool = False) -> Words:
        return self.words.prompts(texts, self.config.grid**2 if has_image else 0)

    def some_emptied(self, texts: list[str], numbers: list[int]) -> list[str]:
        """# paper leaves open: the share of prompts emptied for classifier-free guidance; here 10 % (`drop_words`)."""
        return ["" if self.world.rng("emptied", i).random() < self.config.drop_words else text for i, text in zip(numbers, texts)]

    def noise(self, numbers: range) -> tuple[Tensor, Tensor]:
        """(σ `r·b`, ε `r·b p h w`) for r = `draws` times and noises of each picture, the draws one after the other."""
        f, r = self.config, self.config.draws
        sigma = logit_normal_times(r * len(numbers), self.world.generator("times", numbers[0]), f.shift)
        sigma = torch.cat([self.mine(part) for part in sigma.split(len(numbers))])
        noise = [torch.randn(r, f.p, f.grid, f.grid, generator=self.world.generator("noise", i)) for i in self.mine(numbers)]
        return sigma, rearrange(noise, "b r p h w -> (r b) p h w")


def language_batch(source: Batches, numbers: range) -> Batch:
    """P1: pictures; questions about them, short and long ones apart so that the short are not padded to the length of the
    long; captions; words without a picture; and what stands where, for L_name."""
    numbers, world = source.mine(numbers), source.world
    images, talks, captions = world.described(numbers)
    asked = [(i, turn) for i, talk in enumerate(talks) for turn in talk]
    asked.sort(key=lambda pair: sum(text.count(" ") for text in pair[1]))
    cut, batch = len(asked) * 3 // 4, {"images": images, "start": source.prompts([""] * len(images), has_image=True)[0]}
    for name, part in (("short", asked[:cut]), ("long", asked[cut:]), ("caption", [(i, c) for i, c in enumerate(captions) if c])):
        if part:
            owner = [torch.tensor([i for i, _ in part])] if name != "caption" or len(part) < len(images) else []
            batch[name] = (*dialogue(source.words, [turn for _, turn in part]), *owner)
    if texts := world.texts(numbers):
        batch["text"] = dialogue(source.words, texts)
    if things := world.things(numbers):
        batch["things"] = things
    return batch


def dialogue(words: WordTokenizer, turns: list[tuple[str, str]]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(asked, reply) pairs -> right-padded ids `r l` of both and <eos>, and where the replies stand: (rows, columns)."""
    asked = [words.encode(question) for question, _ in turns]
    rows = [question + words.encode(reply) + [words.eos_id] for question, (_, reply) in zip(asked, turns)]
    ids, mask = words.pad(rows, left=False)
    replies = mask & (torch.arange(ids.shape[1]) >= torch.tensor([len(question) for question in asked])[:, None])
    return ids, replies.nonzero(as_tuple=True)


def picture_batch(source: Batches, numbers: range) -> Batch:
    """P2, T1 to T3: pictures alone."""
    return {"images": source.world.pictures(source.mine(numbers))}


def drawing_batch(source: Batches, numbers: range) -> Batch:
    """P3: requests, pictures that fulfil them, noise."""
    mine = source.mine(numbers)
    texts, images = source.world.drawings(mine, source.shares["captions"])
    return {"images": images, "words": source.prompts(source.some_emptied(texts, mine)), "noise": source.noise(numbers)}


def unified_batch(source: Batches, numbers: range) -> Batch:
    """U1 to U3: requests, then edits with their references; the pictures wanted, in this order; noise."""
    mine, split = source.mine(numbers), numbers[len(numbers) - source.edits_among(len(numbers)):]
    to_draw, to_edit = [i for i in mine if i not in split], [i for i in mine if i in split]
    texts, drawn = source.world.drawings(to_draw, source.shares["captions"])
    instructions, before, after = source.world.changes(to_edit, source.shares["outcomes"])
    batch = {"images": torch.cat([drawn, after]), "noise": source.noise(numbers)}
    if texts:
        batch["words"] = source.prompts(source.some_emptied(texts, to_draw))
    if instructions:
        batch["instructions"] = source.prompts(source.some_emptied(instructions, to_edit), has_image=True)
        batch["references"] = before
    return batch


def open_world(config: Config, epoch: int, found: Found | None, edits: int = 0, split: str = "train") -> DrawnWorld | DiskData:
    """Where a stage's samples come from; its number is their epoch's."""
    if found is None:
        return DrawnWorld(config.side, config.seed, split, epoch)
    return DiskData(found, config.side, config.seed, epoch, split, config.flip, config.batch[epoch], edits)


def to(batch, device):
    """The same tensors on another device."""
    if isinstance(batch, dict):
        return {key: to(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else tuple(to(part, device) for part in batch)


if __name__ == "__main__":
    for name, make in (("P1", language_batch), ("T1", picture_batch), ("P3", drawing_batch), ("U2", unified_batch)):
        batch = Batches(Config(), name, make, {"edits": 0.5, "captions": 0.5, "outcomes": 0.5})[0]
        for key, value in batch.items():
            print(f"{name}  {key:13}", *(tuple(part.shape) for part in torch.utils._pytree.tree_leaves(value)))
        assert batch["images"].shape[1:] == (3, 32, 32)
