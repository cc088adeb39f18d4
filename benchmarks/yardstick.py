"""How fast this machine is just now: a fixed piece of work, timed between the stages, so that the minutes of runs on
other machines and at other hours can be compared. Nothing of ours is in it, and it never changes."""

import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from plumbing.run_folder import read_lines

STEPS = 20
CALIBRATION = 0.0123  # seconds: the reading of a quiet machine on which the first run that was measured took 14 minutes


def processor() -> str:
    """The processor's own name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def reading() -> float:
    """Median seconds of 20 training steps of a small Transformer, in plain torch on the CPU, on as many threads as
    torch has. The global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        model, tokens = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), torch.randn(8, 32, 128)
    optimizer, times = torch.optim.AdamW(model.parameters()), []
    for _ in range(3 + STEPS):  # the first three warm up
        start = time.perf_counter()
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def take_reading(run: Path, device: str, after: str) -> None:
    """A line of machine.jsonl, `after` a stage or the "start"; none on GPUs, of which it would say nothing."""
    if device != "cpu":
        return
    line = {"after": after, "yardstick": reading(), "threads": torch.get_num_threads(), "processor": processor(),
            "torch": torch.__version__}
    with (run / "machine.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def machine(run: Path, seconds: float) -> dict:
    """-> what results.json says of a run's time: its "machine", as it was found last, with the median of all readings;
    and "normalised_minutes", what the finished stages and `seconds` of evaluation would take where the yardstick reads
    CALIBRATION. Nothing where no reading was taken."""
    lines = read_lines(run / "machine.jsonl")
    if not lines:
        return {}
    yardstick = statistics.median(line["yardstick"] for line in lines)
    files = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in run.glob("[PTU][123].pt")]
    minutes = (sum(content["seconds"] for content in files) + seconds) / 60
    about = {key: lines[-1][key] for key in ("processor", "threads", "torch")}
    return {"machine": about | {"yardstick": yardstick},
            "normalised_minutes": round(minutes * CALIBRATION / yardstick, 2)}
