"""The first twenty losses of every stage at toy size. A change that moves them must say so: `python tests/test_golden.py`
writes them anew.

Tolerance: 1 % of each loss, or 0.002. Other processors and versions of torch round otherwise, and twenty steps make that grow.
"""

import json
import sys
from pathlib import Path


import pytest

import train
from spar import NAMES, make_config

FILE = Path(__file__).parent / "golden.json"


def losses(name: str, folder: Path) -> list[float]:
    """Twenty steps from random weights, a checkpoint in none."""
    stage, seen = next(stage for stage in train.STAGES if stage.name == name), []
    config, check = make_config(steps=(20,) * 9), train.check_finite

    def watched(stage, step, values, *rest):
        seen.append(values["loss"])
        check(stage, step, values, *rest)

    train.check_finite = watched
    try:
        train.train_stage(train.build(config, "cpu", folder, []), stage, folder, lambda speed: 0.0, keep=False)
    finally:
        train.check_finite = check
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_the_first_twenty_losses_are_the_known_ones(name, tmp_path):
    assert losses(name, tmp_path) == pytest.approx(json.loads(FILE.read_text())[name], rel=0.01, abs=0.002)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        found = {name: [round(loss, 5) for loss in losses(name, Path(folder))] for name in NAMES}
    FILE.write_text(json.dumps(found, indent=1).replace("\n  ", " ") + "\n")
