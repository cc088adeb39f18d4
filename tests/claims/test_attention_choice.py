"""Claims about which backend computes attention, and about masks that do not lie in memory as they look."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attention as softmax
from attention import attention, use_backend
from parts import attention_triton, backend, linear_attention as linear
from parts.linear_attention import linear_attention

needs_triton = pytest.mark.skipif(attention_triton.triton is None, reason="the fused kernels need Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow):RuntimeWarning")  # numpy's, on −∞


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice and no verdict is left over from another test, nor for another."""
    monkeypatch.setattr(backend, "verdicts", {})
    monkeypatch.setattr(softmax, "COMPARED", (40, 50))  # the interpreter is slow
    yield
    use_backend("auto")


def some(heads=2, n=20, width=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, width, generator=generator).to(DEVICE, dtype).requires_grad_() for _ in range(3)]


def with_gradients(out, inputs):
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


# ---------------------------------------------------------------- masks


def masks():
    bits = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
    return {"columns cut off": bits[:2, 5:25], "every second row": bits[::2, :20],
            "every second column": bits[:2, :40:2], "one row for all": bits[:1, :20].expand(2, -1),
            "turned": bits[:2, :20].T.contiguous().T}


@needs_triton
@pytest.mark.parametrize("name", list(masks()))
def test_the_kernels_read_a_mask_as_it_looks_however_it_lies(name):
    q, k, v = some()
    mask = masks()[name]
    assert mask.shape == (2, 20) and not mask.is_contiguous()
    ours = with_gradients(attention(q, k, v, key_mask=mask, backend="triton"), (q, k, v))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    theirs = with_gradients(attention(*doubles, key_mask=mask, backend="sdpa"), doubles)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("name", ["tiled", pytest.param("triton", marks=needs_triton), "sdpa"])
def test_the_choice_of_the_process_is_what_a_call_without_a_name_uses(name):
    q, k, v = some()
    use_backend(name)
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend=name))
    use_backend("auto")
    if DEVICE.type == "cpu":
        assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))


@pytest.mark.parametrize("name, function", [
    ("tiled", "plain"), pytest.param("triton", "fused_linear", marks=needs_triton), ("sdpa", "plain")])
def test_linear_attention_follows_the_same_choice(name, function, monkeypatch):
    q, k, v = some()
    calls = []
    for each in ("plain", "fused_linear"):
        monkeypatch.setattr(linear, each, lambda *x, each=each: calls.append(each))
    use_backend(name)
    linear_attention(q, k, v)
    assert calls == [function]


@needs_triton
def test_under_triton_linear_attention_computes_widths_that_its_kernels_lack_by_the_formula():
    use_backend("triton")
    q, k, v = some(width=24)
    assert torch.equal(linear_attention(q, k, v), linear.plain(q, k, v))


@pytest.mark.parametrize("change, reason", [(dict(triton=None), "not installed"), (dict(INTERPRETED=False), "no CUDA")])
def test_triton_is_refused_where_it_cannot_run_with_a_line_that_says_what_to_do(change, reason, monkeypatch):
    if "INTERPRETED" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in change.items():
        monkeypatch.setattr(attention_triton, name, value)
    with pytest.raises(ValueError, match=f"{reason}.*; use --attention auto") as error:
        use_backend("triton")
    assert "\n" not in str(error.value)
    attention(*some())  # the choice is what it was


def test_an_unknown_choice_is_refused_and_named():
    with pytest.raises(ValueError, match="'flash'"):
        use_backend("flash")


@needs_triton
def test_what_the_kernels_do_not_take_is_refused_under_the_choice_triton_too():
    use_backend("triton")
    with pytest.raises(ValueError, match="float64.*; use --attention auto"):
        attention(*some(dtype=torch.float64))


# ---------------------------------------------------------------- auto: trust after a comparison


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """auto means the kernels here too, through the interpreter."""
    for module in (softmax, linear):
        monkeypatch.setattr(module, "fused_by_default", lambda q: not attention_triton.why_not_triton(q))


def count_calls(monkeypatch, module, name, change=lambda out: out):
    """Lets `change` alter what the fused function gives; -> a list that grows with each call."""
    right, calls = getattr(module, name), []

    def watched(*inputs):
        calls.append(inputs[0].shape)
        return change(right(*inputs))

    monkeypatch.setattr(module, name, watched)
    return calls


def fail(out):
    raise RuntimeError("no such unit\nand many lines more")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked, causal, heads", [(False, False, 2), (True, True, 4)])
def test_right_kernels_are_compared_once_and_used(masked, causal, heads, dtype, as_on_a_gpu, monkeypatch, capsys):
    calls = count_calls(monkeypatch, softmax, "fused")
    (q, *_), (_, k, v) = some(heads, dtype=dtype), some(2, dtype=dtype)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE) if masked else None
    outs = [attention(q, k, v, key_mask=mask, causal=causal) for _ in range(2)]
    assert len(calls) == 3 and calls[0] != q.shape and calls[1] == calls[2] == q.shape  # a small input, then q
    fused = attention(q, k, v, key_mask=mask, causal=causal, backend="triton")
    assert torch.equal(*outs) and torch.equal(outs[0], fused)
    assert capsys.readouterr().out == ""


@needs_triton
@pytest.mark.parametrize("change, words", [
    (lambda out: (out[0] * 1.1, out[1]), "away from torch's"),
    (lambda out: (out[0] * torch.nan, out[1]), "away from torch's"),
    (lambda out: (2 * out[0] - out[0].detach(), out[1]), "away from torch's"),  # a wrong gradient alone
    (fail, "RuntimeError: no such unit")], ids=["numbers", "nan", "gradient", "error"])
def test_kernels_that_are_wrong_or_fail_are_named_once_and_left(change, words, as_on_a_gpu, monkeypatch, capsys):
    calls = count_calls(monkeypatch, softmax, "fused", change)
    q, k, v = some()
    for _ in range(2):
        assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))
    lines = capsys.readouterr().out.splitlines()
    assert len(calls) == 1 and len(lines) == 1 and words in lines[0] and "attention, float32 heads of 32" in lines[0]
    attention(q, k, v, causal=True)  # another kind is tried for itself
    assert len(calls) == 2 and "causal" in capsys.readouterr().out


@needs_triton
def test_linear_attention_compares_its_kernels_too(as_on_a_gpu, monkeypatch, capsys):
    q, k, v = some()
    assert torch.equal(linear_attention(q, k, v), linear_attention(q, k, v, backend="triton"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(backend, "verdicts", {})
    calls = count_calls(monkeypatch, linear, "fused_linear", lambda out: out + 1)
    for _ in range(2):
        assert torch.equal(linear_attention(q, k, v), linear_attention(q, k, v, backend="plain"))
    assert len(calls) == 1 and len(capsys.readouterr().out.splitlines()) == 1


@needs_triton
@pytest.mark.parametrize("surroundings", ["no_grad", "inference_mode", "autocast", "checkpoint", "compile"])
def test_the_comparison_is_the_same_wherever_the_first_call_stands(surroundings, as_on_a_gpu, monkeypatch, capsys):
    calls = count_calls(monkeypatch, softmax, "fused") if surroundings != "compile" else []  # a spy would be traced
    q, k, v = some()
    noise = torch.get_rng_state()
    expected = attention(q, k, v, backend="triton").detach()
    calls.clear()
    if surroundings == "no_grad":
        with torch.no_grad():
            out = attention(q, k, v)
    elif surroundings == "inference_mode":
        with torch.inference_mode():
            out = attention(q, k, v)
    elif surroundings == "autocast":
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = attention(q, k, v)
    elif surroundings == "checkpoint":  # it counts what is kept for backward, and computes that again
        out = checkpoint(attention, q, k, v, use_reentrant=False)
        out.sum().backward()
        assert len(calls) == 3  # the comparison, forward, forward again
    else:
        out = torch.compile(lambda *x: 2 * attention(*x) / 2, fullgraph=True, backend="aot_eager")(q, k, v)
        out.sum().backward()
        assert len(backend.verdicts) == 1
    torch.testing.assert_close(out, expected)
    assert backend.verdicts and all(backend.verdicts.values()) and capsys.readouterr().out == ""
    assert torch.equal(noise, torch.get_rng_state())


def test_gpus_before_ampere_keep_to_torchs_own(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(backend, "disagreement", lambda *rest: pytest.fail("nothing is compared there"))
    assert not softmax.trusted(torch.device("cuda", 0), torch.float16, 64, False, False, False)
    assert not linear.trusted(torch.device("cuda", 0), torch.float16, 32)
    assert capsys.readouterr().out == ""
