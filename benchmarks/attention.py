"""Our fused kernels against every backend of torch's own attention, on a GPU: `python attention.py --bench`.

All run in one process, one after the other, round after round; each figure is the median of the rounds. Written to
runs/bench/attention-<device>.json, or where `--out` says.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from parts.attention_triton import triton

# name: b, heads of queries, heads of keys, n, m, width, causal
SHAPES = {"encoder at 448 px": (32, 16, 16, 1025, 1025, 64, False), "LLM, 512 words": (16, 14, 2, 512, 512, 64, True),
          "LLM, 2048 words": (4, 14, 2, 2048, 2048, 64, True),
          "DiT, cross-attention": (64, 16, 16, 256, 512, 72, False),
          **{f"{n // 1024}k × {e}": (16384 // n, 16, 16, n, n, e, False)
             for e in (64, 128) for n in (2048, 8192, 16384)}}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def candidates(attention: Callable, causal: bool, grouped: bool) -> dict[str, Callable]:
    def through(backend: SDPBackend) -> Callable:
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return run

    return {"ours": lambda q, k, v: attention(q, k, v, causal=causal, backend="triton")} | {
        name: through(backend) for name, backend in BACKENDS.items()}


def seconds(run: Callable, repeats: int, device: str) -> float:
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


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Output and gradients in float64, of one head of one sample."""
    q, k, v = (x[:1, :1].double().detach().requires_grad_() for x in (q, k, v))
    score = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -math.inf)
    out = score.softmax(-1) @ v
    return out, *torch.autograd.grad(out, (q, k, v), grad[:1, :1].double())


def compare(attention: Callable, shape: tuple, device: str, dtype: torch.dtype, rounds: int = 7,
            repeats: int = 10) -> dict[str, dict]:
    """candidate -> seconds forward and forward+backward, TFLOP/s, peak bytes, largest error against float64; or why it
    refused. `attention` is attention.attention, `shape` as in SHAPES."""
    b, query_heads, heads, n, m, e, causal = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, x, a, e, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
               for a, x in ((query_heads, n), (heads, m), (heads, m)))  # as they come from a projection
    grad = torch.randn(b, n, query_heads, e, device=device, dtype=dtype).transpose(1, 2)
    true, results, runs = exact(q, k, v, grad, causal), {}, {}
    for name, run in candidates(attention, causal, query_heads != heads).items():
        def both(run=run):
            return torch.autograd.grad(run(q, k, v), (q, k, v), grad)

        try:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            out, (dq, dk, dv) = run(q, k, v), both()
            peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
        except Exception as error:  # it does not take this shape, does not compile, or runs out of memory
            results[name] = {"refused": (str(error).strip().splitlines() or [type(error).__name__])[0][:120]}
            continue
        ours = (out, dq) if query_heads != heads else (out, dq, dk, dv)  # a shared key's gradient is of several heads
        error = max(((x[:1, :1].double() - t).abs().max() / t.abs().max()).item() for x, t in zip(ours, true))
        results[name], runs[name] = {"peak_bytes": peak, "error": error}, (lambda run=run: run(q, k, v), both)
    times = {name: ([], []) for name in runs}
    for _ in range(rounds):
        for name, pair in runs.items():
            for series, run in zip(times[name], pair):
                series.append(seconds(run, repeats, device))
    flop = 4 * b * query_heads * n * m * e * (0.5 if causal else 1)
    for name, (forward, both) in times.items():
        forward, both = statistics.median(forward), statistics.median(both)
        results[name] |= {"forward": forward, "both": both, "forward_tflops": flop / forward / 1e12,
                          "both_tflops": 3.5 * flop / both / 1e12}
    return results


def against_the_best(results: dict[str, dict]) -> dict[str, float]:
    """Of one shape: the fastest other's time ÷ ours, forward and with backward (above 1 ours is the faster); our error
    and memory ÷ flash's, or where it refused ÷ those of the most exact. Empty where ours refused, or all others."""
    others = {name: row for name, row in results.items() if name != "ours" and "refused" not in row}
    ours = results["ours"]
    if "refused" in ours or not others:
        return {}
    flash = others.get("flash", min(others.values(), key=lambda row: row["error"]))
    ratios = {part: min(row[part] for row in others.values()) / ours[part] for part in ("forward", "both")}
    ratios["error"] = ours["error"] / max(flash["error"], 1e-12)
    return ratios | {"memory": ours["peak_bytes"] / max(flash["peak_bytes"], 1)}


def line(row: dict) -> str:
    if "refused" in row:
        return row["refused"]
    return (f"{row['forward'] * 1e3:6.3f} ms {row['forward_tflops']:8.0f} {row['both'] * 1e3:11.3f} ms "
            f"{row['both_tflops']:8.0f} {row['peak_bytes'] / 2**20:9.0f} {row['error']:9.1e}")


def main(attention: Callable, out: Path | None = None) -> None:
    """`attention`: attention.attention, handed in, since nothing here imports a file of the root."""
    if not torch.cuda.is_available():
        raise SystemExit("error: --bench compares kernels on a GPU, and torch finds none here")
    device, results = torch.cuda.get_device_name(), {}
    versions = {"device": device, "torch": torch.__version__, "triton": getattr(triton, "__version__", None),
                "cudnn": torch.backends.cudnn.version()}
    print(versions)
    for name, shape in tqdm(SHAPES.items(), desc="shapes"):
        results[name] = compare(attention, shape, "cuda", torch.bfloat16)
        torch.cuda.empty_cache()
    print(f"{'shape':22} {'':9} {'forward':>9} {'TFLOP/s':>8} {'with backward':>14} {'TFLOP/s':>8} {'peak MiB':>9} "
          f"{'error':>9}")
    for name, rows in results.items():
        for candidate, row in rows.items():
            print(f"{name:22} {candidate:9} {line(row)}")
    summary = {name: against_the_best(rows) for name, rows in results.items()}
    for name, row in summary.items():
        if row:
            print(f"{name:22} against the best: forward {row['forward']:.2f}, with backward {row['both']:.2f}; "
                  f"against flash: error {row['error']:.2f}, memory {row['memory']:.2f}")
    out = out or Path("runs/bench") / f"attention-{device.replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(versions | {"shapes": results, "summary": summary}, indent=1) + "\n", encoding="utf-8")
    print(out)
