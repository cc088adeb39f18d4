"""Attention, written out: softmax(q kᵀ / √e) v without ever holding the n × m matrix of weights.

Every softmax attention of the project goes through `attention`. Two backends compute the same:

    tiled    the online-softmax algorithm (FlashAttention-2, arXiv 2307.08691, Algorithms 1 and 2), forward and backward
             by hand in plain PyTorch: one tile of queries against one tile of keys at a time, memory linear in m
    sdpa     torch's own scaled_dot_product_attention; the default on CPU, and what the tests compare with

`linear_attention` is the cheap relative that DC-AE and SANA use on grids of latents.

    python attention.py            shape trace, and the two backends side by side

Letters: b batch, hq/hk heads of queries/keys, n queries, m keys, e width of a head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

TILE = 64  # queries and keys per tile
BACKENDS = ("auto", "tiled", "sdpa")


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
              backend: str = "auto") -> Tensor:
    """q `b hq n e`, k and v `b hk m e`, hq a multiple of hk (grouped queries) -> `b hq n e`.

    causal: query i sees keys up to i + m − n, so that n new queries may follow m − n cached keys.
    key_mask `b m`: true where a key may be seen. A query that may see nothing gives zeros.
    Raises ValueError for shapes that do not fit and for a backend it does not know.
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
    if backend == "tiled":
        return Tiled.apply(q, k, v, causal, key_mask)
    return sdpa(q, k, v, causal, key_mask)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReLU(q) (ReLU(k)ᵀ v), rows normalised: `b h n e` three times -> `b h n e`, in time linear in n (SANA, Sec. 2.2)."""
    q, k, v = q.float().relu(), k.float().relu(), v.float()
    values, total = k.mT @ v, k.sum(2)
    return q @ values / ((q * total[:, :, None]).sum(-1, keepdim=True) + 1e-15)


def sine_positions(h: int, w: int, c: int, device) -> Tensor:
    """`h·w c`: half of the channels tell the row, half the column, in sines and cosines."""
    frequencies = 10.0 ** -torch.linspace(0, 2, c // 4, device=device)
    row, column = (torch.arange(size, device=device)[:, None] * frequencies for size in (h, w))
    row, column = (torch.cat([a.sin(), a.cos()], -1) for a in (row, column))
    grid = torch.cat([row[:, None].expand(h, w, -1), column[None].expand(h, w, -1)], -1)
    return rearrange(grid, "h w c -> (h w) c")


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
    if groups > 1:
        k, v = (repeat(x, "b h m e -> b (h g) m e", g=groups) for x in (k, v))
    if key_mask is None and (not causal or n == m):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    seen = visible(torch.arange(n, device=q.device), torch.arange(m, device=q.device), m - n, causal, key_mask)
    blind = ~seen.any(-1, keepdim=True)  # torch leaves it open what a row without keys gives; here it gives zeros
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | blind).masked_fill(blind, 0)


class Tiled(torch.autograd.Function):
    """Online softmax. Per query it keeps only the running maximum, the running sum and the weighted values."""

    @staticmethod
    def forward(ctx, q, k, v, causal, key_mask):
        scale, shift, groups = 1 / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:-1])  # lse: log Σ exp(score), all that backward needs
        for rows in torch.arange(q.shape[2], device=q.device).split(TILE):
            q_tile = q[:, :, rows]
            top = q_tile.new_full((*q_tile.shape[:-1], 1), -math.inf)
            total = torch.zeros_like(top)
            values = torch.zeros_like(q_tile)
            for columns in tiles_of_keys(k, rows, shift, causal):
                k_tile, v_tile = (repeat(x[:, :, columns], "b h m e -> b (h g) m e", g=groups) for x in (k, v))
                score = scores(q_tile, k_tile, scale, visible(rows, columns, shift, causal, key_mask))
                new_top = torch.maximum(top, score.amax(-1, keepdim=True))
                base = new_top.clamp(min=torch.finfo(q.dtype).min)  # a row that has seen nothing yet: −∞ − −∞ is no number
                keep, weight = (top - base).exp(), (score - base).exp()
                total = keep * total + weight.sum(-1, keepdim=True)
                values = keep * values + weight @ v_tile
                top = new_top
            out[:, :, rows] = values / total.clamp(min=torch.finfo(q.dtype).tiny)
            lse[:, :, rows] = (top + total.log()).squeeze(-1)  # −∞ for a row that sees nothing
        ctx.save_for_backward(q, k, v, out, lse, key_mask)
        ctx.causal = causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, key_mask = ctx.saved_tensors
        scale, shift, groups = 1 / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (grad * out).sum(-1, keepdim=True)  # Σ_j p_ij dp_ij, the part of softmax's gradient that a whole row shares
        for rows in torch.arange(q.shape[2], device=q.device).split(TILE):
            q_tile, grad_tile = q[:, :, rows], grad[:, :, rows]
            base = lse[:, :, rows, None].clamp(min=torch.finfo(q.dtype).min)
            for columns in tiles_of_keys(k, rows, shift, ctx.causal):
                k_tile, v_tile = (repeat(x[:, :, columns], "b h m e -> b (h g) m e", g=groups) for x in (k, v))
                score = scores(q_tile, k_tile, scale, visible(rows, columns, shift, ctx.causal, key_mask))
                p = (score - base).exp()
                dp = grad_tile @ v_tile.mT
                ds = p * (dp - delta[:, :, rows]) * scale
                dq[:, :, rows] += ds @ k_tile
                dk[:, :, columns] += rearrange(ds.mT @ q_tile, "b (h g) m e -> g b h m e", g=groups).sum(0)
                dv[:, :, columns] += rearrange(p.mT @ grad_tile, "b (h g) m e -> g b h m e", g=groups).sum(0)
        return dq, dk, dv, None, None


def scores(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    score = q @ k.mT * scale
    return score if seen is None else score.masked_fill(~seen, -math.inf)


def tiles_of_keys(k: Tensor, rows: Tensor, shift: int, causal: bool) -> list[Tensor]:
    """The tiles of keys that some of these queries may see: under a causal mask, the later ones are never touched."""
    m = min(k.shape[2], max(int(rows[-1]) + shift + 1, 0)) if causal else k.shape[2]
    return list(torch.arange(m, device=k.device).split(TILE)) if m else []


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 100, 32), torch.randn(2, 2, 150, 32), torch.randn(2, 2, 150, 32)
    key_mask = torch.arange(150)[None] < torch.tensor([[150], [90]])
    tiled, oracle = (attention(q, k, v, causal=True, key_mask=key_mask, backend=name) for name in ("tiled", "sdpa"))
    print("q        b hq n e", tuple(q.shape))
    print("k, v     b hk m e", tuple(k.shape))
    print("result   b hq n e", tuple(tiled.shape), f"largest difference {(tiled - oracle).abs().max():.1e}")
    assert tiled.shape == q.shape and torch.allclose(tiled, oracle, atol=1e-5)
