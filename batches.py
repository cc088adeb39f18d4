"""What a step reads: pictures, words and noise as tensors, one function for each kind of stage.

A batch is a pure function of (seed, stage, step): nothing is kept from one to the next. So it is the same whichever process
makes it, ahead of time or not, before a restart or after it, and several processes can share one.

    python batches.py              the shapes of each stage's batch
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from data import WORDS, DrawnWorld
from diffusion import logit_normal_times
from mllm import WordTokenizer
from spar import NAMES, Config
from world import FACT_WORDS, draw

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

    def __post_init__(self):
        index = NAMES.index(self.name)
        self.batch = self.config.batch[index]
        self.world, self.words = DrawnWorld(self.config.side, self.config.seed, epoch=index), WordTokenizer(WORDS)
        if self.batch % self.ranks:
            raise ValueError(f"{self.name} has a batch of {self.batch}, which {self.ranks} processes cannot share: see --batch")

    def __getitem__(self, step: int) -> Batch:
        return self.make(self, range(step * self.batch, (step + 1) * self.batch))

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
    numbers = source.mine(numbers)
    images, talks = source.world.conversations(numbers)
    turns = [(i, turn) for i, talk in enumerate(talks) for turn in talk[:-1]]
    turns.sort(key=lambda pair: sum(text.count(" ") for text in pair[1]))
    cut = len(turns) * 3 // 4
    said = {name: (*dialogue(source.words, [turn for _, turn in part]), torch.tensor([i for i, _ in part]))
            for name, part in (("short", turns[:cut]), ("long", turns[cut:]))}
    found = [(b, thing) for b, index in enumerate(numbers) for thing in source.world.scene(index).objects]
    right = [[words.index(thing.word(fact)) for fact, words in FACT_WORDS.items()] for _, thing in found]
    return said | {"images": images, "start": source.prompts([""] * len(images), has_image=True)[0],
                   "caption": dialogue(source.words, [talk[-1] for talk in talks]),
                   "text": dialogue(source.words, source.world.texts(numbers)),
                   "things": (torch.tensor([b for b, _ in found]), torch.tensor([thing.place for _, thing in found]),
                              torch.tensor(right))}


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
    requests = source.world.prompts(mine, captions=source.shares["captions"])
    words = source.prompts(source.some_emptied([request.text for request in requests], mine))
    return {"images": draw([request.scene for request in requests], source.world.side), "words": words,
            "noise": source.noise(numbers)}


def unified_batch(source: Batches, numbers: range) -> Batch:
    """U1 to U3: requests, then edits with their references; the pictures wanted, in this order; noise."""
    mine, split = source.mine(numbers), numbers[len(numbers) - round(len(numbers) * source.shares["edits"]):]
    to_draw, to_edit = [i for i in mine if i not in split], [i for i in mine if i in split]
    requests, edits = source.world.prompts(to_draw, captions=source.shares["captions"]), source.world.edits(to_edit)
    batch = {"images": draw([r.scene for r in requests] + [edit.target for edit in edits], source.world.side),
             "noise": source.noise(numbers)}
    if requests:
        batch["words"] = source.prompts(source.some_emptied([request.text for request in requests], to_draw))
    if edits:
        told = [source.world.rng("told", i).random() < source.shares["outcomes"] for i in to_edit]
        texts = [f"{edit.instruction} {edit.outcome}" if tell else edit.instruction for edit, tell in zip(edits, told)]
        batch["instructions"] = source.prompts(source.some_emptied(texts, to_edit), has_image=True)
        batch["references"] = draw([edit.source for edit in edits], source.world.side)
    return batch


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
