"""A tiny run for the tests of several processes: `python -m tests.tools.tiny_run FOLDER '{"field": value}' [STAGES]`.

STOP_AT="U2 2" leaves after that step's checkpoint, KILL_AT="U2 2" kills the last process there, once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import train
from plumbing.processes import join_processes, leave_processes
from spar import NAMES, make_config
from tests.conftest import TINY


def tiny_config(changes: dict):
    """TINY with `changes`, in which json has made lists of tuples."""
    return make_config(**TINY | {key: tuple(value) if isinstance(value, list) else value for key,
                                 value in changes.items()})


def main() -> None:
    folder, config = Path(sys.argv[1]), tiny_config(json.loads(sys.argv[2]))
    config.save_minutes = float(os.environ.get("SAVE_MINUTES", 0))
    save_progress = train.save_progress

    def watched(run, stage, step, state):
        save_progress(run, stage, step, state)
        if os.environ.get("STOP_AT") == f"{stage} {step}":
            os._exit(0)
        marker = Path(os.environ.get("KILL_MARKER", ""))
        if os.environ.get("KILL_AT") == f"{stage} {step}" and os.environ["LOCAL_RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train.save_progress = watched
    train.draw_report = lambda *_: "no pictures"  # nothing here is about them
    device = join_processes("cpu", config.shard)
    train.train(config, folder, sys.argv[3].split(",") if sys.argv[3:] else list(NAMES), device)
    leave_processes()


if __name__ == "__main__":
    main()
