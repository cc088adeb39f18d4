"""A tiny run for the tests of several processes: `python -m tests.tools.tiny_run FOLDER '{"field": value}' [STAGES]`.

KEEP_AT="T3 2" copies that step's checkpoint to FOLDER/kept; KILL_AT="U2 2" kills the last process after that one, once,
and makes the file KILL_MARKER. A stage that neither names saves nothing on its way.
"""

import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import train
from plumbing import run_folder
from plumbing.processes import join_processes, leave_processes
from spar import NAMES, make_config
from tests.conftest import TINY


def tiny_config(changes: dict):
    """TINY with `changes`, in which json has made lists of tuples."""
    return make_config(**TINY | {key: tuple(value) if isinstance(value, list) else value for key,
                                 value in changes.items()})


def main() -> None:
    folder, config = Path(sys.argv[1]), tiny_config(json.loads(sys.argv[2]))
    keep_at, kill_at = os.environ.get("KEEP_AT", ""), os.environ.get("KILL_AT", "")
    save_progress, train_stage = train.save_progress, train.train_stage
    build, read_stage = train.build, run_folder.read_stage

    def watched(run, stage, step, state):
        save_progress(run, stage, step, state)
        if keep_at == f"{stage} {step}" and os.environ["LOCAL_RANK"] == "0":
            shutil.copytree(run / "resume", run / "kept")
        marker = Path(os.environ.get("KILL_MARKER", ""))
        if kill_at == f"{stage} {step}" and os.environ["LOCAL_RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def saving(model, stage, *rest, **options):
        model.config.save_minutes = 0.0 if stage.name in (keep_at[:2], kill_at[:2]) else 60.0
        train_stage(model, stage, *rest, **options)

    def build_as_on_gpus(*given):
        return build(*given).to(memory_format=torch.channels_last)

    def read_by_first(model, path, checksums=False):
        assert not checksums or os.environ["LOCAL_RANK"] == "0", "one process reads every byte for all"
        return read_stage(model, path, checksums)

    if config.shard:
        train.build = build_as_on_gpus
    run_folder.read_stage = read_by_first
    train.save_progress, train.train_stage = watched, saving
    train.report_so_far = lambda *_: "no pictures"  # nothing here is about them
    gc.disable()  # so that cycles last to the end, as they may
    device = join_processes("cpu", config.shard)
    train.train(config, folder, sys.argv[3].split(",") if sys.argv[3:] else list(NAMES), device)
    leave_processes()
    left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]  # none where there is no /proc
    assert config.shard or not [name for name in left if "gloo" in name], f"threads of the group outlived it: {left}"
    sys.stdout.flush()
    os._exit(0)  # at once: with FSDP2 some are left, which a process that goes on for seconds does not feel


if __name__ == "__main__":
    main()
