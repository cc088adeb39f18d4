"""Text to ids and back: what both text tokenizers share, and the word-level one of the drawn world.

The byte-pair one for data on disk is disk/bytepair.py. Four ids are signs: padding, begin, end, and the place of a
picture.
"""

import difflib
from typing import NamedTuple

import torch
from torch import Tensor


class UnknownWords(ValueError):
    """Words that the text tokenizer does not have; the message names them and the nearest it has."""


class TextTokenizer:
    """Text <-> ids: what the word-level one below and the byte-pair one (bytepair.py) share. They add `len`, `encode`,
    `decode`."""

    pad_id, bos_id, eos_id, image_id = range(4)  # image_id stands where a visual token goes; public/qwen.py has others
    request = ""  # what a request to draw begins with

    def pad(self, rows: list[list[int]], left: bool = True) -> tuple[Tensor, Tensor]:
        """Rows of ids -> (ids `b t`, mask `b t`, true = a word), padded on the left or on the right."""
        width = max(map(len, rows))
        pads = [[self.pad_id] * (width - len(row)) for row in rows]
        ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, rows)])
        return ids, ids != self.pad_id

    def prompts(self, texts: list[str], visual_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """What stands before an answer or the queries: <bos>, the place of a picture, words (`pad` on the left)."""
        return self.pad([[self.bos_id, *[self.image_id] * visual_tokens, *self.encode(text)] for text in texts])

    def requests(self, texts: list[str], visual_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """What stands before the queries: `prompts`, to draw behind `request`, to edit behind the reference alone.
        # paper leaves open: its words; here those behind which the LLM learns to write a picture out."""
        return self.prompts(texts if visual_tokens else [self.request + text for text in texts], visual_tokens)

    def pieces(self, ids: list[int]) -> list[str]:
        """The words, or parts of words, that ids stand for, one by one."""
        return [self.decode([i]) for i in ids]


class WordTokenizer(TextTokenizer):
    """One id for each word."""

    request = "describe "

    def __init__(self, words: list[str]):
        self.words = ["<pad>", "<bos>", "<eos>", "<image>", *words]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Raises UnknownWords. Case and space around commas do not matter; . and ? are dropped, so that a question ends
        in its noun, and finding that thing in the picture is one skill for every kind of question."""
        words = text.lower().replace(",", " , ").replace(".", " ").replace("?", " ").split()
        unknown = [word for word in dict.fromkeys(words) if word not in self.ids or word.startswith("<")]
        if unknown:
            near = [difflib.get_close_matches(word, self.words[4:], 1, 0) for word in unknown]
            raise UnknownWords("the drawn world does not know " +
                               ", ".join(f"'{word}' (nearest: '{found[0]}')" for word, found in zip(unknown, near)))
        return [self.ids[word] for word in words]

    def decode(self, ids: list[int]) -> str:
        """The four signs are no words, nor are the rows that a larger vocabulary leaves free."""
        return " ".join(self.words[i] for i in ids if self.image_id < i < len(self))


TEXT_LOSSES = ("L_lm", "L_caption", "L_text")  # of answers, of captions, of words without a picture


class Turns(NamedTuple):
    """Questions with their answers, one a row, and where the answers' words stand."""

    ids: Tensor  # `r t`, padded on the right
    rows: Tensor  # of each word of an answer its row
    columns: Tensor  # and its column
    owner: Tensor | None = None  # `r`: which beginning each row goes on from; None: row i from beginning i
    kind: Tensor | None = None  # of each word of an answer the place of its loss in TEXT_LOSSES


def dialogue(words: TextTokenizer, turns: list[tuple[str, str]], owner: list[int] | None = None,
             losses: list[str] | None = None) -> Turns:
    """(question, answer) pairs -> ids of both with <eos>, and where the answers stand."""
    questions = [words.encode(question) for question, _ in turns]
    rows = [question + words.encode(answer) + [words.eos_id] for question, (_, answer) in zip(questions, turns)]
    ids, mask = words.pad(rows, left=False)
    answers = mask & (torch.arange(ids.shape[1]) >= torch.tensor([len(question) for question in questions])[:, None])
    rows, columns = answers.nonzero(as_tuple=True)
    owner = None if owner is None else torch.tensor(owner)
    kind = None if losses is None else torch.tensor([*map(TEXT_LOSSES.index, losses)])[rows]
    return Turns(ids, rows, columns, owner, kind)
