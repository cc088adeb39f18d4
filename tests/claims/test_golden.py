"""The first twenty losses of every stage at toy size. A change that moves them must say so:
`python -m tests.claims.test_golden` writes them anew.

Tolerance: 1 % of each loss, or 0.002. Other processors and versions of torch round otherwise, and twenty steps make
that grow.
"""

import json
from pathlib import Path
from unittest import mock

import pytest

import train
from plumbing.run_folder import build
from spar import NAMES, make_config

FILE = Path(__file__).parent.parent / "golden.json"


def losses(name: str, folder: Path) -> list[float]:
    """Twenty steps from random weights, a checkpoint in none."""
    kept, check = [], train.check_finite

    def watched(now, step, metrics, batch, run):
        kept.append(metrics["loss"])
        check(now, step, metrics, batch, run)

    with mock.patch.object(train, "check_finite", watched):
        train.train_stage(build(make_config(steps=(20,) * 9), "cpu"), train.stage_named(name), folder, keep=False)
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_the_first_twenty_losses_are_the_known_ones(name, tmp_path):
    assert losses(name, tmp_path) == pytest.approx(json.loads(FILE.read_text())[name], rel=0.01, abs=0.002)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: [round(loss, 5) for loss in losses(name, Path(folder))] for name in NAMES}
    FILE.write_text(json.dumps(curves, indent=1).replace("\n  ", " ") + "\n")
