"""Which device, in which precision, with which settings of torch."""

import time

import torch
from torch import nn

from plumbing.command import UserError


def best_device(wish: str) -> str:
    """"auto" -> cuda where there is one, else cpu. Raises UserError for a device that torch cannot use here."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available() or wish == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"this machine's torch has no {wish}: use --device cpu")
    return wish


def default_precision(device: str) -> str:
    """bf16 on GPUs that have units for it (from capability 8.0, Ampere), fp16 on those before, fp32 elsewhere."""
    if device != "cuda":
        return "fp32"
    if torch.cuda.get_device_capability() < (8, 0):
        print(f"{torch.cuda.get_device_name()} has no units for bf16: --precision fp16, --attention sdpa")
        return "fp16"
    return "bf16"


def check_precision(precision: str, device: str) -> None:
    """Raises UserError for half precision on a processor that takes longer for it, and says how much longer."""
    if device != "cpu" or precision == "fp32":
        return
    seconds = {}
    for kind in (torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]):
        a, times = torch.ones(256, 256, dtype=kind), []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[kind] = min(times)
    plain, half = seconds.values()
    if half > plain:
        raise UserError(f"--precision {precision}: this processor takes {half / plain:.0f} times as long for products "
                        f"in {precision} as in fp32; use --precision fp32")


def set_up_torch(device: str) -> None:
    """The same bits for the same seed on CPU; TF32 products on GPUs."""
    # On two threads, sums into one place have no order of their own.
    torch.use_deterministic_algorithms(device == "cpu", warn_only=True)
    # It would also fill every new tensor, 5 % of U2's time; what is made empty here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")


def compile_parts(model: nn.Module, backend: str = "inductor") -> None:
    """Those that always see one shape. The LLM, the connector and what attends to the condition see any length: of a
    mask that varies torch 2.14 compiles a backward pass for one length alone."""
    t = model.tokenizer
    inside_dit = [part for block in model.dit.blocks for part in (block.attn, block.ffn)]
    parts = t.vision, t.semantic_stream, t.pixel_stream, t.decoder, model.pixel_encoder, model.align_head, *inside_dit
    for part in parts:
        if part is not None:
            part.compile(backend=backend)
