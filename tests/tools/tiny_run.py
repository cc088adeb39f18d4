"""A tiny run of all nine stages for the tests of several processes: `tiny_run.py FOLDER '{"field": value}'`.

STOP_AT="U2 2" leaves after that step's checkpoint, KILL_AT="U2 2" kills the last process there, once.
"""

import json
import os
import signal
import sys
from pathlib import Path


import train
from tests.conftest import TINY
from spar import NAMES, make_config

folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
config = make_config(**TINY | {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()} |
                     {"save_minutes": float(os.environ.get("SAVE_MINUTES", 0))})
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
device = train.join_processes("cpu", config.shard)
train.train(config, folder, list(NAMES), device, None)
train.leave_processes()
