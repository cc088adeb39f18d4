"""Everything that needs a GPU, in three parts of less than ten minutes, the most telling first.

    python benchmarks/gpu.py --part 1    the kernels' tests on the GPU, and their speed against torch's own attention
    python benchmarks/gpu.py --part 2    a step of each stage of small, full, toy: seconds, memory and its forecast, MFU
    python benchmarks/gpu.py --part 3    the small preset whole, its steps scaled to end within eight minutes, evaluated

    TRITON_INTERPRET=1 python benchmarks/gpu.py --part 1 --tiny --out /tmp/tiny    any part on any machine, in seconds

The figures go to OUT/gpu-<device>.json (`--out`, default results/), after each one; the parts fill one file. Part 3
leaves the run's pictures beside it. What fails becomes {"error": a line}, and the next thing is measured.

It needs torch from 2.10 on with its Triton, and: pip install einops tqdm numpy pillow pytest. On a machine without a
network, bring these as wheels: pip download --no-deps -d wheels …, there pip install --no-index --no-deps wheels/*.whl.
"""

import argparse
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch

import train
from attention import attention, trusted
from benchmarks.attention import SHAPES, against_the_best, compare
from benchmarks.cost import forecast, peak_of
from benchmarks.yardstick import processor
from evaluate import Protocol, evaluate
from parts import backend
from parts import linear_attention as linear
from parts.attention_triton import no_triton_here, triton
from plumbing.command import write_text
from plumbing.flags import parse
from plumbing.pictures import draw_report
from plumbing.run_folder import build, read_lines
from spar import NAMES, Config, make_config

TINY_TESTS = ["tests/claims/test_attention_choice.py::test_an_unknown_choice_is_refused_and_named"]
TINY_SHAPES = {"tiny": (1, 2, 1, 33, 33, 32, True)}
SLOWEST_SHARE = 0.2  # of the peak: from it, how many steps of a large stage there is time for
WHOLE_RUN, AFTER_TRAINING = 480, 120  # seconds of part 3, and those of them for evaluation and pictures


class Figures:
    """The file of figures, and the clock of one part."""

    def __init__(self, folder: Path, device: str, minutes: float):
        name = torch.cuda.get_device_name() if device == "cuda" else processor()
        self.path = folder / f"gpu-{re.sub('[^A-Za-z0-9.]+', '-', name).strip('-')}.json"
        self.device, self.peak = device, peak_of(name)
        self.end = time.monotonic() + 60 * minutes
        self.figures = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.figures |= {"device": name, "torch": torch.__version__, "triton": getattr(triton, "__version__", None)}

    def left(self) -> float:
        """Seconds until the part must end."""
        return self.end - time.monotonic()

    def measure(self, part: str, name: str, job: Callable[[], object], seconds: float = 600) -> object:
        """Writes `job()` as figures[part][name], or why there is none; -> job()'s result, or None."""
        start, result = time.monotonic(), None
        try:
            result = figure = within(min(seconds, self.left()), job)
        except (Exception, SystemExit) as error:  # whatever it is, the next measurement is worth as much
            first_line = (str(error).strip().splitlines() or [""])[0]
            figure = {"error": f"{type(error).__name__}: {first_line}"[:200]}
        gc.collect()  # an error held what lay on the GPU
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.figures.setdefault(part, {})[name] = figure
        self.figures["kernels agree with torch's"] = {
            " ".join(kind): verdict for (kind, _), verdict in backend.verdicts.items()}
        write_text(self.path, json.dumps(self.figures, indent=1) + "\n")
        print(f"{part}, {name} ({time.monotonic() - start:.1f} s): {json.dumps(figure)[:300]}", flush=True)
        return result


def within(seconds: float, job: Callable[[], object]) -> object:
    """job(), or TimeoutError after so many seconds."""
    def stop(number, frame):
        raise TimeoutError(f"no time left after {seconds:.0f} s")

    if seconds <= 1:
        raise TimeoutError("no time left to begin")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again and again: a first one may fall where errors are swallowed
    try:
        return job()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- part 1: the kernels


def kernels(figures: Figures, tiny: bool) -> None:
    tests = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*attention*.py"))]
    seconds = min(330, 0.6 * figures.left())
    figures.measure("kernels", "tests", partial(run_tests, TINY_TESTS if tiny else tests, seconds))
    kinds = [(torch.bfloat16, 64, True), (torch.bfloat16, 72, False), (torch.float32, 32, False)]
    for dtype, width, causal in kinds[-1:] if tiny else kinds:
        job = partial(agreement, trusted, figures.device, dtype, width, not causal, causal, False)
        figures.measure("kernels", f"attention agrees, {dtype} of {width}".replace("torch.", ""), job, 60)
    job = partial(agreement, linear.trusted, figures.device, torch.bfloat16, 32)
    figures.measure("kernels", "linear attention agrees, bfloat16 of 32", job, 60)
    dtype, effort = (torch.float32, (1, 1)) if tiny else (torch.bfloat16, (7, 10))
    for name, shape in (TINY_SHAPES if tiny else SHAPES).items():
        rows = figures.measure("speed", name, partial(compare, attention, shape, figures.device, dtype, *effort), 90)
        if rows:
            figures.measure("speed against the best", name, partial(against_the_best, rows))


def agreement(trust: Callable, device: str, *kind) -> bool:
    """What "auto" finds here; an error where the kernels cannot run at all."""
    if reason := no_triton_here():
        raise RuntimeError(reason)
    return trust(torch.device(device), *kind)


def run_tests(tests: list[str], seconds: float) -> dict:
    """The tests in several processes, since most of the time goes into compiling; what ran by then is counted."""
    end = time.monotonic() + seconds
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rN"]
    environment = os.environ | {"PYTEST_ADDOPTS": ""}  # what is printed is counted: a user's own wishes would change it
    listing = subprocess.run([*pytest, "--collect-only", "-q", *tests], cwd=ROOT, capture_output=True, text=True,
                             env=environment, timeout=seconds)
    names = [line for line in listing.stdout.splitlines() if "::" in line]
    if not names:
        raise RuntimeError(f"no tests: {(listing.stderr + listing.stdout)[-150:]}")
    share = max(1, min(8, (os.cpu_count() or 2) // 2, len(names)))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(i) for i in range(share)]
        processes = [subprocess.Popen([*pytest, "-v", "--tb=short", *names[i::share]], cwd=ROOT, env=environment,
                                      stdout=log.open("wb"), stderr=subprocess.STDOUT) for i, log in enumerate(logs)]
        try:
            for process in processes:
                process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
        text = "\n".join(log.read_text(encoding="utf-8") for log in logs)
    results = re.findall(r"^(\S*::.*) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    wrong = [name for name, result in results if result in ("FAILED", "ERROR")]
    return {"passed": sum(result == "PASSED" for _, result in results), "failed": len(wrong),
            "skipped": sum(result == "SKIPPED" for _, result in results), "not_run": len(names) - len(results),
            "names": wrong, "reasons": [line[:200] for line in text.splitlines() if line.startswith("E  ")][:40]}


# ---------------------------------------------------------------- part 2: a step of each stage


def steps(figures: Figures, tiny: bool) -> None:
    for preset in ("tiny",) if tiny else ("small", "full", "toy"):
        config = configuration(preset, figures)
        for stage in train.STAGES[::4] if tiny else train.STAGES:
            job = partial(one_step, config, stage, figures, tiny)
            figures.measure(f"a step of {preset}", stage.name, job, 150 if preset == "full" else 60)


def configuration(preset: str, figures: Figures, **changes) -> Config:
    """As `train.py --preset` would make it on this device."""
    if preset == "tiny":
        from tests.conftest import TINY
        return make_config(**TINY | dict(batch=(2,) * 9) | changes)
    return replace(parse("", ["--preset", preset, "--device", figures.device])[0], **changes)


def one_step(config: Config, stage, figures: Figures, tiny: bool) -> dict:
    """As `benchmarks.cost.bench` measures a stage, in as many steps as there is time for."""
    config = replace(config, early=0.0)  # T3's larger pictures
    cost = forecast(config, stage, train.one_batch, train.step_module)
    slow = cost["flops"] / (SLOWEST_SHARE * (figures.peak or 1e14))
    number = 3 if tiny else 51 if 51 * slow < 10 else 21 if 21 * slow < 20 else 11
    if figures.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    time_of = time_steps(config, stage, figures.device, number)
    batch, flops = config.of_stage("batch", stage.name), cost["flops"] / time_of["step"]
    result = time_of | {"images_per_second": batch / time_of["step"], "flops": flops,
                        "mfu": flops / figures.peak if figures.peak else None, "batch": batch, "steps": number,
                        "precision": config.precision, "forecast_bytes": cost["total"]}
    return result | ({"peak_bytes": torch.cuda.max_memory_allocated()} if figures.device == "cuda" else {})


def time_steps(config: Config, stage, device: str, number: int) -> dict[str, float]:
    """-> seconds of a "step", share of it spent "waiting" for data, seconds of all else, "beside" steps. The first
    steps, which compile and choose kernels, do not count where the log has more than two lines."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, steps=(number,) * len(NAMES))
        train.train_stage(build(config, device), stage, Path(folder), keep=False)
        lines = read_lines(Path(folder) / "log.jsonl")
    first, last = lines[min(1, len(lines) - 2)], lines[-1]
    whole = max(last["seconds"] - first["seconds"], 1e-9)
    waiting = (last["seconds"] * last["waiting"] - first["seconds"] * first["waiting"]) / whole
    step = max(whole / (last["step"] - first["step"]), 1e-4)  # the log has hundredths of a second
    return {"step": step, "waiting": waiting, "beside": time.monotonic() - start - number * step}


# ---------------------------------------------------------------- part 3: small, whole


def whole_run(figures: Figures, tiny: bool) -> None:
    start, preset = time.monotonic(), "tiny" if tiny else "small"
    config, part = configuration(preset, figures), f"{preset}, whole"
    speeds = []
    for stage in train.STAGES:
        job, speed = partial(time_steps, config, stage, figures.device, 3 if tiny else 21), None
        if not tiny or stage in train.STAGES[::4]:
            speed = figures.measure(f"{part}: speed before", stage.name, job, 40)
        speeds.append(speed or {"step": 0.1, "beside": 10.0})  # a guess: a stage that fails alone will fail again
    seconds = WHOLE_RUN - AFTER_TRAINING - (time.monotonic() - start) - sum(speed["beside"] for speed in speeds)
    full_length = sum(number * speed["step"] for number, speed in zip(config.steps, speeds))
    scale = min(1.0, max(seconds, 30) / full_length)
    config = replace(config, steps=tuple(max(1, round(number * scale)) for number in config.steps))
    figures.measure(part, "steps", lambda: {"scale": scale, "steps": dict(zip(NAMES, config.steps))})
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / preset
        job = partial(train_all_stages, config, run, figures.device)
        figures.measure(part, "training", job, figures.left() - 0.5 * AFTER_TRAINING)
        figures.measure(part, "pictures", partial(pictures, run, figures), 0.5 * figures.left())
        figures.measure(part, "evaluation", lambda: evaluate(run, Protocol(count=2 if tiny else 100), figures.device))


def train_all_stages(config: Config, run: Path, device: str) -> dict:
    """The whole of `train.py` but for what comes after it; seconds and the last loss of each stage."""
    start = time.monotonic()
    train.train(config, run, list(NAMES), device)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {line["stage"]: line for line in lines}
    return {"seconds": time.monotonic() - start,
            "stages": {name: {key: line[key] for key in ("step", "loss", "seconds", "images_per_second")}
                       for name, line in last.items()}}


def pictures(run: Path, figures: Figures) -> list[str]:
    draw_report(run, figures.device)
    results = []
    for name in ("summary", "losses"):
        results.append(f"{figures.path.stem}-{run.name}-{name}.png")
        shutil.copyfile(run / "report" / f"{name}.png", figures.path.with_name(results[-1]))
    return results


PARTS = {1: kernels, 2: steps, 3: whole_run}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=PARTS, required=True, help="1: kernels, 2: steps, 3: a whole run")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for gpu-<device>.json and pictures")
    parser.add_argument("--minutes", type=float, default=9.2, help="when the part ends, finished or not")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device: does the script run?")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.tiny:
        raise SystemExit("error: there is no GPU here; --tiny tries the script out without one")
    figures = Figures(given.out, device, given.minutes)
    PARTS[given.part](figures, given.tiny)
    print(figures.path)


if __name__ == "__main__":
    main()
