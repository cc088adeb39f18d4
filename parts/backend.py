"""Which backend computes attention, and whether the fused kernels are right on this machine.

`use_backend` sets the one piece of state that all models of a process share. It may be shared because it says how
attention is computed and not what: the backends differ in rounding alone, and handing the choice through every layer's
constructor would write a property of the machine into the model.

`agrees` is why "auto" may use kernels that were written by hand: before they compute a kind of input for the first
time, they compute a small one of that kind, and what they give is compared with torch's own, forward and backward.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from parts.attention_triton import no_triton_here

BACKENDS = ("auto", "triton", "tiled", "sdpa")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value

_backend = "auto"
verdicts: dict[tuple, bool] = {}  # a kind of input -> whether the fused kernels computed a small one right


def use_backend(name: str) -> None:
    """What attention and linear attention use from now on in this process, where a call does not name a backend itself.

    auto      the fused kernels on CUDA where they run and agree with torch's own (`agrees`), else sdpa
    triton    the fused kernels, unchecked; linear attention takes its plain formula for widths that they do not know
    tiled     softmax attention by hand in plain PyTorch; linear attention by its plain formula
    sdpa      torch's scaled_dot_product_attention; linear attention by its plain formula

    Raises ValueError for another name, and for triton on a machine that cannot run it.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: one of {', '.join(BACKENDS)}")
    if name == "triton" and (reason := no_triton_here()):
        raise ValueError(f"attention backend triton cannot run here: {reason}; use --attention auto")
    _backend = name


def default_backend() -> str:
    """What `use_backend` was called with last."""
    return _backend


def constant_while_compiling(function: Callable) -> Callable:
    """torch.compile calls it while it traces, and does not look inside: the mark that
    torch.compiler.assume_constant_result makes, which would load all of the compiler into every process, 1.5 seconds of
    its start."""
    function._dynamo_marked_constant = True
    return function


def agrees(kind: tuple, device: torch.device, fused: Callable, plain: Callable, inputs: Callable) -> bool:
    """Whether `fused(*tensors)` gives on `device` what `plain` gives in float64 on the CPU: output and gradients.

    kind: what the answer holds for, in words; it is found out once for each kind and device. inputs(): the tensors, on
    the CPU and in the precision that is checked. Where the answer is no, one line says why; the caller goes on without.
    False without a line on GPUs before Ampere, which lack the units that the kernels are written for.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if (kind, device) not in verdicts:
        # A thread of its own starts with torch's settings as they come. The caller's may be anything: no gradients,
        # autocast, a layer that will be computed twice and counts what backward needs, or a graph that is being traced.
        with ThreadPoolExecutor(1) as thread:
            reason = thread.submit(disagreement, device, fused, plain, inputs).result()
        if reason:
            print(f"{' '.join(kind)}: the fused kernels are not used, {reason}; torch's own go on", flush=True)
        verdicts[kind, device] = not reason
    return verdicts[kind, device]


def disagreement(device: torch.device, fused: Callable, plain: Callable, inputs: Callable) -> str:
    """What speaks against `fused`: its error, or how far it is from `plain`; empty where nothing does."""
    tensors = inputs()
    right_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # a thread begins on GPU 0
    try:
        with right_gpu:
            ours = [x.cpu() for x in output_and_gradients(fused, [x.to(device) for x in tensors])]
    except Exception as error:  # the compiler's own errors share no class
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line[:120]}"
    theirs = output_and_gradients(plain, [x.double() for x in tensors])
    distance = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))
    if all(x.isfinite().all() for x in ours) and distance <= TOLERANCE[tensors[0].dtype]:
        return ""
    return f"they are {distance:.1e} of the largest value away from torch's"


def output_and_gradients(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    signs = torch.arange(out.numel(), device="cpu").reshape(out.shape).cos().sign()  # ±1 is exact in any precision
    return [out.detach(), *torch.autograd.grad(out, leaves, signs.to(out))]


def small_inputs(dtype: torch.dtype, heads: tuple[int, ...], lengths: tuple[int, ...], width: int) -> list[Tensor]:
    """Normal numbers `b a n e` on the CPU, two samples, laid out as a projection leaves them; the run's noise stays."""
    like = dict(generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    return [torch.randn(2, n, a, width, **like).to(dtype).transpose(1, 2) for a, n in zip(heads, lengths)]
