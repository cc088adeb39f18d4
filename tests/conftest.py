"""A model small enough that a stage takes a blink, and runs of it that several tests read."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the fused kernels then run on CPU

from benchmarks import yardstick
from spar import NAMES, make_config

yardstick.STEPS = 1  # a reading takes as long as a tiny stage

TINY = dict(
    side=16, patch=2, vision_width=16, vision_layers=2, vision_heads=2, d=32, llm_layers=4, llm_heads=2, llm_kv_heads=1,
    llm_mlp=48, k=4, p=8, pixel_layers=1, pixel_heads=2, stream_blocks=1, ae_widths=(8, 16, 32), ae_depths=(0, 1, 1),
    ae_decoder_depths=(0, 1, 1), queries=16, connector_layers=1, condition_width=24, c=32, dit_layers=2, dit_heads=1,
    dit_cross_heads=2, align_block=1, align_hidden=16, gan_width=8, gan_start=0.0, steps=(2,) * 9, batch=(8,) * 9)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return lambda **changes: make_config(**{**TINY, **changes})


@pytest.fixture
def without_pictures(monkeypatch):
    """For claims about what a run learns: the report takes as long as a tiny stage."""
    import train
    monkeypatch.setattr(train, "report_so_far", lambda *_: "no pictures")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The folder of a run of all nine stages; who changes it copies it first."""
    import train
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.train(make_config(**TINY), folder, list(NAMES), "cpu")
    return folder
