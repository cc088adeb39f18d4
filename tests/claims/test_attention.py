import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention import TILE, attention
from parts.linear_attention import linear_attention

# n queries, m keys, hq, hk, causal, which keys are hidden
CASES = [(128, 128, 2, 2, False, "none"), (70, 70, 2, 2, True, "none"), (100, 150, 2, 2, False, "random"),
         (100, 150, 4, 2, True, "none"), (150, 100, 2, 1, True, "none"), (1, 130, 4, 1, True, "right"),
         (65, 63, 3, 3, False, "one row"), (63, 200, 4, 2, True, "left"), (130, 131, 6, 2, False, "one row"),
         (70, 70, 2, 1, True, "left"), (90, 20, 2, 2, True, "random"), (3, 5, 2, 2, True, "one row")]


def some(n, m, hq, hk, hidden="none", dtype=torch.float64, size=1.0):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *shape, 8, dtype=dtype).mul(size).requires_grad_()
               for shape in ((hq, n), (hk, m), (hk, m)))
    place, first = torch.arange(m), torch.tensor([[True], [False]])
    key_masks = {"none": None, "random": torch.rand(2, m) < 0.7, "right": first | (place < m // 2),
                 "left": first | (place >= m // 2), "one row": first.expand(2, m)}
    return q, k, v, key_masks[hidden]


def seen_by(n, m, causal, key_mask):
    seen = torch.ones(1, 1, n, m, dtype=torch.bool)
    if causal:
        seen = seen & (torch.arange(m)[None, :] <= torch.arange(n)[:, None] + m - n)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def naive(q, k, v, causal, key_mask):
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = seen_by(q.shape[2], k.shape[2], causal, key_mask)
    score = torch.einsum("bhne,bhme->bhnm", q, k) / q.shape[-1] ** 0.5
    # the product with `seen` is for rows that see nothing: their softmax is uniform, and must count for nothing
    return torch.einsum("bhnm,bhme->bhne", score.masked_fill(~seen, -1e9).softmax(-1) * seen, v)


def values_and_gradients(out, inputs):
    torch.manual_seed(1)
    towards = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, towards)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_each_backend_equals_naive_attention_forward_and_backward(backend, case, dtype, tolerance):
    n, m, hq, hk, causal, hidden = case
    q, k, v, key_mask = some(n, m, hq, hk, hidden, dtype)
    ours = values_and_gradients(attention(q, k, v, causal=causal, key_mask=key_mask, backend=backend), (q, k, v))
    theirs = values_and_gradients(naive(q, k, v, causal, key_mask), (q, k, v))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs):
        assert a.dtype == dtype
        assert torch.allclose(a.double(), b.double(), atol=tolerance, rtol=tolerance), name


def test_tiled_survives_scores_of_ten_thousand():
    q, k, v, _ = some(70, 90, 2, 2, size=100.0)
    assert (q @ k.mT).max() > 1e4
    ours = values_and_gradients(attention(q, k, v, backend="tiled"), (q, k, v))
    for a, b in zip(ours, values_and_gradients(naive(q, k, v, False, None), (q, k, v))):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_a_query_that_sees_nothing_gives_zeros_and_gets_and_sends_no_gradient(backend):
    n, m = 150, 100
    q, k, v, key_mask = some(n, m, 4, 2, "one row")
    blind = ~seen_by(n, m, True, key_mask).any(-1, keepdim=True).expand(2, 4, n, 8)
    assert blind[0, 0, :, 0].sum() == n - m and blind[1].all()
    out = attention(q, k, v, causal=True, key_mask=key_mask, backend=backend)
    assert (out[blind] == 0).all() and (out[~blind] != 0).all()
    for gradient in torch.autograd.grad(out[blind].sum(), (q, k, v), retain_graph=True):
        assert (gradient == 0).all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (dq[blind] == 0).all() and (dk[1] == 0).all() and (dv[1] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_tiled_makes_no_tensor_of_n_times_m_forward_or_backward(causal):
    n = m = 8 * TILE
    q, k, v, key_mask = some(n, m, 2, 2, "random")
    bound = max(2 * 2 * TILE * TILE, q.numel())  # one tile of scores for each head, or as much as the queries
    with Largest() as largest:
        attention(q, k, v, causal=causal, key_mask=key_mask, backend="tiled").sum().backward()
    assert 0 < largest.numel <= bound < n * m
    with Largest() as largest:
        naive(q, k, v, causal, key_mask)
    assert largest.numel >= n * m  # the recorder does see such a tensor


def test_tiled_keeps_for_backward_no_more_than_its_inputs_and_outputs():
    q, k, v, _ = some(8 * TILE, 8 * TILE, 2, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attention(q, k, v, backend="tiled")
    assert kept and max(kept) <= q.numel()


def test_auto_on_cpu_is_sdpa():
    q, k, v, key_mask = some(70, 90, 4, 2, "random", torch.float32)
    auto, sdpa = (attention(q, k, v, causal=True, key_mask=key_mask, backend=name) for name in ("auto", "sdpa"))
    assert torch.equal(auto, sdpa) and torch.equal(auto, attention(q, k, v, causal=True, key_mask=key_mask))


@pytest.mark.parametrize("k_shape, v_shape, mask", [
    ((2, 3, 5, 8), (2, 3, 5, 8), None), ((2, 2, 5, 8), (2, 2, 6, 8), None), ((2, 2, 5, 4), (2, 2, 5, 4), None),
    ((1, 2, 5, 8), (1, 2, 5, 8), None), ((2, 2, 5, 8), (2, 2, 5, 8), torch.ones(2, 4, dtype=torch.bool)),
    ((2, 2, 5, 8), (2, 2, 5, 8), torch.ones(2, 5))])
def test_shapes_that_do_not_fit_raise_value_error(k_shape, v_shape, mask):
    with pytest.raises(ValueError):
        attention(torch.randn(2, 4, 3, 8), torch.randn(k_shape), torch.randn(v_shape), key_mask=mask)


def test_an_unknown_backend_raises_value_error_naming_it():
    q, k, v, _ = some(3, 3, 1, 1)
    with pytest.raises(ValueError, match="'flash'"):
        attention(q, k, v, backend="flash")


def test_linear_attention_equals_its_quadratic_formula():
    q, k, v, _ = some(70, 70, 3, 3, dtype=torch.float32)
    weight = q.double().relu() @ k.double().relu().mT
    quadratic = weight / weight.sum(-1, keepdim=True) @ v.double()
    torch.testing.assert_close(linear_attention(q, k, v).double(), quadratic, atol=1e-5, rtol=1e-5)


def test_linear_attention_of_a_query_without_positive_entries_is_zero():
    q, k, v, _ = some(5, 5, 1, 1)
    assert (linear_attention(-q.abs(), k, v) == 0).all()
