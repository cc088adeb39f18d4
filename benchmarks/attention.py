"""Our fused kernels against every backend of torch's scaled_dot_product_attention: `python attention.py --bench`, on a GPU.

All run in one process, one after the other, round after round; each figure is the median of the rounds. Written to
benchmarks/attention-<device>.json.
"""

import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from attention import attention
from parts.attention_triton import triton

# name: b, hq, hk, n, m, width, causal
SHAPES = {"encoder at 448 px": (32, 16, 16, 1025, 1025, 64, False), "LLM, 512 words": (16, 14, 2, 512, 512, 64, True),
          "LLM, 2048 words": (4, 14, 2, 2048, 2048, 64, True), "DiT, cross-attention": (64, 16, 16, 256, 512, 72, False),
          **{f"{n // 1024}k × {e}": (16384 // n, 16, 16, n, n, e, False) for e in (64, 128) for n in (2048, 8192, 16384)}}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def candidates(causal: bool, grouped: bool) -> dict:
    def forced(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return run

    return {"ours": lambda q, k, v: attention(q, k, v, causal=causal, backend="triton")} | {
        name: forced(backend) for name, backend in BACKENDS.items()}


def seconds(run, repeats: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def exact(q, k, v, grad, causal):
    """Output and gradients in float64, of one head of one sample."""
    q, k, v = (x[:1, :1].double().detach().requires_grad_() for x in (q, k, v))
    score = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -math.inf)
    out = score.softmax(-1) @ v
    return out, *torch.autograd.grad(out, (q, k, v), grad[:1, :1].double())


def compare(shape: tuple, device: str, dtype: torch.dtype, rounds: int = 7, repeats: int = 10) -> dict[str, dict]:
    """candidate -> seconds forward and forward+backward, TFLOP/s, peak bytes, largest error against float64."""
    b, hq, hk, n, m, e, causal = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, x, h, e, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
               for h, x in ((hq, n), (hk, m), (hk, m)))  # as they come from a projection
    grad, found = torch.randn(b, n, hq, e, device=device, dtype=dtype).transpose(1, 2), {}
    true = exact(q, k, v, grad, causal)
    runs = {}
    for name, run in candidates(causal, hq != hk).items():
        def both(run=run):
            return torch.autograd.grad(run(q, k, v), (q, k, v), grad)

        try:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            out, (dq, dk, dv) = run(q, k, v), both()
            peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
        except RuntimeError as error:  # a backend that does not take this shape, or runs out of memory
            found[name] = {"refused": str(error).splitlines()[0][:120]}
            continue
        near = (out[:1, :1], dq[:1, :1]) if hq != hk else (out[:1, :1], dq[:1, :1], dk[:1, :1], dv[:1, :1])
        error = max(((a.double() - t).abs().max() / t.abs().max()).item() for a, t in zip(near, true))
        found[name], runs[name] = {"peak_bytes": peak, "error": error}, (lambda run=run: run(q, k, v), both)
    times = {name: ([], []) for name in runs}
    for _ in range(rounds):
        for name, pair in runs.items():
            for kept, run in zip(times[name], pair):
                kept.append(seconds(run, repeats, device))
    flop = 4 * b * hq * n * m * e * (0.5 if causal else 1)
    for name, (forward, both) in times.items():
        forward, both = statistics.median(forward), statistics.median(both)
        found[name] |= {"forward": forward, "both": both, "forward_tflops": flop / forward / 1e12,
                        "both_tflops": 3.5 * flop / both / 1e12}
    return found


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: --bench compares kernels on a GPU, and torch finds none here")
    device, results = torch.cuda.get_device_name(), {}
    versions = {"device": device, "torch": torch.__version__, "triton": triton.__version__,
                "cudnn": torch.backends.cudnn.version()}
    print(versions)
    for name, shape in tqdm(SHAPES.items(), desc="shapes"):
        results[name] = compare(shape, "cuda", torch.bfloat16)
        torch.cuda.empty_cache()
    print(f"{'shape':22} {'':9} {'forward':>9} {'TFLOP/s':>8} {'with backward':>14} {'TFLOP/s':>8} {'peak MiB':>9} {'error':>9}")
    for name, found in results.items():
        for who, r in found.items():
            print(f"{name:22} {who:9} " + (r["refused"] if "refused" in r else
                  f"{r['forward'] * 1e3:6.3f} ms {r['forward_tflops']:8.0f} {r['both'] * 1e3:11.3f} ms {r['both_tflops']:8.0f} "
                  f"{r['peak_bytes'] / 2**20:9.0f} {r['error']:9.1e}"))
    summary = {}
    for name, found in results.items():
        others = {who: r for who, r in found.items() if who != "ours" and "refused" not in r}
        ours, flash = found["ours"], others.get("flash", min(others.values(), key=lambda r: r["error"]))
        summary[name] = {part: min(r[part] for r in others.values()) / ours[part] for part in ("forward", "both")} | {
            "error": ours["error"] / flash["error"], "memory": ours["peak_bytes"] / flash["peak_bytes"]}
        print(f"{name:22} against the best: forward {summary[name]['forward']:.2f}, with backward {summary[name]['both']:.2f}; "
              f"against flash: error {summary[name]['error']:.2f}, memory {summary[name]['memory']:.2f}")
    path = Path(__file__).parent / f"attention-{device.replace(' ', '-')}.json"
    path.write_text(json.dumps(versions | {"shapes": results, "summary": summary}, indent=1) + "\n")
    print(path)
