"""The language side: the language model, learnable queries, connector, and how it answers (paper, Sec. 3.3).

To answer:   <bos> f_v of the picture, question ─ LLM ─ answer, word by word
To draw:     <bos> [f_v of a reference], request, queries ─ LLM (frozen, causal) ─ K hidden states ─ router ─ Ĥ
             Ĥ, at reference positions f_v again ─ connector (bidirectional) ─ condition of the DiT `b l u`

The language model is Qwen2.5's (arXiv 2412.15115): RMSNorm, rotary positions, grouped queries, SwiGLU. On a first
reading skip to `Connector`.

    python mllm.py                 shape trace

Letters: b batch, n visual tokens, t words of a prompt, q queries, l = t + q, d width of the LLM, k routed layers, u
width of the condition, a heads, e width of a head.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import attention
from parts.layer import Layer, RMSNorm
from parts.positions import grid_positions, rotary, rotate, word_positions
from parts.shared_batch import share_of_mean
from parts.words import TEXT_LOSSES, TextTokenizer, Turns, WordTokenizer
from router import ROUTERS, layer_choice

LOGITS = 2**26  # numbers that are held at a time

# ---------------------------------------------------------------- language model


class CausalSelfAttention(nn.Module):
    """Grouped queries: `heads` of queries share `kv_heads` of keys and values. `causal=False` is the connector's."""

    def __init__(self, d: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, e = heads, kv_heads, d // heads
        self.q, self.k, self.v = nn.Linear(d, heads * e), nn.Linear(d, kv_heads * e), nn.Linear(d, kv_heads * e)
        self.out = nn.Linear(heads * e, d, bias=False)

    def forward(self, x, cos, sin, mask, causal, cache):
        q = rotate(rearrange(self.q(x), "b l (a e) -> b a l e", a=self.heads), cos, sin)
        k = rotate(rearrange(self.k(x), "b l (a e) -> b a l e", a=self.kv_heads), cos, sin)
        v = rearrange(self.v(x), "b l (a e) -> b a l e", a=self.kv_heads)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        y = attention(q, k, v, causal=causal, key_mask=mask)
        return self.out(rearrange(y, "b a l e -> b l (a e)")), (k, v)


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
    """Embeddings `b l d` in, L + 1 hidden states out: the embeddings, each layer's result, the last one normed; with
    `keep` only these, and no other is held.

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

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: list | None = None,
                keep: list[int] | None = None) -> tuple[list[Tensor], list]:
        past = cache[0][0].shape[2] if cache else 0
        cos, sin = rotary(word_positions(mask, x, past), self.rotary_width)
        keep = range(len(self.layers) + 1) if keep is None else keep
        hidden, new_cache = [x] if 0 in keep else [], []
        for i, layer in enumerate(self.layers, 1):
            x, pair = layer(x, cos, sin, mask, True, cache[i - 1] if cache else None)
            new_cache.append(pair)
            if i in keep:
                last = i == len(self.layers)  # the others stay as they are, as in Qwen2.5's own list of hidden states
                hidden.append(self.norm(x) if last else x)
        return hidden, new_cache

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T if self.output is None else self.output(hidden)

    def word_losses(self, states: Tensor, words: Tensor) -> Tensor:
        """−log p of each of the `words` `t`, in float32, from the states `t d` that they follow: some at a time, whose
        logits are computed again in backward, where all together would be gigabytes (Qwen2.5: 151,674 columns)."""
        def loss(states: Tensor, words: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(states).float(), words, reduction="none")

        parts = list(zip(*(x.split(max(1, LOGITS // len(self.embedding.weight))) for x in (states, words))))
        again = len(parts) > 1 and torch.is_grad_enabled()
        return torch.cat([checkpoint(loss, *part, use_reentrant=False) if again else loss(*part) for part in parts])


# ---------------------------------------------------------------- connector


class Connector(nn.Module):
    """Layers of the LLM's own kind with bidirectional attention, a norm, and the Linear to the condition's width `u`.

    `share`: how much of each layer's change of the states counts at first; it is learned.
    # differs from paper: there the copied layers work in full from the beginning (share 1). Made to predict the next
    # word, a small LLM's last layers drop what the DiT needs; the toy lets them in gently (0.1).
    """

    def __init__(self, llm: LanguageModel, layers: int, condition_width: int, share: float = 1.0):
        super().__init__()
        if not 0 <= layers <= len(llm.layers):
            raise ValueError(f"connector_layers {layers}: they copy the LLM's last, so at most {len(llm.layers)}")
        self.copy_layers(llm, layers)
        self.share = nn.Parameter(torch.full((layers,), share))
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
    tokens: Tensor  # `b l u`, what the DiT attends to
    mask: Tensor  # `b l`, true = a token
    weights: Tensor | None = None  # `b l k`, DTR's choice of layers for each token


class Prefix(NamedTuple):  # how a sequence begins, once read
    cache: list  # each layer's keys and values, `b a l e`
    last: Tensor  # `b 1 d`, the state that the next word follows
    mask: Tensor  # `b l`, true = a word


# ---------------------------------------------------------------- multimodal model


class MLLM(nn.Module):
    """LLM + router + queries + connector. `k` layers are routed, `router` is one of router.ROUTERS.

    `positions`: the connector's reference tokens and queries carry the sines of row and column that the DiT's tokens
    carry.
    # differs from paper: there none has; on a small budget they are what lets the DiT find a token's place in the
    # reference.
    """

    def __init__(self, words: TextTokenizer, llm: LanguageModel, k: int, queries: int, connector_layers: int,
                 condition_width: int, router: str = "dtr", connector_share: float = 1.0, positions: bool = False):
        super().__init__()
        d = llm.norm.weight.shape[0]
        if positions and math.isqrt(queries) ** 2 != queries:
            raise ValueError(f"queries {queries}: with positions they are a square grid, so take 4, 9, 16, …")
        self.words, self.llm, self.positions = words, llm, positions
        self.choice = layer_choice(len(llm.layers), k)
        self.queries = nn.Parameter(torch.randn(queries, d) * 0.02)
        self.connector = Connector(llm, connector_layers, condition_width, connector_share)
        self.router = ROUTERS[router](d, k)  # last: whichever it is, all else starts with the same random numbers
        nn.init.eye_(self.router.W_p.weight)  # paper leaves open: W_p starts as the identity, so that the connector,
        nn.init.zeros_(self.router.W_p.bias)  # a copy of LLM layers, first reads states much like those it was made for

    def embed(self, ids: Tensor, f_v: Tensor | None = None) -> Tensor:
        """Ids `b l` -> embeddings `b l d`; the places of `image_id` take the visual tokens f_v `b n d` in order."""
        x = self.llm.embedding(ids)
        return x if f_v is None else x.masked_scatter((ids == self.words.image_id)[..., None], f_v.to(x.dtype))

    def read_prefix(self, ids: Tensor, f_v: Tensor | None = None) -> Prefix:
        """<bos> and perhaps a picture (left-padded ids `b l`), read once: many questions follow, each by itself."""
        mask = ids != self.words.pad_id
        hidden, cache = self.llm(self.embed(ids, f_v), mask)
        return Prefix(cache, hidden[-1][:, -1:], mask)

    def text_losses(self, turns: Turns, prefix: Prefix) -> Tensor:
        """The next-word loss, in float32, of each word that the model is to speak."""
        cache, last, mask = prefix
        if turns.owner is not None:
            cache, last = [(k[turns.owner], v[turns.owner]) for k, v in cache], last[turns.owner]
            mask = mask[turns.owner]
        mask = F.pad(mask, (0, turns.ids.shape[1]), value=True)  # causal, no word sees the padding behind it
        hidden, _ = self.llm(self.embed(turns.ids), mask, cache)
        states = torch.cat([last, hidden[-1]], 1)  # column i: what word i follows
        return self.llm.word_losses(states[turns.rows, turns.columns], turns.ids[turns.rows, turns.columns])

    @torch.no_grad()
    def answer(self, ids: Tensor, mask: Tensor, f_v: Tensor | None = None, max_new: int = 24, temperature: float = 0.0,
               generator: torch.Generator | None = None) -> list[list[int]]:
        """Goes on from left-padded ids `b l`, at most `max_new` words, until <eos>. Temperature 0: the likeliest."""
        hidden, cache = self.llm(self.embed(ids, f_v), mask)
        replies, done = [[] for _ in ids], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new):
            logits = self.llm.logits(hidden[-1][:, -1]).float()
            if temperature > 0:
                chances = (logits / temperature).softmax(-1).cpu()  # the generator is a CPU's on every device
                word = torch.multinomial(chances, 1, generator=generator)[:, 0].to(ids.device)
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

    def condition(self, ids: Tensor, mask: Tensor, f_v: Tensor | None = None) -> Condition:
        """Words `b t` (left-padded), `image_id` where the reference f_v `b n d` stands -> the condition `b l u`."""
        H, mask = self.routed_states(ids, mask, f_v)  # Sec. 3.3: K hidden states of the frozen LLM, `b l k d`
        H_mixed, weights = self.router(H)  # Sec. 3.3: Ĥ, every token's own mixture of the layers
        H_mixed = self.with_reference(H_mixed, ids, f_v)  # Sec. 3.3: at reference positions f_v, no mixture
        tokens = self.connector(H_mixed, mask)  # Sec. 3.3: bidirectional, to the width of the DiT's condition
        return Condition(tokens, mask, weights)

    def routed_states(self, ids: Tensor, mask: Tensor, f_v: Tensor | None) -> tuple[Tensor, Tensor]:
        """The LLM reads the words, then the queries; -> (states of the K chosen layers `b l k d`, mask `b l`).

        # differs from paper: there the reference follows the words (so too with InternVL3's tokenizer); here it stands
        # before them, as in a question, so that the frozen LLM finds what an instruction names as it does there.
        The LLM is frozen here and causal, so what stands before the queries does not depend on anything that trains: it
        is computed without gradient, and only the queries are followed through the LLM's layers, behind a cache.
        """
        with torch.no_grad():
            at_words, cache = self.llm(self.embed(ids, f_v), mask, keep=self.choice)
        mask = torch.cat([mask, mask.new_ones(len(mask), len(self.queries))], 1)
        at_queries, _ = self.llm(repeat(self.queries, "q d -> b q d", b=len(ids)), mask, cache, self.choice)
        return torch.stack([torch.cat(states, 1) for states in zip(at_words, at_queries)], 2), mask

    def with_reference(self, H_mixed: Tensor, ids: Tensor, f_v: Tensor | None) -> Tensor:
        """Ĥ `b l d` with the encoder's own tokens at the reference's places: detail that the LLM would not pass on.
        With `positions`, sines of row and column are added to these tokens, and to Ĥ at the queries."""
        at_words, at_queries = H_mixed.split([ids.shape[1], len(self.queries)], 1)
        if f_v is not None:
            reference = f_v + grid_positions(f_v) if self.positions else f_v
            at_words = at_words.masked_scatter((ids == self.words.image_id)[..., None], reference.to(at_words.dtype))
        if self.positions:  # differs from paper: see the class
            at_queries = at_queries + grid_positions(at_queries[:1])
        return torch.cat([at_words, at_queries], 1)

    def text_condition(self, ids: Tensor, mask: Tensor) -> Condition:
        """What a plain text-to-image model reads (P3, in SANA's place): the LLM's states at the words, without queries.
        # paper leaves open: which states; here what the router, untrained, makes of the K layers: U1 starts from there.
        """
        with torch.no_grad():
            hidden, _ = self.llm(self.llm.embedding(ids), mask, keep=self.choice)
            H_mixed, _ = self.router(torch.stack(hidden, 2))
        return Condition(self.connector(H_mixed, mask), mask)


# ---------------------------------------------------------------- what P1 learns from


def language_losses(mllm: MLLM, vision: nn.Module, batch: dict, weights: dict[str, float]) -> dict[str, Tensor]:
    """P1, in place of InternVL3: the next word of answers (L_lm) and captions (L_caption) about pictures, and of words
    without a picture: facts, and requests written out (L_text); and names for what each visual token shows (L_name)."""
    f_v = vision(batch["images"])
    prefix, losses = mllm.read_prefix(batch["prefix"], f_v), {}
    texts = [part for part in batch.values() if isinstance(part, Turns)]
    nothing = f_v.flatten()[:0]  # what a batch lacks has loss 0, and a gradient that no process waits for
    of_words = torch.cat([mllm.text_losses(part, prefix) for part in texts] or [nothing])
    kinds = torch.cat([part.kind for part in texts] or [nothing])
    for kind, symbol in enumerate(TEXT_LOSSES):
        words = kinds == kind
        losses[symbol] = share_of_mean((of_words * words).sum() / words.sum().clamp(min=1), words.sum())
    if "L_name" in weights and "things" in batch:
        named = naming_loss(f_v, mllm.llm.embedding.weight, batch["things"], batch["names"])
        losses["L_name"] = share_of_mean(named, len(batch["things"][0]))
    return losses


def naming_loss(f_v: Tensor, embedding: Tensor, things: tuple[Tensor, Tensor, Tensor],
                names: tuple[Tensor, ...]) -> Tensor:
    """L_name: each visual token `b n d` of a thing's quarter of the picture, held against the embeddings of words, is
    nearest to the thing's size, colour, shape and place. Grounding, densely: a question then finds what it names by
    likeness.

    `things`: (which picture, which quarter, which name of each fact is right, `things facts`). `names`: of each fact,
    the ids of the words to choose from.
    # differs from paper: InternVL3 comes trained; P1 is short.
    """
    picture, quarter, right = things
    half = math.isqrt(f_v.shape[1]) // 2
    quarters = rearrange(f_v, "b (row y col x) d -> b (row col) (y x) d", row=2, col=2, y=half, x=half)
    tokens = quarters[picture, quarter]  # `t n d`: of each thing its quarter's tokens
    losses = []
    for fact, ids in enumerate(names):
        likeness = rearrange(tokens @ embedding[ids].T, "t n words -> (t n) words")
        answers = repeat(right[:, fact], "t -> (t n)", n=tokens.shape[1])
        losses.append(F.cross_entropy(likeness.float(), answers))
    return torch.stack(losses).mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    words = WordTokenizer("a red circle what is it".split())
    llm = LanguageModel(len(words), d=128, layers=4, heads=4, kv_heads=2, mlp=352)
    mllm = MLLM(words, llm, k=4, queries=16, connector_layers=2, condition_width=96)
    f_v = torch.randn(2, 16, 128)
    question, prompt = (words.prompts([text] * 2, visual_tokens=16)[0] for text in ("what is it?", "a red circle"))
    print("question   b l   ", tuple(question.shape), " with f_v b n d", tuple(f_v.shape))
    print("answers          ", [words.decode(r) for r in mllm.answer(question, question > 0, f_v, max_new=3)])
    tokens, _, weights = mllm.condition(prompt, prompt > 0, f_v)
    print("condition  b l u ", tuple(tokens.shape), " of 4 words, 16 visual tokens, 16 queries")
    print("weights    b l k ", tuple(weights.shape))
    assert tokens.shape == (2, 4 + 16 + 16, 96) and weights.shape == (2, 36, 4)
