"""Attention, written out: softmax(q kᵀ / √e) v without ever holding the n × m matrix of weights.

Every softmax attention of the project goes through `attention`. Three backends compute the same:

    tiled    the online-softmax algorithm (FlashAttention-2, arXiv 2307.08691, Algorithms 1 and 2), forward and backward
             by hand in plain PyTorch: one tile of queries against one tile of keys at a time, memory linear in m.
             Read this one first
    triton   the same, fused: on the GPU a tile of queries stays on the chip while tiles of keys pass by; the default on CUDA
    sdpa     torch's own scaled_dot_product_attention; the default elsewhere, and what the tests compare with

linear_attention.py holds the cheap relative that DC-AE and SANA use on grids of latents.

    python attention.py            shape trace, and the backends side by side
    python attention.py --bench    on a GPU: the kernels against every backend of torch's own, timed

Letters: b batch, hq/hk heads of queries/keys, n queries, m keys, e width of a head.
"""

import math
import sys

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from parts.attention_triton import LOG2E, LOWEST, fused, why_not_triton

TILE = 64  # queries and keys per tile of `tiled`
BACKENDS = ("auto", "triton", "tiled", "sdpa")

def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
              backend: str = "auto") -> Tensor:
    """q `b hq n e`, k and v `b hk m e`, hq a multiple of hk (grouped queries) -> `b hq n e`.

    causal: query i sees keys up to i + m − n, so that n new queries may follow m − n cached keys.
    key_mask `b m`: true where a key may be seen. A query that may see nothing gives zeros.
    Raises ValueError for shapes that do not fit, for a backend it does not know and for one that cannot run here.
    """
    b, hq, n, e = q.shape
    hk, m = k.shape[1:3]
    if k.shape != (b, hk, m, e) or v.shape != k.shape or hq % hk:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want b hq n e and twice b hk m e, "
                         "hq a multiple of hk")
    if key_mask is not None and (key_mask.shape != (b, m) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask {tuple(key_mask.shape)} {key_mask.dtype}: want bool of shape {(b, m)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if q.is_cuda and not why_not_triton(q) else "sdpa"
    if backend == "triton":
        if reason := why_not_triton(q):
            raise ValueError(f"attention backend triton cannot run here: {reason}")
        return fused(q, k, v, key_mask, causal)[0]
    if backend == "tiled":
        return Tiled.apply(q, k, v, key_mask, causal)
    return sdpa(q, k, v, causal, key_mask)


def visible(rows: Tensor, columns: Tensor, shift: int, causal: bool, key_mask: Tensor | None) -> Tensor | None:
    """Which of the queries `rows` see which of the keys `columns`: `b|1 1 n m`, or None where all see all."""
    seen = None
    if causal:
        seen = rearrange(columns[None, :] <= rows[:, None] + shift, "n m -> 1 1 n m")
    if key_mask is not None:
        keys = rearrange(key_mask[:, columns], "b m -> b 1 1 m")
        seen = keys.expand(-1, 1, len(rows), -1) if seen is None else keys & seen
    return seen


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if key_mask is None and (not causal or n == m):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups > 1)
    seen = visible(torch.arange(n, device=q.device), torch.arange(m, device=q.device), m - n, causal, key_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=groups > 1)  # since torch 2.5 a row without keys gives zeros


# ---------------------------------------------------------------- tiled: the algorithm, readable


class Tiled(torch.autograd.Function):
    """Online softmax. Per query it keeps only the running maximum, the running sum and the weighted values."""

    @staticmethod
    def forward(ctx, q, k, v, key_mask, causal):
        scale, shift = LOG2E / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2]
        out, lse = torch.empty_like(q), wide(q).new_empty(q.shape[:-1])  # lse: log2 Σ 2^score, all that backward needs
        for rows in torch.arange(q.shape[2], device=q.device).split(TILE):
            q_tile = wide(q[:, :, rows])
            top = q_tile.new_full(q_tile.shape[:-1], -math.inf)
            total = torch.zeros_like(top)
            values = torch.zeros_like(q_tile)
            for columns in tiles_of_keys(k, rows, shift, causal):
                k_tile, v_tile = shared(k, columns, q), shared(v, columns, q)
                score = hidden(q_tile @ k_tile.mT, visible(rows, columns, shift, causal, key_mask))
                new_top = torch.maximum(top, score.amax(-1) * scale)
                base = new_top.clamp(min=LOWEST)  # a row that has seen nothing yet: −∞ − −∞ is no number
                keep, weight = (top - base).exp2(), (score * scale - base[..., None]).exp2()
                total = keep * total + weight.sum(-1)
                values = keep[..., None] * values + weight @ v_tile
                top = new_top
            out[:, :, rows] = (values / torch.where(total > 0, total, 1.0)[..., None]).to(out.dtype)
            lse[:, :, rows] = top + total.log2()  # −∞ for a row that sees nothing
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, key_mask, out, lse = ctx.saved_tensors
        scale, shift, groups = LOG2E / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
        dq, dk, dv = (torch.zeros_like(wide(x)) for x in (q, k, v))
        for rows in torch.arange(q.shape[2], device=q.device).split(TILE):
            q_tile, grad_tile = wide(q[:, :, rows]), wide(grad[:, :, rows])
            delta = (grad_tile * out[:, :, rows]).sum(-1)  # Σ_j p_ij dp_ij: what a row of softmax's gradient shares
            base = lse[:, :, rows].clamp(min=LOWEST)
            for columns in tiles_of_keys(k, rows, shift, ctx.causal):
                k_tile, v_tile = shared(k, columns, q), shared(v, columns, q)
                score = hidden(q_tile @ k_tile.mT, visible(rows, columns, shift, ctx.causal, key_mask))
                p = (score * scale - base[..., None]).exp2()
                dp = grad_tile @ v_tile.mT
                ds = p * (dp - delta[..., None])
                dq[:, :, rows] += ds @ k_tile
                dk[:, :, columns] += rearrange(ds.mT @ q_tile, "b (h g) m e -> g b h m e", g=groups).sum(0)
                dv[:, :, columns] += rearrange(p.mT @ grad_tile, "b (h g) m e -> g b h m e", g=groups).sum(0)
        dq, dk = dq * scale * math.log(2), dk * scale * math.log(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def wide(x: Tensor) -> Tensor:
    """Statistics and sums are float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shared(x: Tensor, columns: Tensor, q: Tensor) -> Tensor:
    """A tile of keys or values, once for each head of the queries that share it."""
    return repeat(wide(x[:, :, columns]), "b h m e -> b (h g) m e", g=q.shape[1] // x.shape[1])


def hidden(score: Tensor, seen: Tensor | None) -> Tensor:
    return score if seen is None else score.masked_fill(~seen, -math.inf)


def tiles_of_keys(k: Tensor, rows: Tensor, shift: int, causal: bool) -> list[Tensor]:
    """The tiles of keys that some of these queries may see: under a causal mask, the later ones are never touched."""
    m = min(k.shape[2], max(int(rows[-1]) + shift + 1, 0)) if causal else k.shape[2]
    return list(torch.arange(m, device=k.device).split(TILE)) if m else []





if __name__ == "__main__":
    if sys.argv[1:] == ["--bench"]:
        from benchmarks.attention import main
        sys.exit(main())
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, *shape, 32, device=device) for shape in ((4, 100), (2, 150), (2, 150)))
    key_mask = torch.arange(150, device=device)[None] < torch.tensor([[150], [90]], device=device)
    print("q        b hq n e", tuple(q.shape))
    print("k, v     b hk m e", tuple(k.shape))
    oracle = attention(q, k, v, causal=True, key_mask=key_mask, backend="sdpa")
    for name in ("tiled",) if why_not_triton(q) else ("tiled", "triton"):
        out = attention(q, k, v, causal=True, key_mask=key_mask, backend=name)
        print(f"{name:8} b hq n e", tuple(out.shape), f"largest difference from sdpa {(out - oracle).abs().max():.1e}")
        assert out.shape == q.shape and torch.allclose(out, oracle, atol=1e-4)
    if why_not_triton(q):
        print(f"triton   not here: {why_not_triton(q)}")
