"""Attention, written out: softmax(q kᵀ / √e) v without ever holding the n × m matrix of weights.

Every softmax attention of the project goes through `attention`. Three backends compute the same:

    tiled    the online-softmax algorithm (FlashAttention-2, arXiv 2307.08691, Algorithms 1 and 2), forward and backward
             by hand in plain PyTorch: one tile of queries against one tile of keys at a time, memory linear in m.
             Read this one first
    triton   the same, fused (parts/attention_triton.py): on the GPU a tile of queries stays on the chip while tiles of
             keys pass by; the default on CUDA, once a small input has shown that it agrees with sdpa
    sdpa     torch's own scaled_dot_product_attention; the default elsewhere, and what the tests compare with

parts/linear_attention.py holds the cheap relative that DC-AE and SANA use on grids of latents.

    python attention.py            shape trace, and the backends side by side
    python attention.py --bench    on a GPU: the kernels against every backend of torch's own, timed

Letters: b batch, a heads of keys, g heads of queries that share one of them, n queries, m keys, e width of a head.
"""

import argparse
import math
from operator import index
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from parts.attention_triton import LOG2E, LOWEST, fused, fused_by_default, why_not_triton
from parts.backend import BACKENDS, agrees, constant_while_compiling, default_backend, small_inputs, use_backend

TILE = 64  # queries and keys per tile of `tiled`
COMPARED = (150, 200)  # queries and keys of the small input on which the kernels must agree with sdpa

__all__ = ["attention", "use_backend"]


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
              backend: str = "auto") -> Tensor:
    """q `b (a g) n e`, k and v `b a m e` -> `b (a g) n e`: g heads of queries share one of keys.

    causal: query i sees keys up to i + m − n, so that n new queries may follow m − n cached keys.
    key_mask `b m`, bool: true where a key may be seen. A query that may see nothing gives zeros.
    backend: "triton" | "tiled" | "sdpa", or "auto": what `use_backend` chose for the process.
    Raises ValueError for shapes that do not fit, for a backend that it does not know and for one that cannot run here.
    """
    (b, query_heads, _, e), (heads, m) = q.shape, k.shape[1:3]
    if k.shape != (b, heads, m, e) or v.shape != k.shape or query_heads % heads:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: want b (a g) n e and twice b a m e")
    if key_mask is not None and (key_mask.shape != (b, m) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask {tuple(key_mask.shape)} {key_mask.dtype}: want bool of shape {(b, m)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = default_backend()
    if backend == "auto":
        width, group = index(e), index(query_heads // heads)  # while torch.compile traces, a size may be a symbol
        kind = (q.device, q.dtype, width, key_mask is not None, causal, group > 1)
        backend = "triton" if fused_by_default(q) and trusted(*kind) else "sdpa"
    if backend == "triton":
        if reason := why_not_triton(q):
            raise ValueError(f"attention backend triton cannot run here: {reason}; use --attention auto")
        return fused(q, k, v, key_mask, causal)[0]
    if backend == "tiled":
        return Tiled.apply(q, k, v, key_mask, causal)
    return sdpa(q, k, v, causal, key_mask)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    n, m, grouped = q.shape[2], k.shape[2], q.shape[1] > k.shape[1]
    if key_mask is None and (not causal or n == m):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    mask = visible(torch.arange(n, device=q.device), torch.arange(m, device=q.device), m - n, causal, key_mask)
    # since torch 2.5 a row without keys gives zeros there too
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def visible(rows: Tensor, columns: Tensor, shift: int, causal: bool, key_mask: Tensor | None) -> Tensor | None:
    """Which of the queries `rows` see which of the keys `columns`: `b|1 1 n m`, or None where all see all."""
    mask = None
    if causal:
        mask = rearrange(columns[None, :] <= rows[:, None] + shift, "n m -> 1 1 n m")
    if key_mask is not None:
        keys = rearrange(key_mask[:, columns], "b m -> b 1 1 m")
        mask = keys.expand(-1, 1, len(rows), -1) if mask is None else keys & mask
    return mask


@constant_while_compiling
def trusted(device: torch.device, dtype: torch.dtype, width: int, masked: bool, causal: bool, grouped: bool) -> bool:
    """Whether the fused kernels give on `device` what sdpa gives, on a small input; found out at its first call."""
    words = ["masked"] * masked + ["causal"] * causal + ["grouped"] * grouped
    kind = ("attention,", str(dtype).removeprefix("torch."), f"heads of {width}", *words)
    n, m = COMPARED  # on the GPU, tiles in full and tiles in part
    key_mask = torch.arange(m, device="cpu") >= torch.tensor([[0], [37]], device="cpu") if masked else None
    return agrees(kind, device,
                  lambda q, k, v: fused(q, k, v, key_mask.to(device) if masked else None, causal)[0],
                  lambda q, k, v: sdpa(q, k, v, causal, key_mask),
                  lambda: small_inputs(dtype, (2, 1, 1) if grouped else (2, 2, 2), (n, m, m), width))


# ---------------------------------------------------------------- tiled: the algorithm, readable


class Tiled(torch.autograd.Function):
    """Online softmax. Per query it keeps only the running maximum, the running sum and the weighted values.

    Scores are in units of log 2 from the start (`scale` holds log2 e), as the kernels have them.
    """

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
                k_tile, v_tile = for_each_query_head(k, columns, q), for_each_query_head(v, columns, q)
                score = hide(q_tile @ k_tile.mT, visible(rows, columns, shift, causal, key_mask))
                new_top = torch.maximum(top, score.amax(-1) * scale)
                base = new_top.clamp(min=LOWEST)  # a row that sees nothing so far: −∞ − −∞ is no number
                shrink = (top - base).exp2()  # what was summed so far had the old maximum as its unit
                weight = (score * scale - base[..., None]).exp2()
                total = shrink * total + weight.sum(-1)
                values = shrink[..., None] * values + weight @ v_tile
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
        scale, shift, group = LOG2E / math.sqrt(q.shape[-1]), k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
        dq, dk, dv = (torch.zeros_like(wide(x)) for x in (q, k, v))
        for rows in torch.arange(q.shape[2], device=q.device).split(TILE):
            q_tile, grad_tile = wide(q[:, :, rows]), wide(grad[:, :, rows])
            delta = (grad_tile * out[:, :, rows]).sum(-1)  # Σ_j p_ij dp_ij: what a row of softmax's gradient shares
            base = lse[:, :, rows].clamp(min=LOWEST)
            for columns in tiles_of_keys(k, rows, shift, ctx.causal):
                k_tile, v_tile = for_each_query_head(k, columns, q), for_each_query_head(v, columns, q)
                score = hide(q_tile @ k_tile.mT, visible(rows, columns, shift, ctx.causal, key_mask))
                p = (score * scale - base[..., None]).exp2()  # the weights again: they were not kept
                dp = grad_tile @ v_tile.mT
                ds = p * (dp - delta[..., None])
                dq[:, :, rows] += ds @ k_tile
                dk[:, :, columns] += reduce(ds.mT @ q_tile, "b (a g) m e -> b a m e", "sum", g=group)
                dv[:, :, columns] += reduce(p.mT @ grad_tile, "b (a g) m e -> b a m e", "sum", g=group)
        dq, dk = dq * scale * math.log(2), dk * scale * math.log(2)  # score = scale · q kᵀ, in units of log 2
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def wide(x: Tensor) -> Tensor:
    """Statistics and sums are float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def for_each_query_head(x: Tensor, columns: Tensor, q: Tensor) -> Tensor:
    """A tile of keys or values, once for each head of the queries that share it."""
    return repeat(wide(x[:, :, columns]), "b a m e -> b (a g) m e", g=q.shape[1] // x.shape[1])


def hide(score: Tensor, mask: Tensor | None) -> Tensor:
    return score if mask is None else score.masked_fill(~mask, -math.inf)


def tiles_of_keys(k: Tensor, rows: Tensor, shift: int, causal: bool) -> list[Tensor]:
    """The tiles of keys that some of these queries may see: under a causal mask, the later ones are never touched."""
    m = min(k.shape[2], max(int(rows[-1]) + shift + 1, 0)) if causal else k.shape[2]
    return list(torch.arange(m, device=k.device).split(TILE)) if m else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", action="store_true", help="on a GPU: time the kernels against torch's own, and stop")
    parser.add_argument("--out", type=Path, help="file for its figures (default runs/bench/attention-<device>.json)")
    given = parser.parse_args()
    if given.bench:
        from benchmarks.attention import main as bench
        return bench(attention, given.out)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, *shape, 32, device=device) for shape in ((4, 100), (2, 150), (2, 150)))
    key_mask = torch.arange(150, device=device)[None] < torch.tensor([[150], [90]], device=device)
    print("q        b (a g) n e", tuple(q.shape))
    print("k, v     b a m e    ", tuple(k.shape))
    reference = attention(q, k, v, causal=True, key_mask=key_mask, backend="sdpa")
    for name in ("tiled",) if why_not_triton(q) else ("tiled", "triton"):
        out = attention(q, k, v, causal=True, key_mask=key_mask, backend=name)
        difference = (out - reference).abs().max()
        print(f"{name:8} b (a g) n e", tuple(out.shape), f"largest difference from sdpa {difference:.1e}")
        assert out.shape == q.shape and torch.allclose(out, reference, atol=1e-4)
    if why_not_triton(q):
        print(f"triton   not here: {why_not_triton(q)}")


if __name__ == "__main__":
    main()
