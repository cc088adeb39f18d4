"""The language side: words, language model, learnable queries, connector (paper, Sec. 3.3).

To answer:   <bos> f_v of the picture, question ─ LLM ─ answer, word by word
To draw:     <bos> [f_v of a reference], words, queries ─ LLM (frozen, causal) ─ K hidden states ─ router ─ Ĥ
             Ĥ, at reference positions f_v again ─ connector (bidirectional) ─ condition of the DiT `b l e`

The language model computes what Qwen2.5 does (arXiv 2412.15115): RMSNorm, rotary positions, grouped queries, SwiGLU.

    python mllm.py                 shape trace
"""

import copy
import difflib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from attention import attention, sine_positions
from layer import Layer, RMSNorm
from router import FUSIONS, layer_choice

# ---------------------------------------------------------------- words


class UnknownWords(ValueError):
    """Words that the text tokenizer does not have; the message names them and the nearest it has."""


class TextTokenizer:
    """Text <-> ids: what the word-level one below and the byte-pair one (bytepair.py) share. They add `len`, `encode`, `decode`."""

    pad_id, bos_id, eos_id, image_id = range(4)  # image_id stands where a visual token goes

    def pad(self, rows: list[list[int]], left: bool = True) -> tuple[Tensor, Tensor]:
        """Rows of ids -> (ids `b t`, mask `b t`, true = a word), padded on the left or on the right."""
        width = max(map(len, rows))
        pads = [[self.pad_id] * (width - len(row)) for row in rows]
        ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, rows)])
        return ids, ids != self.pad_id

    def prompts(self, texts: list[str], visual_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """What stands before an answer or before the queries: <bos>, the place of a picture, the words (`pad` on the left)."""
        return self.pad([[self.bos_id, *[self.image_id] * visual_tokens, *self.encode(text)] for text in texts])

    def pieces(self, text: str) -> list[str]:
        """The words, or parts of words, that the ids of a text stand for."""
        return [self.decode([i]) for i in self.encode(text)]


class WordTokenizer(TextTokenizer):
    """One id for each word."""

    def __init__(self, words: list[str]):
        self.words = ["<pad>", "<bos>", "<eos>", "<image>", *words]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Raises UnknownWords. Case and space around commas do not matter; . and ? are dropped, so that a question ends in
        its noun, and finding that thing in the picture is one skill for every kind of question."""
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


# ---------------------------------------------------------------- language model


def rotary(positions: Tensor, width: int, base: float = 1e6) -> tuple[Tensor, Tensor]:
    """Positions `b l` -> cosines and sines `b 1 l e` of the angles position · base^(−2i/e) (RoFormer, arXiv 2104.09864)."""
    frequencies = base ** (-torch.arange(0, width, 2, device=positions.device) / width)
    angles = repeat(positions[..., None] * frequencies, "b l e -> b 1 l (two e)", two=2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)  # angles are float32, x may be half


class CausalSelfAttention(nn.Module):
    """Grouped queries: `heads` of queries share `kv_heads` of keys and values. `causal=False` is the connector's."""

    def __init__(self, d: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, e = heads, kv_heads, d // heads
        self.q, self.k, self.v = nn.Linear(d, heads * e), nn.Linear(d, kv_heads * e), nn.Linear(d, kv_heads * e)
        self.out = nn.Linear(heads * e, d, bias=False)

    def forward(self, x, cos, sin, mask, causal, cache):
        q = rotate(rearrange(self.q(x), "b l (h e) -> b h l e", h=self.heads), cos, sin)
        k = rotate(rearrange(self.k(x), "b l (h e) -> b h l e", h=self.kv_heads), cos, sin)
        v = rearrange(self.v(x), "b l (h e) -> b h l e", h=self.kv_heads)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = attention(q, k, v, causal=causal, key_mask=mask)
        return self.out(rearrange(y, "b h l e -> b l (h e)")), (k, v)


class DecoderLayer(Layer):
    def __init__(self, d: int, heads: int, kv_heads: int, mlp: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(d, eps=1e-6), RMSNorm(d, eps=1e-6)
        self.attn = CausalSelfAttention(d, heads, kv_heads)
        self.gate, self.up = nn.Linear(d, mlp, bias=False), nn.Linear(d, mlp, bias=False)
        self.down = nn.Linear(mlp, d, bias=False)

    def forward(self, x, cos, sin, mask=None, causal=True, cache=None):
        y, cache = self.attn(self.norm1(x), cos, sin, mask, causal, cache)
        x = x + y
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), cache  # SwiGLU


class LanguageModel(nn.Module):
    """Embeddings `b l d` in, L + 1 hidden states out: the embeddings, each layer's result, the last one normed.

    `mask` `b m` (m keys: the cached ones, then these l; true = a word) hides padding, which may stand on either side.
    `cache`: what an earlier call returned; then only the new positions are computed. `tied`: the output weights are the
    embedding's (InternVL3's are not).
    """

    def __init__(self, vocabulary: int, d: int, layers: int, heads: int, kv_heads: int, mlp: int, tied: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(DecoderLayer(d, heads, kv_heads, mlp) for _ in range(layers))
        self.norm = RMSNorm(d, eps=1e-6)
        self.output = None if tied else nn.Linear(d, vocabulary, bias=False)
        self.rotary_width = d // heads
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: list | None = None) -> tuple[list[Tensor], list]:
        past = cache[0][0].shape[2] if cache else 0
        cos, sin = rotary(word_positions(mask, x, past), self.rotary_width)
        hidden, new_cache = [x], []
        for i, layer in enumerate(self.layers):
            x, pair = layer(x, cos, sin, mask, True, cache[i] if cache else None)
            hidden.append(x)
            new_cache.append(pair)
        hidden[-1] = self.norm(x)
        return hidden, new_cache

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T if self.output is None else self.output(hidden)


def word_positions(mask: Tensor | None, x: Tensor, past: int = 0) -> Tensor:
    """`b l`: which word of its sequence each is; padding does not count, so it moves no other word."""
    if mask is None:
        return torch.arange(past, past + x.shape[1], device=x.device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)[:, past:]


# ---------------------------------------------------------------- connector


class Connector(nn.Module):
    """Layers of the LLM's own kind with bidirectional attention, a norm, and the Linear to the condition's width `e`.

    `start`: share at which each layer's change of the states begins; it is learned.
    # differs from paper: there the copied layers work in full from the beginning (start 1). Made to predict the next word,
    # a small LLM's last layers drop what the DiT needs; the toy lets them in gently (0.1).
    """

    def __init__(self, llm: LanguageModel, layers: int, condition_width: int, start: float = 1.0):
        super().__init__()
        if not 0 <= layers <= len(llm.layers):
            raise ValueError(f"connector_layers {layers}: they copy the LLM's last, so at most {len(llm.layers)}")
        self.copy_layers(llm, layers)
        self.share = nn.Parameter(torch.full((layers,), start))
        self.rotary_width = llm.rotary_width
        self.out = nn.Linear(llm.norm.weight.shape[0], condition_width)

    def copy_layers(self, llm: LanguageModel, layers: int | None = None) -> None:
        """Starts as a copy of the LLM's last layers; called again when the LLM has been trained."""
        layers = len(self.layers) if layers is None else layers
        self.layers = copy.deepcopy(llm.layers[len(llm.layers) - layers:]).requires_grad_(True)
        self.norm = copy.deepcopy(llm.norm).requires_grad_(True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        cos, sin = rotary(word_positions(mask, x), self.rotary_width)
        for layer, share in zip(self.layers, self.share):
            x = x + share * (layer(x, cos, sin, mask, causal=False)[0] - x)
        return self.out(self.norm(x))


class Condition(NamedTuple):
    tokens: Tensor  # `b l e`, what the DiT attends to
    mask: Tensor  # `b l`, true = a token
    weights: Tensor | None = None  # `b l k`, DTR's choice of layers for each token


# ---------------------------------------------------------------- multimodal model


class MLLM(nn.Module):
    """LLM + router + queries + connector. `k` layers are routed, `fusion` is one of router.FUSIONS.

    `positions`: the connector's reference tokens and queries carry the sines of row and column that the DiT's tokens carry.
    # differs from paper: there none has; on a small budget they are what lets the DiT find a token's place in the reference.
    """

    def __init__(self, words: TextTokenizer, llm: LanguageModel, k: int, queries: int, connector_layers: int,
                 condition_width: int, fusion: str = "dtr", connector_start: float = 1.0, positions: bool = False):
        super().__init__()
        d = llm.norm.weight.shape[0]
        if positions and math.isqrt(queries) ** 2 != queries:
            raise ValueError(f"queries {queries}: with positions they are a square grid, so take 4, 9, 16, …")
        self.words, self.llm, self.positions = words, llm, positions
        self.choice = layer_choice(len(llm.layers), k)
        self.router = FUSIONS[fusion](d, k)
        nn.init.eye_(self.router.W_p.weight)  # paper leaves open: W_p starts as the identity, so that the connector,
        nn.init.zeros_(self.router.W_p.bias)  # a copy of LLM layers, first reads states much like those it was made for
        self.queries = nn.Parameter(torch.randn(queries, d) * 0.02)
        self.connector = Connector(llm, connector_layers, condition_width, connector_start)

    def embed(self, ids: Tensor, f_v: Tensor | None = None) -> Tensor:
        """Ids `b l` -> embeddings `b l d`; the places of `image_id` take the visual tokens f_v `b n d` in order."""
        x = self.llm.embedding(ids)
        if f_v is None:
            return x
        return x.masked_scatter((ids == self.words.image_id)[..., None], f_v.to(x.dtype))

    # ------------------------------------------------------------ understanding

    def text_loss(self, ids: Tensor, said: tuple[Tensor, Tensor], cache: list, owner: Tensor | None = None) -> Tensor:
        """Mean next-word loss at the (rows, columns) `said` of ids `r l` (right-padded): what the model must say.

        `cache`: what the LLM kept of the embeddings that come first (<bos>, a picture). With `owner` `r`, row i follows
        entry owner[i] of it: many questions about one picture, none of which sees another, and the picture is read once.
        """
        if owner is not None:
            cache = [(k[owner], v[owner]) for k, v in cache]
        hidden, _ = self.llm(self.embed(ids), cache=cache)
        rows, columns = said
        return F.cross_entropy(self.llm.logits(hidden[-1][rows, columns - 1]).float(), ids[rows, columns])

    @torch.no_grad()
    def answer(self, ids: Tensor, mask: Tensor, f_v: Tensor | None = None, max_new: int = 24, temperature: float = 0.0,
               generator: torch.Generator | None = None) -> list[list[int]]:
        """Goes on from left-padded ids `b l`, at most `max_new` words each, until <eos>. Temperature 0: the likeliest word."""
        hidden, cache = self.llm(self.embed(ids, f_v), mask)
        replies, done = [[] for _ in ids], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new):
            logits = self.llm.logits(hidden[-1][:, -1]).float()
            if temperature > 0:
                word = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)[:, 0].to(ids.device)
            else:
                word = logits.argmax(-1)
            done |= word == self.words.eos_id
            if done.all():
                break
            for reply, next_word, over in zip(replies, word.tolist(), done.tolist()):
                reply += [] if over else [next_word]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            hidden, cache = self.llm(self.embed(word[:, None]), mask, cache)
        return replies

    # ------------------------------------------------------------ the way to the DiT

    def condition(self, ids: Tensor, mask: Tensor, f_v: Tensor | None = None) -> Condition:
        """Words `b t` (left-padded), with `image_id` where the reference f_v `b n d` stands -> the DiT's condition `b l e`,
        l = t + q.

        # differs from paper: there the reference follows the words; here it stands before them, as in a question about a
        # picture, so that the frozen LLM finds what an instruction names as it finds what a question names.
        The LLM is frozen here and causal, so what stands before the queries does not depend on anything that trains:
        it is computed without gradient, and only the queries are followed through the LLM's layers.
        """
        b, t = ids.shape
        with torch.no_grad():
            seen, cache = self.llm(self.embed(ids, f_v), mask)
        mask = torch.cat([mask, mask.new_ones(b, len(self.queries))], 1)
        asked, _ = self.llm(repeat(self.queries, "q d -> b q d", b=b), mask, cache)
        H = torch.stack([torch.cat([seen[i], asked[i]], 1) for i in self.choice], 2)  # b l k d
        mixed, weights = self.router(H)  # Ĥ
        said, asked = mixed.split([t, len(self.queries)], 1)
        if f_v is not None:  # reference positions: the encoder's own tokens, past the LLM
            shown = f_v + grid_positions(f_v) if self.positions else f_v
            said = said.masked_scatter((ids == self.words.image_id)[..., None], shown.to(said.dtype))
        if self.positions:
            asked = asked + grid_positions(asked[:1])
        return Condition(self.connector(torch.cat([said, asked], 1), mask), mask, weights)

    def text_condition(self, ids: Tensor, mask: Tensor) -> Condition:
        """What a plain text-to-image model reads (stage P3, in SANA's place): the LLM's states, without queries or routing.
        # paper leaves open: which states; here the plain mean of the K layers through the copied layers of the connector,
        so that DTR, which starts as the mean, goes on where P3 ends."""
        with torch.no_grad():
            hidden, _ = self.llm(self.llm.embedding(ids), mask)
            mixed = torch.stack([hidden[i] for i in self.choice], 2).mean(2)
        return Condition(self.connector(F.layer_norm(mixed, mixed.shape[-1:]), mask), mask)


def grid_positions(x: Tensor) -> Tensor:
    """Sines of row and column for tokens `b n d` of a square grid, `n d`."""
    side = math.isqrt(x.shape[1])
    return sine_positions(side, side, x.shape[2], x.device)


if __name__ == "__main__":
    torch.manual_seed(0)
    words = WordTokenizer("a red circle what is it".split())
    mllm = MLLM(words, LanguageModel(len(words), 128, 4, 4, 2, 352), k=4, queries=16, connector_layers=2, condition_width=96)
    f_v = torch.randn(2, 16, 128)
    question = torch.tensor([[words.bos_id] + [words.image_id] * 16 + words.encode("what is it?")] * 2)
    prompt = torch.tensor([[words.bos_id] + [words.image_id] * 16 + words.encode("a red circle")] * 2)
    print("question   b l   ", tuple(question.shape), " with f_v b n d", tuple(f_v.shape))
    print("answers          ", [words.decode(r) for r in mllm.answer(question, question > 0, f_v, max_new=3)])
    tokens, mask, weights = mllm.condition(prompt, prompt > 0, f_v)
    print("condition  b l e ", tuple(tokens.shape), " of 4 words, 16 visual tokens, 16 queries")
    print("weights    b l k ", tuple(weights.shape))
    assert tokens.shape == (2, 4 + 16 + 16, 96) and weights.shape == (2, 36, 4)
