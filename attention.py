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
import os
import sys

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU alone comes without it
    triton = None

TILE = 64  # queries and keys per tile of `tiled`
LOG2E = math.log2(math.e)  # exp(x) = 2^(x · log2 e); the chip has a unit for 2^x, and the factor goes into the scale
LOWEST = -3e38  # stands for −∞ where −∞ − −∞ would be no number
BACKENDS = ("auto", "triton", "tiled", "sdpa")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs the kernels on CPU, slowly, for the tests


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


def why_not_triton(q: Tensor) -> str:
    """The reason why the fused kernels cannot take q; empty where they can."""
    if triton is None:
        return "Triton is not installed (torch for CUDA brings it)"
    if not q.is_cuda and not INTERPRETED:
        return f"q is on {q.device.type}, the kernels need CUDA (or, to try them out, TRITON_INTERPRET=1)"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, the kernels take float32, bfloat16 and float16"
    return f"heads are {q.shape[-1]} wide, the kernels take up to 256" if q.shape[-1] > 256 else ""


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


# ---------------------------------------------------------------- triton: the same, fused
#
# Names and order are those of `Tiled`. What differs:
#   - the outer loop is the grid: one program for each tile of rows (or of columns) of one head of one sample
#   - forward runs its inner loop twice: over the tiles that every row sees in full, unchecked, then over the rest
#   - backward is two kernels, by rows for dQ (and delta), by columns for dK and dV: each program owns what it writes, so
#     nothing is added up in an order left to chance, and the same input gives the same bits
#   - the sides of a tile are powers of two; a head's width that would waste a quarter of one, such as 72, is held in two
#     parts, 64 + 16, so a tile is a tuple of one part or of two. W: (the width, channels of the first part, of the second)
#   - the products of half-precision tiles take half-precision weights, as the chip's units for them want it

if triton is not None:
    WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's own product takes bfloat16 for integers
    FLOOR, LN2 = tl.constexpr(LOWEST), tl.constexpr(math.log(2))
    BLOCKS = [(128, 128, 8, 2), (128, 64, 4, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 32, 4, 2)]  # tried once for a shape
    if INTERPRETED:
        BLOCKS = [(64, 32, 1, 1)]

    def tuned(kernel):
        configs = [triton.Config({"ROWS": r, "COLUMNS": c}, num_warps=w, num_stages=s) for r, c, w, s in BLOCKS]
        return triton.autotune(configs, key=["SIZE", "W", "CAUSAL"])(triton.jit(kernel, do_not_specialize=["SIZE"]))

    # ------------------------------ tiles

    @triton.jit
    def load(X, places, strides, limit, W: tl.constexpr):
        """Rows `places` of X `n e`, zeros outside: one part (n × W[1],), or two."""
        inside, X = places[:, None] < limit, X + places[:, None].to(tl.int64) * strides[2]
        first, second = tl.arange(0, W[1])[None, :], W[1] + tl.arange(0, W[2] if W[2] else W[1])[None, :]
        if W[2]:
            return tl.load(X + first, inside, 0.0), tl.load(X + second, inside & (second < W[0]), 0.0)
        else:
            return tl.load(X + first, inside & (first < W[0]), 0.0),

    @triton.jit
    def store(X, tile, places, strides, limit, W: tl.constexpr):
        inside, X = places[:, None] < limit, X + places[:, None].to(tl.int64) * strides[2]
        first, second = tl.arange(0, W[1])[None, :], W[1] + tl.arange(0, W[2] if W[2] else W[1])[None, :]
        tl.store(X + first, tile[0].to(X.dtype.element_ty), inside & (first < W[0]))
        if W[2]:
            tl.store(X + second, tile[1].to(X.dtype.element_ty), inside & (second < W[0]))

    @triton.jit
    def zeros(tile):
        """As large as `tile`, for sums."""
        if len(tile) == 2:
            return tl.zeros(tile[0].shape, tl.float32), tl.zeros(tile[1].shape, tl.float32)
        else:
            return tl.zeros(tile[0].shape, tl.float32),

    @triton.jit
    def times(tile, factor):
        if len(tile) == 2:
            return tile[0] * factor, tile[1] * factor
        else:
            return tile[0] * factor,

    @triton.jit
    def product(a, b):
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="tf32x3")

    @triton.jit
    def across(a, b):
        """a bᵀ: rows of one tile against rows of the other."""
        if len(a) == 2:
            return product(a[0], tl.trans(b[0])) + product(a[1], tl.trans(b[1]))
        else:
            return product(a[0], tl.trans(b[0]))

    @triton.jit
    def plus(tile, weight, other):
        """tile + weight @ other"""
        weight = weight.to(other[0].dtype)
        if len(tile) == 2:
            return tile[0] + product(weight, other[0]), tile[1] + product(weight, other[1])
        else:
            return tile[0] + product(weight, other[0]),

    @triton.jit
    def whose(HEADS):
        """Which (head, sample) this program works for."""
        return tl.program_id(1) % HEADS, (tl.program_id(1) // HEADS).to(tl.int64)

    @triton.jit
    def place(X, strides, b, head):
        return X + b * strides[0] + head * strides[1]

    @triton.jit
    def visible_tile(MASK, rows, columns, n, m, shift, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
        seen = (rows[:, None] < n) & (columns[None, :] < m)
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None] + shift)
        if MASKED:
            seen = seen & (tl.load(MASK + columns, mask=columns < m, other=0) != 0)[None, :]
        return seen

    # ------------------------------ forward

    @triton.jit
    def look(q_tile, top, total, values, K, V, MASK, ks, vs, rows, columns, n, m, shift, scale, W: tl.constexpr,
             CAUSAL: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr):
        """The inner loop's body: the queries look at one more tile of keys."""
        k_tile, v_tile = load(K, columns, ks, m, W), load(V, columns, vs, m, W)
        score = across(q_tile, k_tile)
        if CHECKED:
            score = tl.where(visible_tile(MASK, rows, columns, n, m, shift, CAUSAL, MASKED), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        base = tl.maximum(new_top, FLOOR)
        keep, weight = tl.exp2(top - base), tl.exp2(score * scale - base[:, None])
        total = keep * total + tl.sum(weight, 1)
        values = plus(times(values, keep[:, None]), weight, v_tile)
        return new_top, total, values

    @tuned
    def forward_kernel(Q, K, V, MASK, OUT, LSE, qs, ks, vs, os, n, m, shift, scale, HQ, GROUPS, SIZE, W: tl.constexpr,
                       CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        head, b = whose(HQ)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        Q, OUT, LSE = place(Q, qs, b, head), place(OUT, os, b, head), LSE + (b * HQ + head) * n
        K, V = place(K, ks, b, head // GROUPS), place(V, vs, b, head // GROUPS)
        q_tile = load(Q, rows, qs, n, W)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = zeros(q_tile)
        end, free = m, m // COLUMNS * COLUMNS  # keys up to `free` are seen by all, those from `end` on by none
        if CAUSAL:
            end = tl.minimum(m, tl.maximum((tl.program_id(0) + 1) * ROWS + shift, 0))
            free = tl.minimum(free, tl.maximum(tl.program_id(0) * ROWS + shift + 1, 0) // COLUMNS * COLUMNS)
        if MASKED:
            MASK += b * m
            free = 0
        for start in range(0, free, COLUMNS):
            top, total, values = look(q_tile, top, total, values, K, V, MASK, ks, vs, rows, start + tl.arange(0, COLUMNS),
                                      n, m, shift, scale, W, CAUSAL, MASKED, CHECKED=False)
        for start in range(free, end, COLUMNS):
            top, total, values = look(q_tile, top, total, values, K, V, MASK, ks, vs, rows, start + tl.arange(0, COLUMNS),
                                      n, m, shift, scale, W, CAUSAL, MASKED, CHECKED=True)
        store(OUT, times(values, 1 / tl.where(total > 0, total, 1.0)[:, None]), rows, os, n, W)
        tl.store(LSE + rows, top + tl.log2(total), rows < n)

    # ------------------------------ backward

    @triton.jit
    def gradients(q_tile, k_tile, v_tile, grad_tile, base, delta, MASK, rows, columns, n, m, shift, scale,
                  CAUSAL: tl.constexpr, MASKED: tl.constexpr):
        """p and ds of one tile, rows × columns."""
        seen = visible_tile(MASK, rows, columns, n, m, shift, CAUSAL, MASKED)
        p = tl.where(seen, tl.exp2(across(q_tile, k_tile) * scale - base[:, None]), 0.0)
        dp = across(grad_tile, v_tile)
        return p, p * (dp - delta[:, None])

    @tuned
    def rows_kernel(Q, K, V, MASK, OUT, GRAD, LSE, DELTA, DQ, qs, ks, vs, os, gs, dqs, n, m, shift, scale, HQ, GROUPS,
                    SIZE, W: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
        """delta and dQ of one tile of queries: all keys that it sees pass by."""
        head, b = whose(HQ)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        Q, OUT, GRAD, DQ = place(Q, qs, b, head), place(OUT, os, b, head), place(GRAD, gs, b, head), place(DQ, dqs, b, head)
        K, V = place(K, ks, b, head // GROUPS), place(V, vs, b, head // GROUPS)
        LSE, DELTA = LSE + (b * HQ + head) * n, DELTA + (b * HQ + head) * n
        q_tile, grad_tile = load(Q, rows, qs, n, W), load(GRAD, rows, gs, n, W)
        out_tile = load(OUT, rows, os, n, W)
        delta = tl.sum(grad_tile[0].to(tl.float32) * out_tile[0].to(tl.float32), 1)
        if W[2]:
            delta += tl.sum(grad_tile[1].to(tl.float32) * out_tile[1].to(tl.float32), 1)
        tl.store(DELTA + rows, delta, rows < n)
        base = tl.maximum(tl.load(LSE + rows, rows < n, 0.0), FLOOR)
        dq = zeros(q_tile)
        end = m
        if CAUSAL:
            end = tl.minimum(m, tl.maximum((tl.program_id(0) + 1) * ROWS + shift, 0))
        if MASKED:
            MASK += b * m
        for start in range(0, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k_tile, v_tile = load(K, columns, ks, m, W), load(V, columns, vs, m, W)
            p, ds = gradients(q_tile, k_tile, v_tile, grad_tile, base, delta, MASK, rows, columns, n, m, shift, scale,
                              CAUSAL, MASKED)
            dq = plus(dq, ds, k_tile)
        store(DQ, times(dq, scale * LN2), rows, dqs, n, W)

    @tuned
    def columns_kernel(Q, K, V, MASK, GRAD, LSE, DELTA, DK, DV, qs, ks, vs, gs, dks, dvs, n, m, shift, scale, HK, GROUPS,
                       SIZE, W: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
                       COLUMNS: tl.constexpr):
        """dK and dV of one tile of keys: all queries that see it pass by, of each head that shares it."""
        head, b = whose(HK)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        K, V, DK, DV = place(K, ks, b, head), place(V, vs, b, head), place(DK, dks, b, head), place(DV, dvs, b, head)
        k_tile, v_tile = load(K, columns, ks, m, W), load(V, columns, vs, m, W)
        dk, dv = zeros(k_tile), zeros(v_tile)
        begin = 0
        if CAUSAL:  # the first query that sees the first of these keys
            begin = tl.maximum(tl.program_id(0) * COLUMNS - shift, 0) // ROWS * ROWS
        if MASKED:
            MASK += b * m
        for group in range(0, GROUPS):
            h = head * GROUPS + group
            at = (b * HK * GROUPS + h) * n
            for start in range(begin, n, ROWS):
                rows = start + tl.arange(0, ROWS)
                q_tile = load(place(Q, qs, b, h), rows, qs, n, W)
                grad_tile = load(place(GRAD, gs, b, h), rows, gs, n, W)
                base = tl.maximum(tl.load(LSE + at + rows, rows < n, 0.0), FLOOR)
                delta = tl.load(DELTA + at + rows, rows < n, 0.0)
                p, ds = gradients(q_tile, k_tile, v_tile, grad_tile, base, delta, MASK, rows, columns, n, m, shift, scale,
                                  CAUSAL, MASKED)
                dk = plus(dk, tl.trans(ds), q_tile)
                dv = plus(dv, tl.trans(p), grad_tile)
        store(DK, times(dk, scale * LN2), columns, dks, m, W)
        store(DV, dv, columns, dvs, m, W)


# ------------------------------ as operators that torch.compile and autograd know


@torch.library.custom_op("spar::attention", mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v, key_mask = side_by_side(q, k, v, key_mask)
    (b, hq, n, e), m = q.shape, k.shape[2]
    out, lse = torch.empty_like(q), q.new_empty(b, hq, n, dtype=torch.float32)
    forward_kernel[lambda chosen: (triton.cdiv(n, chosen["ROWS"]), b * hq)](
        q, k, v, key_mask, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), n, m, m - n, LOG2E / math.sqrt(e),
        HQ=hq, **settings(q, k, key_mask, causal))
    return out, lse


@fused.register_fake
def _(q, k, v, key_mask, causal):
    return torch.empty_like(side_by_side(q)[0]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("spar::attention_backward", mutates_args=())
def fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor,
                   causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, key_mask = side_by_side(grad, q, k, v, key_mask)
    (b, hq, n, e), (hk, m) = q.shape, k.shape[1:3]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    at, sizes = [x.stride() for x in (q, k, v, out, grad, dq, dk, dv)], (n, m, m - n, LOG2E / math.sqrt(e))
    same = settings(q, k, key_mask, causal)
    rows_kernel[lambda chosen: (triton.cdiv(n, chosen["ROWS"]), b * hq)](
        q, k, v, key_mask, out, grad, lse, delta, dq, *at[:6], *sizes, HQ=hq, **same)
    columns_kernel[lambda chosen: (triton.cdiv(m, chosen["COLUMNS"]), b * hk)](
        q, k, v, key_mask, grad, lse, delta, dk, dv, *at[:3], at[4], *at[6:], *sizes, HK=hk, **same)
    return dq, dk, dv


@fused_backward.register_fake
def _(grad, q, k, v, key_mask, out, lse, causal):
    return tuple(torch.empty_like(x) for x in side_by_side(q, k, v))


def keep(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, grad, _):
    return *fused_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


fused.register_autograd(backward, setup_context=keep)


def side_by_side(*tensors: Tensor | None) -> list[Tensor | None]:
    """As they come from the projection; only a tensor whose last dimension does not lie side by side is copied."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def settings(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool) -> dict:
    e, longest = q.shape[-1], max(q.shape[2], k.shape[2])
    e1 = max(16, triton.next_power_of_2(e))
    e1, e2 = (e1 // 2, max(16, triton.next_power_of_2(e - e1 // 2))) if 32 < e < 0.75 * e1 else (e1, 0)  # 72 = 64 + 8
    return dict(GROUPS=q.shape[1] // k.shape[1], SIZE=triton.next_power_of_2(longest), W=(e, e1, e2), CAUSAL=causal,
                MASKED=key_mask is not None)


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
