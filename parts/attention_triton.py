"""The algorithm of `attention.Tiled` as fused Triton kernels, forward and backward. Read attention.py first.

Names and order are those of `Tiled`: q_tile, top, total, values, lse; p, dp, ds, delta. What differs:

  - The outer loop is the grid: a program for each tile of rows (queries) or of columns (keys) of a head of a sample.
  - Forward runs its inner loop twice: over the tiles of keys that every row sees in full, unchecked, then the others.
  - Backward is two kernels, `rows_kernel` for dQ (and delta), `columns_kernel` for dK and dV: each program owns what it
    writes, so nothing is added up in an order left to chance, and the same input gives the same bits.
  - The sides of a tile must be powers of two, so heads of 72 channels would be held, and multiplied, as 128. They are
    held as 64 + 16 instead: a tile is a *tuple* of one part or of two. W says which: (channels of a head, channels of
    the first part, channels of the second or 0); (64, 64, 0) is one part, (72, 64, 16) two, of which the last 8 are
    zeros. `load`, `store`, `zeros`, `times`, `across` and `plus` know of parts; the kernels below them call these.
  - The products of half-precision tiles take half-precision weights, as the chip's units for them want it.

`fused` is the door: an operator that autograd and torch.compile know. Capital letters are pointers into memory, small
ones values on the chip; qs, ks, … are the strides of Q, K, …

Letters: b batch, a heads of keys, g heads of queries that share one of them, n queries, m keys, e width of a head.
"""

import math
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPU alone comes without it
    triton = None

LOG2E = math.log2(math.e)  # exp(x) = 2^(x · log2 e); the chip has a unit for 2^x, and the factor goes into the scale
LOWEST = -3e38  # stands for −∞ where −∞ − −∞ would be no number
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs the kernels on CPU, slowly, for the tests


def no_triton_here() -> str:
    """The reason why this machine cannot run the fused kernels; empty where it can."""
    if triton is None:
        return "Triton is not installed (torch for CUDA brings it)"
    return "" if torch.cuda.is_available() or INTERPRETED else "torch finds no CUDA device"


def why_not_triton(q: Tensor) -> str:
    """The reason why the fused kernels cannot take q; empty where they can."""
    if triton is None:
        return no_triton_here()
    if not q.is_cuda and not INTERPRETED:
        return f"q is on {q.device.type}, the kernels need CUDA (or, to try them out, TRITON_INTERPRET=1)"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, the kernels take float32, bfloat16 and float16"
    return f"heads are {q.shape[-1]} wide, the kernels take up to 256" if q.shape[-1] > 256 else ""


def fused_by_default(q: Tensor) -> bool:
    """Only on CUDA: the interpreter, which runs them elsewhere, is there for tests."""
    return q.is_cuda and not why_not_triton(q)


# ---------------------------------------------------------------- kernels

if triton is not None:
    WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's own product takes bfloat16 for integers
    FLOOR, LN2 = tl.constexpr(LOWEST), tl.constexpr(math.log(2))
    BLOCKS = [(128, 128, 8, 2), (128, 64, 4, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 32, 4, 2)]
    if INTERPRETED:
        BLOCKS = [(64, 32, 1, 1)]

    def autotune(kernel):
        """Times each of BLOCKS at the first call for a width and a length (to a power of two), keeps the best."""
        configs = [triton.Config({"ROWS": r, "COLUMNS": c}, num_warps=w, num_stages=s) for r, c, w, s in BLOCKS]
        return triton.autotune(configs, key=["SIZE", "W", "CAUSAL"])(triton.jit(kernel, do_not_specialize=["SIZE"]))

    # ------------------------------ tiles

    @triton.jit
    def load(X, places, strides, limit, W: tl.constexpr):
        """Rows `places` of X `n e`, zeros outside: one part (n × W[1],), or two."""
        # `second` is made in any case, of some power of two, and dropped where W[2] is 0
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
        """Float32 tiles as three TF32 products each, nearly as exact as float32; half-precision ones as they are."""
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
        """Which row sees which column, rows × columns; none of those outside."""
        mask = (rows[:, None] < n) & (columns[None, :] < m)
        if CAUSAL:
            mask = mask & (columns[None, :] <= rows[:, None] + shift)
        if MASKED:
            mask = mask & (tl.load(MASK + columns, mask=columns < m, other=0) != 0)[None, :]
        return mask

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
        shrink, weight = tl.exp2(top - base), tl.exp2(score * scale - base[:, None])
        total = shrink * total + tl.sum(weight, 1)
        values = plus(times(values, shrink[:, None]), weight, v_tile)
        return new_top, total, values

    @autotune
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
            free = 0  # a mask may hide any key: no tile goes unchecked
        for start in range(0, free, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            top, total, values = look(q_tile, top, total, values, K, V, MASK, ks, vs, rows, columns, n, m, shift, scale,
                                      W, CAUSAL, MASKED, CHECKED=False)
        for start in range(free, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            top, total, values = look(q_tile, top, total, values, K, V, MASK, ks, vs, rows, columns, n, m, shift, scale,
                                      W, CAUSAL, MASKED, CHECKED=True)
        store(OUT, times(values, 1 / tl.where(total > 0, total, 1.0)[:, None]), rows, os, n, W)
        tl.store(LSE + rows, top + tl.log2(total), rows < n)

    # ------------------------------ backward

    @triton.jit
    def gradients(q_tile, k_tile, v_tile, grad_tile, base, delta, MASK, rows, columns, n, m, shift, scale,
                  CAUSAL: tl.constexpr, MASKED: tl.constexpr):
        """p and ds of one tile, rows × columns."""
        mask = visible_tile(MASK, rows, columns, n, m, shift, CAUSAL, MASKED)
        p = tl.where(mask, tl.exp2(across(q_tile, k_tile) * scale - base[:, None]), 0.0)
        dp = across(grad_tile, v_tile)
        return p, p * (dp - delta[:, None])

    @autotune
    def rows_kernel(Q, K, V, MASK, OUT, GRAD, LSE, DELTA, DQ, qs, ks, vs, os, gs, dqs, n, m, shift, scale, HQ, GROUPS,
                    SIZE, W: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
        """delta and dQ of one tile of queries: all keys that it sees pass by."""
        head, b = whose(HQ)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        Q, DQ = place(Q, qs, b, head), place(DQ, dqs, b, head)
        OUT, GRAD = place(OUT, os, b, head), place(GRAD, gs, b, head)
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

    @autotune
    def columns_kernel(Q, K, V, MASK, GRAD, LSE, DELTA, DK, DV, qs, ks, vs, gs, dks, dvs, n, m, shift, scale, HK,
                       GROUPS, SIZE, W: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
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
                p, ds = gradients(q_tile, k_tile, v_tile, grad_tile, base, delta, MASK, rows, columns, n, m, shift,
                                  scale, CAUSAL, MASKED)
                dk = plus(dk, tl.trans(ds), q_tile)
                dv = plus(dv, tl.trans(p), grad_tile)
        store(DK, times(dk, scale * LN2), columns, dks, m, W)
        store(DV, dv, columns, dvs, m, W)


# ------------------------------ as operators that torch.compile and autograd know


@torch.library.custom_op("spar::attention", mutates_args=())
def fused(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """As `attention.attention`, which checks its input -> (out `b (a g) n e`, lse `b (a g) n`: log2 of the sums)."""
    (q, k, v), key_mask = side_by_side(q, k, v), in_rows(key_mask)
    (b, hq, n, e), m = q.shape, k.shape[2]
    out, lse = torch.empty_like(q), q.new_empty(b, hq, n, dtype=torch.float32)
    forward_kernel[lambda block: (triton.cdiv(n, block["ROWS"]), b * hq)](
        q, k, v, key_mask, out, lse, q.stride(), k.stride(), v.stride(), out.stride(), n, m, m - n,
        LOG2E / math.sqrt(e), HQ=hq, **settings(q, k, key_mask, causal))
    return out, lse


@fused.register_fake
def _(q, k, v, key_mask, causal):
    return torch.empty_like(side_by_side(q)[0]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("spar::attention_backward", mutates_args=())
def fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor,
                   causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    (grad, q, k, v), key_mask = side_by_side(grad, q, k, v), in_rows(key_mask)
    (b, hq, n, e), (hk, m) = q.shape, k.shape[1:3]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    at, sizes = [x.stride() for x in (q, k, v, out, grad, dq, dk, dv)], (n, m, m - n, LOG2E / math.sqrt(e))
    same = settings(q, k, key_mask, causal)
    rows_kernel[lambda block: (triton.cdiv(n, block["ROWS"]), b * hq)](
        q, k, v, key_mask, out, grad, lse, delta, dq, *at[:6], *sizes, HQ=hq, **same)
    columns_kernel[lambda block: (triton.cdiv(m, block["COLUMNS"]), b * hk)](
        q, k, v, key_mask, grad, lse, delta, dk, dv, *at[:3], at[4], *at[6:], *sizes, HK=hk, **same)
    return dq, dk, dv


@fused_backward.register_fake
def _(grad, q, k, v, key_mask, out, lse, causal):
    return tuple(torch.empty_like(x) for x in side_by_side(q, k, v))


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, grad, _):
    return *fused_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


fused.register_autograd(backward, setup_context=save_for_backward)


def side_by_side(*tensors: Tensor) -> list[Tensor]:
    """As they come from the projection; only a tensor whose last dimension does not lie side by side is copied."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def in_rows(key_mask: Tensor | None) -> Tensor | None:
    """The kernels expect the mask of sample b at b · m: a slice, or one row for all samples, is copied."""
    return None if key_mask is None else key_mask.contiguous()


def settings(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool) -> dict:
    """What all kernels are compiled for. A width that would waste a quarter of a power of two is held in two parts."""
    e, longest = q.shape[-1], max(q.shape[2], k.shape[2])
    e1, e2 = max(16, triton.next_power_of_2(e)), 0
    if 32 < e < 0.75 * e1:
        e1, e2 = e1 // 2, max(16, triton.next_power_of_2(e - e1 // 2))  # 72: 64, and 8 in 16
    return dict(GROUPS=q.shape[1] // k.shape[1], SIZE=triton.next_power_of_2(longest), W=(e, e1, e2), CAUSAL=causal,
                MASKED=key_mask is not None)
