"""Linear attention: ReLU(q) (ReLU(k)ᵀ v), rows normalised, in time linear in n (SANA, Sec. 2.2; DC-AE).

    S = Σ_j k_j v_jᵀ      t = Σ_j k_j      out_i = q_i S / (q_i · t)          q and k after their ReLU

No token meets another one: all keys and values go into one matrix `e e` for each head, and each query is multiplied by
it. With heads of 32 channels that is little arithmetic for what is read: about 4·32 products for each number that comes
from memory, where a GPU could do several hundred. So what counts is to touch q, k and v once. `plain` is the formula;
its sums, ReLUs and casts each pass over memory. The Triton kernels are the same with all between kept on the chip; the
default on CUDA, once a small input has shown that they agree with `plain`.

    python -m parts.linear_attention       shape trace, and both side by side

Letters: b batch, a heads, n tokens, e width of a head.
"""

from operator import index

import torch
from torch import Tensor

from parts.attention_triton import fused_by_default, triton, why_not_triton
from parts.backend import agrees, constant_while_compiling, default_backend, small_inputs

if triton is not None:
    import triton.language as tl

    from parts.attention_triton import product, whose

WIDTHS = (16, 32, 64, 128)  # of a head, that the kernels know
EPS = 1e-15  # under the sum, for a query without any positive channel: it gives zeros


def linear_attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """`b a n e` three times -> `b a n e`, float32 inside.

    backend: "plain" | "triton", or "auto", which follows `parts.backend.use_backend`: the fused kernels where it was
    triton and they can run, or auto on CUDA and they agree with the plain formula; else that formula.
    Raises ValueError for a backend that it does not know or that cannot run here.
    """
    if backend not in ("auto", "plain", "triton"):
        raise ValueError(f"unknown backend {backend!r} of linear attention: auto, plain or triton")
    reason = why_not_triton(q) or ("" if q.shape[-1] in WIDTHS else f"heads are {q.shape[-1]} wide, it takes {WIDTHS}")
    if backend == "triton" and reason:
        raise ValueError(f"linear attention's backend triton cannot run here: {reason}; use --attention auto")
    if backend == "auto":
        backend = default_backend()
        if backend == "auto" and fused_by_default(q) and not reason:
            kind = (q.device, q.dtype, index(q.shape[-1]))  # while torch.compile traces, a size may be a symbol
            backend = "triton" if trusted(*kind) else "plain"
    return fused_linear(q, k, v) if backend == "triton" and not reason else plain(q, k, v)


@constant_while_compiling
def trusted(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the fused kernels give on `device` what `plain` gives, on a small input; found out at the first call."""
    kind = ("linear attention,", str(dtype).removeprefix("torch."), f"heads of {width}")
    return agrees(kind, device, fused_linear, plain, lambda: small_inputs(dtype, (2,) * 3, (150,) * 3, width))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):  # the sums over n are too large for half precision
        q, k, v = q.float().relu(), k.float().relu(), v.float()
        values, total = k.mT @ v, k.sum(2)  # S, t
        return q @ values / ((q * total[:, :, None]).sum(-1, keepdim=True) + EPS)


# ------------------------------------------------------------ the same, fused: a program for each head of each sample

if triton is not None:
    TINY = tl.constexpr(EPS)

    @triton.jit
    def read(X, rows, strides, n, E: tl.constexpr):
        """Rows of X `n e`, zeros outside. Its channels may lie apart, as a convolution leaves them."""
        at = X + rows[:, None] * strides[2] + tl.arange(0, E)[None, :] * strides[3]
        return tl.load(at, rows[:, None] < n, 0.0).to(tl.float32)

    @triton.jit
    def write(X, tile, rows, strides, n, E: tl.constexpr):
        at = X + rows[:, None] * strides[2] + tl.arange(0, E)[None, :] * strides[3]
        tl.store(at, tile.to(X.dtype.element_ty), rows[:, None] < n)

    @triton.jit
    def start_of(X, strides, HEADS):
        """Where this program's head of its sample begins in X `b a n e`."""
        head, b = whose(HEADS)
        return X + b * strides[0] + head * strides[1]

    @triton.jit
    def sums(K, V, ks, vs, n, E: tl.constexpr, ROWS: tl.constexpr):
        """S and t."""
        values, total = tl.zeros([E, E], tl.float32), tl.zeros([E], tl.float32)
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            k = tl.maximum(read(K, rows, ks, n, E), 0.0)
            values += product(tl.trans(k), read(V, rows, vs, n, E))
            total += tl.sum(k, 0)
        return values, total

    @triton.jit
    def linear_forward(Q, K, V, OUT, qs, ks, vs, os, n, HEADS, E: tl.constexpr, ROWS: tl.constexpr):
        Q, K, V, OUT = start_of(Q, qs, HEADS), start_of(K, ks, HEADS), start_of(V, vs, HEADS), start_of(OUT, os, HEADS)
        values, total = sums(K, V, ks, vs, n, E, ROWS)
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = tl.maximum(read(Q, rows, qs, n, E), 0.0)
            divisor = tl.sum(q * total[None, :], 1) + TINY
            write(OUT, product(q, values) / divisor[:, None], rows, os, n, E)

    @triton.jit
    def linear_backward(Q, K, V, GRAD, DQ, DK, DV, qs, ks, vs, gs, dqs, dks, dvs, n, HEADS, E: tl.constexpr,
                        ROWS: tl.constexpr):
        """With d_i = q_i · t, a_i = grad_i / d_i and r_i = − a_i · out_i:

            dq_i = S a_i + t r_i     dS = Σ_i q_i a_iᵀ     dt = Σ_i q_i r_i     dk_j = dS v_j + dt     dv_j = dSᵀ k_j
        """
        Q, K, V = start_of(Q, qs, HEADS), start_of(K, ks, HEADS), start_of(V, vs, HEADS)
        GRAD = start_of(GRAD, gs, HEADS)
        DQ, DK, DV = start_of(DQ, dqs, HEADS), start_of(DK, dks, HEADS), start_of(DV, dvs, HEADS)
        values, total = sums(K, V, ks, vs, n, E, ROWS)
        d_values, d_total = tl.zeros([E, E], tl.float32), tl.zeros([E], tl.float32)
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = tl.maximum(read(Q, rows, qs, n, E), 0.0)
            divisor = (tl.sum(q * total[None, :], 1) + TINY)[:, None]
            out, a = product(q, values) / divisor, read(GRAD, rows, gs, n, E) / divisor
            r = -tl.sum(a * out, 1)[:, None]
            d_values += product(tl.trans(q), a)
            d_total += tl.sum(q * r, 0)
            write(DQ, tl.where(q > 0, product(a, tl.trans(values)) + total[None, :] * r, 0.0), rows, dqs, n, E)
        for start in range(0, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            k, v = tl.maximum(read(K, rows, ks, n, E), 0.0), read(V, rows, vs, n, E)
            write(DK, tl.where(k > 0, product(v, tl.trans(d_values)) + d_total[None, :], 0.0), rows, dks, n, E)
            write(DV, product(k, d_values), rows, dvs, n, E)


@torch.library.custom_op("spar::linear_attention", mutates_args=())
def fused_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, a, n, e = q.shape
    out = torch.empty_like(q, dtype=torch.float32)
    linear_forward[(1, b * a)](q, k, v, out, *[x.stride() for x in (q, k, v, out)], n, HEADS=a, E=e, ROWS=64)
    return out


@fused_linear.register_fake
def _(q, k, v):
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("spar::linear_attention_backward", mutates_args=())
def fused_linear_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, a, n, e = q.shape
    parts = q, k, v, grad, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    linear_backward[(1, b * a)](*parts, *[x.stride() for x in parts], n, HEADS=a, E=e, ROWS=64)
    return parts[4:]


@fused_linear_backward.register_fake
def _(grad, q, k, v):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


fused_linear.register_autograd(lambda ctx, grad: fused_linear_backward(grad, *ctx.saved_tensors),
                               setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 100, 32, device="cuda" if torch.cuda.is_available() else "cpu")
    print("q, k, v  b a n e", tuple(q.shape))
    for name in ("plain",) if why_not_triton(q) else ("plain", "triton"):
        out = linear_attention(q, k, v, backend=name)
        difference = (out - plain(q, k, v)).abs().max()
        print(f"{name:8} b a n e", tuple(out.shape), f"largest difference from plain {difference:.1e}")
        assert out.shape == q.shape and torch.allclose(out, plain(q, k, v), atol=1e-5)
