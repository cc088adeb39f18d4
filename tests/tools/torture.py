"""Kills a tiny run at random moments, inside saves too, over all nine stages, and compares its end with a run left
alone.

    python -m tests.tools.torture --kills 200 [--workers 2] [--seed 0]

Prints the kills, the checkpoints that were lost or could not be loaded, and the runs that ended in other bits; exit
code 1 where one of the last two is not 0. Each start is a forked process, killed with SIGKILL after a random time.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from spar import NAMES, make_config
from tests.conftest import TINY

TIMES = ("seconds", "images_per_second", "waiting")  # of a log's line: what a clock says


def start(config, run: Path, told: Path) -> int:
    """A process that trains; what it prints goes to the file `told`."""
    child = os.fork()
    if child:
        return child
    handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    try:
        torch.set_num_threads(1)
        train.train(config, run, list(NAMES), "cpu", None)
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        print("failed:", repr(error), flush=True)
        os._exit(1)


def ended(run: Path) -> tuple[dict, list]:
    """All that a run leaves behind: its checkpoints' content, and its log without the clock."""
    parts = {}
    for name in NAMES:
        content = torch.load(run / f"{name}.pt", weights_only=True)
        content.pop("seconds")
        parts[name] = content
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return parts, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def torture(kills: int, workers: int, seed: int, folder: Path, steps: int = 12) -> tuple[int, int, int, int]:
    """-> (kills, checkpoints lost or not loadable, runs finished, runs that ended in other bits)"""
    config = make_config(**TINY | {"steps": (steps,) * 9, "gan_start": 0.3, "save_minutes": 0.0, "workers": workers,
                                   "seed": seed})
    rng, straight, told = random.Random(seed), folder / "straight", folder / "told"
    begun = time.time()
    os.waitpid(start(config, straight, told), 0)
    whole, right = time.time() - begun, ended(straight)
    done = lost = runs = other = 0
    while done < kills:
        run, furthest = folder / f"run{runs}", (0, 0)
        while True:
            told.write_text("")
            child, limit = start(config, run, told), time.time() + (rng.uniform(0, whole / 6) if done < kills else 600)
            gone = 0
            while time.time() < limit and not gone:
                gone, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.002)
            if not gone:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
                print(f"\rkills {done}", end="", flush=True)
            lost += len(re.findall(r"is broken|another model", told.read_text()))
            if gone and status:
                raise RuntimeError(told.read_text()[-2000:])  # it stopped by itself: there is nothing to compare
            if gone:
                break
            here = sorted((NAMES.index(path.name[:2]), int(path.name[3:])) for path in run.glob("resume/*-*[0-9]"))
            here = max([*here, *((i, steps) for i, name in enumerate(NAMES) if (run / f"{name}.pt").exists())],
                       default=(0, 0))
            lost += here < furthest  # a checkpoint that was there has gone
            furthest = max(here, furthest)
        runs += 1
        other += not same(ended(run), right)
    print()
    return done, lost, runs, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, lost, runs, other = torture(given.kills, given.workers, given.seed, Path(folder))
    print(f"kills {done}, lost or unloadable checkpoints {lost}, runs {runs}, of which ended in other bits {other}")
    sys.exit(bool(lost or other))


if __name__ == "__main__":
    main()
