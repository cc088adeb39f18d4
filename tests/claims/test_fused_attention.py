"""The fused kernels against attention in float64: natively where there is a GPU, else through Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from attention import attention
from parts import attention_triton
from parts.attention_triton import side_by_side
from parts.linear_attention import fused_linear, linear_attention, plain
from tests.claims.test_attention import naive, values_and_gradients
from tests.tools.commands import ROOT

if attention_triton.triton is None:
    pytest.skip("the fused kernels need Triton: pip install triton", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# n queries, m keys, hq, hk, width, causal, which keys are hidden
CASES = [(33, 33, 2, 2, 32, False, "none"), (70, 70, 2, 1, 64, True, "none"), (1, 37, 4, 2, 64, True, "right"),
         (17, 65, 14, 2, 64, True, "none"), (65, 17, 2, 1, 32, True, "random"), (20, 35, 1, 1, 72, False, "one row"),
         (70, 40, 2, 2, 56, False, "random"), (18, 18, 1, 1, 112, True, "none"), (17, 33, 1, 1, 128, False, "none"),
         (128, 128, 1, 1, 32, False, "none"), (3, 5, 2, 2, 16, True, "left"), (1, 1, 1, 1, 32, True, "none"),
         (100, 80, 1, 1, 72, True, "left"), (65, 130, 3, 1, 20, True, "one row")]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the largest value
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow):RuntimeWarning")  # numpy's, on −∞


def some(n, m, hq, hk, e, hidden="none", dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *shape, e).to(DEVICE, dtype).requires_grad_() for shape in ((hq, n), (hk, m), (hk, m)))
    place, first = torch.arange(m), torch.tensor([[True], [False]])
    masks = {"none": None, "random": torch.rand(2, m) < 0.7, "right": first | (place < m // 2),
             "left": first | (place >= m // 2), "one row": first.expand(2, m)}
    return q, k, v, None if masks[hidden] is None else masks[hidden].to(DEVICE)


def assert_right(q, k, v, causal, key_mask, dtype):
    ours = values_and_gradients(attention(q, k, v, causal=causal, key_mask=key_mask, backend="triton").cpu(), (q, k, v))
    doubles = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    theirs = values_and_gradients(naive(*doubles, causal, None if key_mask is None else key_mask.cpu()), doubles)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.cpu() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max().clamp(min=0.1), name


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_equal_attention_in_float64_forward_and_backward(case, dtype):
    *shape, causal, hidden = case
    q, k, v, key_mask = some(*shape, hidden, dtype)
    assert_right(q, k, v, causal, key_mask, dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_a_picture_of_1025_tokens(causal):
    q, k, v = (x.detach()[:1].requires_grad_() for x in some(1025, 1025, 1, 1, 64)[:3])
    assert_right(q, k, v, causal, None, torch.float32)


def test_queries_that_see_nothing_give_zeros_and_send_no_gradient():
    q, k, v, key_mask = some(70, 40, 4, 2, 32, "one row")
    out = attention(q, k, v, causal=True, key_mask=key_mask, backend="triton")
    blind = torch.ones(2, 4, 70, dtype=torch.bool, device=DEVICE)
    blind[0, :, 30:] = False  # query i sees keys up to i − 30
    assert (out[blind] == 0).all() and (out[~blind] != 0).all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (dq[blind] == 0).all() and (dk[1] == 0).all() and (dv[1] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_slices_of_one_projection_are_read_where_they_lie():
    projection = torch.randn(2, 40, 3, 2, 32, device=DEVICE)
    q, k, v = (x.transpose(1, 2) for x in projection.unbind(2))  # b h n e, none of them contiguous
    assert all(a is b for a, b in zip(side_by_side(q, k, v), (q, k, v)))
    out = attention(q, k, v, backend="triton")
    assert torch.equal(out, attention(*(x.contiguous() for x in (q, k, v)), backend="triton"))
    assert out.transpose(1, 2).is_contiguous()  # so that "b h n e -> b n (h e)" copies nothing either


def test_the_same_input_gives_the_same_bits():
    q, k, v, key_mask = some(70, 90, 4, 2, 32, "random", torch.float16)
    outs = [attention(q, k, v, causal=True, key_mask=key_mask, backend="triton").cpu() for _ in range(2)]
    first, second = (values_and_gradients(out, (q, k, v)) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_the_operator_keeps_torchs_rules_for_operators():
    """Its promises to torch.compile about shapes, strides and autograd, checked by torch itself."""
    q, k, v, key_mask = some(20, 30, 4, 2, 32, "random")
    torch.library.opcheck(attention_triton.fused, (q, k, v, key_mask, True))


def test_torch_compile_keeps_the_graph_in_one_piece():
    q, k, v, _ = some(20, 20, 2, 2, 32)
    plain = lambda *x: attention(*x, causal=True, backend="triton").sin()
    assert torch.equal(torch.compile(plain, fullgraph=True, backend="aot_eager")(q, k, v), plain(q, k, v))


def test_a_width_of_72_is_held_in_80_channels_and_not_in_128():
    tensors = {e: torch.empty(1, 1, 1, e) for e in (32, 56, 64, 72, 112, 128)}
    widths = {e: sum(attention_triton.settings(x, x, None, False)["W"][1:]) for e, x in tensors.items()}
    assert widths == {32: 32, 56: 64, 64: 64, 72: 80, 112: 128, 128: 128}


@pytest.mark.parametrize("change, words",
                         [(dict(INTERPRETED=False), "q is on cpu"), (dict(triton=None), "not installed")])
def test_a_named_backend_that_cannot_run_says_why(change, words, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(attention_triton, name, value)
    q, k, v, _ = (x if x is None else x.cpu() for x in some(3, 3, 1, 1, 32))
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, backend="triton")
    attention(q, k, v)  # auto takes another


@pytest.mark.parametrize("change, words", [(dict(dtype=torch.float64), "float64"), (dict(e=300), "300 wide")])
def test_what_the_kernels_do_not_take_is_named(change, words):
    q, k, v, _ = some(3, 3, 1, 1, **{"e": 32, **change})
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, backend="triton")


# ---------------------------------------------------------------- linear attention


def some_of_a_grid(n, e, dtype=torch.float32, apart=False):
    """q, k, v `2 3 n e`; `apart`: their channels lie n numbers apart, as a convolution leaves them."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 2, 3, e, n).mT if apart else torch.randn(3, 2, 3, n, e)
    return [x.to(DEVICE, dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("n, e, apart",
                         [(1, 32, False), (17, 32, True), (64, 16, False), (256, 32, True), (150, 64, False)])
def test_fused_linear_attention_equals_its_plain_twin_in_float64(n, e, apart, dtype):
    inputs = some_of_a_grid(n, e, dtype, apart)
    out = linear_attention(*inputs, backend="triton")
    assert out.dtype == torch.float32 and out.stride() == torch.empty_like(inputs[0]).stride()
    ours = values_and_gradients(out.cpu(), inputs)
    doubles = [x.detach().cpu().double().requires_grad_() for x in inputs]
    q, k, v = doubles[0].relu(), doubles[1].relu(), doubles[2]
    theirs = values_and_gradients(q @ (k.mT @ v) / ((q @ k.mT).sum(-1, keepdim=True) + 1e-15), doubles)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs):
        assert (a.cpu() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max().clamp(min=0.1), name


def test_a_query_without_positive_channels_gives_zeros_there_too():
    q, k, v = (x.detach() for x in some_of_a_grid(20, 32))
    assert (linear_attention(-q.abs(), k, v, backend="triton") == 0).all()


def test_fused_linear_attention_keeps_torchs_rules_and_gives_the_same_bits():
    inputs = some_of_a_grid(70, 32, torch.float16)
    torch.library.opcheck(fused_linear, tuple(inputs))
    first, second = (values_and_gradients(linear_attention(*inputs, backend="triton").cpu(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend, e, words", [("flash", 32, "'flash'"), ("triton", 24, "24 wide")])
def test_linear_attention_names_what_it_cannot_do(backend, e, words):
    with pytest.raises(ValueError, match=words):
        linear_attention(*some_of_a_grid(5, e), backend=backend)
    assert torch.equal(linear_attention(*some_of_a_grid(5, e)), plain(*some_of_a_grid(5, e))) or DEVICE == "cuda"


def test_every_kernel_compiles_for_an_h100_and_uses_its_tensor_cores():
    command = [sys.executable, "-m", "tests.tools.compile_kernels", "90"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 14 and all("mma" in line for line in lines), done.stdout
