"""Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909), over bytes so that no text is unknown (GPT-2).

Where data comes from disk it takes the word tokenizer's place. A text is cut into words, each with the space before it;
a word is its bytes; and again and again the most frequent neighbours become one token.

    python -m disk.bytepair        a small vocabulary, made and used
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from parts.words import TextTokenizer
from plumbing.command import write_text

WORD = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\w\s]+| ?_+|\s+")
FIRST = 4 + 256  # ids of the signs, then of the bytes, then of the merges
LONGEST_WORD = 64  # bytes that are merged as one word; the rest of an endless one starts anew


def words_of(text: str) -> list[bytes]:
    """Words as bytes, each with the space before it; together they are the text."""
    words = [word.encode() for word in WORD.findall(" " + text.strip())] if text.strip() else []
    return [word[i:i + LONGEST_WORD] for word in words for i in range(0, len(word), LONGEST_WORD)]


class BytePairTokenizer(TextTokenizer):
    """`merges`: pairs of ids, the first learned first; the i-th makes id FIRST + i. `longest`: tokens of a text that
    are kept. Raises ValueError for merges that do not fit together."""

    def __init__(self, merges: list[tuple[int, int]], longest: int = 64):
        self.merges, self.longest = [tuple(pair) for pair in merges], longest
        self.ranks = {pair: i for i, pair in enumerate(self.merges)}
        self.bytes = [b""] * 4 + [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            if not 4 <= a < len(self.bytes) or not 4 <= b < len(self.bytes):
                raise ValueError(f"merge ({a}, {b}) joins what does not exist yet: build the vocabulary again")
            if len(self.bytes[a] + self.bytes[b]) > LONGEST_WORD:
                raise ValueError(f"a token is longer than {LONGEST_WORD} bytes")
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.of_word = lru_cache(maxsize=65536)(self.merge)

    def __len__(self) -> int:
        return FIRST + len(self.merges)

    def merge(self, word: bytes) -> list[int]:
        """The ids of a word: the pair that was learned first is joined first."""
        ids = [4 + byte for byte in word]
        while len(ids) > 1:
            rank, i = min((self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(zip(ids, ids[1:])))
            if rank == len(self.ranks):
                break
            ids[i:i + 2] = [FIRST + rank]
        return ids

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in words_of(text):
            ids += self.of_word(word)
            if len(ids) >= self.longest:
                break
        return ids[:self.longest]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes[i] for i in ids if self.image_id < i < len(self)).decode(errors="replace").strip()

    def __getstate__(self):  # a cache does not travel to other processes
        return {key: value for key, value in vars(self).items() if key != "of_word"}

    def __setstate__(self, state):
        self.__dict__ |= state
        self.of_word = lru_cache(maxsize=65536)(self.merge)


def learn_merges(texts, size: int) -> list[tuple[int, int]]:
    """The merges that make `size` tokens of these texts, fewer where no pair occurs twice. Ties go to smaller ids."""
    counts = Counter(word for text in texts for word in words_of(text))
    rows = [([4 + byte for byte in word], count) for word, count in sorted(counts.items())]
    pairs, where = Counter(), defaultdict(set)
    for r, (ids, count) in enumerate(rows):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += count
            where[pair].add(r)
    merges = []
    while FIRST + len(merges) < size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        token = FIRST + len(merges)
        merges.append(best)
        for r in where.pop(best):  # the words that hold the pair: their pairs are taken out, and counted anew
            ids, count = rows[r]
            for pair in zip(ids, ids[1:]):
                pairs[pair] -= count
            new = join(ids, best, token)
            rows[r] = new, count
            for pair in zip(new, new[1:]):
                pairs[pair] += count
                where[pair].add(r)
        pairs = +pairs
    return merges


def join(ids: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """`ids` with `token` wherever the pair stands, from the left."""
    new, i = [], 0
    while i < len(ids):
        match = ids[i:i + 2] == list(pair)
        new.append(token if match else ids[i])
        i += 2 if match else 1
    return new


def save_vocabulary(path: Path, merges: list[tuple[int, int]]) -> None:
    write_text(path, json.dumps({"kind": "byte pairs", "merges": merges}) + "\n")


def write_vocabulary(home: Path, texts: Iterable[str], size: int, longest: int, path: Path) -> None:
    """The data's own vocabulary where `data.py --build-vocab` left one in its `home`, else one of its texts."""
    own = home / "vocabulary.json"
    if own.exists():
        save_vocabulary(path, load_vocabulary(own, longest).merges)
    else:
        save_vocabulary(path, learn_merges(tqdm(texts, desc="vocabulary", leave=False), size))


def load_vocabulary(path: Path, longest: int) -> BytePairTokenizer:
    """Raises ValueError for a file that `save_vocabulary` did not write."""
    try:
        if path.stat().st_size > 16 << 20:
            raise ValueError("it is larger than 16 MB")
        merges = json.loads(path.read_text(encoding="utf-8"))["merges"]
        if not all(isinstance(i, int) for pair in merges for i in pair) or any(len(pair) != 2 for pair in merges):
            raise ValueError("merges are pairs of numbers")
        return BytePairTokenizer(merges, longest)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no vocabulary ({str(error) or type(error).__name__}): write one with "
                         "`python data.py --build-vocab PATH`") from None


if __name__ == "__main__":
    merges = learn_merges(["waving hand with light skin tone", "waving hand with dark skin tone", "hand"], 300)
    words = BytePairTokenizer(merges)
    ids = words.encode("a dark hand")
    print("merges        ", len(merges), " ids", len(words))
    print("a dark hand   ", ids, words.pieces(ids))
    assert words.decode(ids) == "a dark hand"
