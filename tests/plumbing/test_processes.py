"""Several processes compute what one computes, and a stopped stage goes on as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data import Batches
from spar import NAMES
from tests.tools.commands import ROOT
from tests.tools.tiny_run import tiny_config

# AdamW's first steps go by the sign of a gradient, and where it is nearly 0 rounding decides that: so with a small rate
BASE = dict(optimizer="adamw", steps=(4,) * 9, lr=(1e-4,) * 9, gan_start=0.3)


class Left(Exception):
    """A run that ends as if its process had."""


def torchrun(folder: Path, *options: str, stages=NAMES, environment: dict | None = None, processes: int = 2,
             **changes) -> dict[str, list]:
    """The stages of a tiny run by several processes; -> stage -> its losses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={processes}", *options, "-m",
               "tests.tools.tiny_run", str(folder), json.dumps(BASE | changes), ",".join(stages)]
    variables = {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ | variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)


def by_one(folder: Path, stages=NAMES, stop_at: tuple[str, int] | None = None) -> None:
    """The same by this process alone; with `stop_at` it leaves after that step's checkpoint."""
    save = train.save_progress

    def watched(run, stage, step, state):
        save(run, stage, step, state)
        if (stage, step) == stop_at:
            raise Left

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_progress", watched)
        patch.setattr(train, "report_so_far", lambda *_: "no pictures")
        train.train(tiny_config(BASE | {"save_minutes": 0.0 if stop_at else 60.0}), folder, list(stages), "cpu")


def begun(source: Path, folder: Path, name: str) -> Path:
    """A copy of a finished run as it was when `name` began."""
    folder.mkdir(exist_ok=True)
    for path in ("config.json", *(f"{earlier}.pt" for earlier in NAMES[:NAMES.index(name)])):
        shutil.copyfile(source / path, folder / path)
    return folder


def losses(folder: Path) -> dict[str, list]:
    """The last line of each step counts: a step that was done again after a restart was logged again."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {name: list({line["step"]: line["loss"] for line in lines if line["stage"] == name}.values())
            for name in NAMES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    by_one(folder)
    return folder, losses(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["DDP", "FSDP2"])
def two(request, tmp_path_factory):
    """A run by two processes, of which with DDP one is killed once; -> (folder, losses, sharded). A checkpoint of T3 is
    kept."""
    folder, environment = tmp_path_factory.mktemp("two") / "run", {"KEEP_AT": "T3 2"}
    if not request.param:
        environment |= {"KILL_AT": "U2 2", "KILL_MARKER": str(folder.parent / "killed")}
    return folder, torchrun(folder, "--max-restarts=1", environment=environment, shard=request.param), request.param


def test_two_processes_have_the_losses_of_one_in_every_stage(two, alone):
    for name in NAMES:
        assert len(two[1][name]) == 2 and two[1][name] == pytest.approx(alone[1][name], abs=1e-5), name
    a, b = (torch.load(folder / "U3.pt", weights_only=True)["ema"] for folder in (two[0], alone[0]))
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)


def test_torchrun_starts_a_killed_process_again_and_the_losses_go_on(two, alone):
    folder, lines, sharded = two
    assert (folder.parent / "killed").exists() != sharded
    for name in ("U2", "U3"):
        assert len(lines[name]) == 2 and lines[name] == pytest.approx(alone[1][name], abs=1e-5), name


def test_what_two_processes_saved_one_goes_on_with(two, alone, tmp_path):
    begun(two[0], tmp_path, "T3")
    shutil.copytree(two[0] / "kept", tmp_path / "resume")
    assert [path.name for path in sorted((tmp_path / "resume").iterdir())][-1] == "T3-0000002"
    by_one(tmp_path, ["T3"])
    assert losses(tmp_path)["T3"] == pytest.approx(alone[1]["T3"][1:], abs=1e-5)  # its log begins with the third step


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_what_one_process_saved_two_go_on_with(shard, alone, tmp_path):
    begun(alone[0], tmp_path, "T3")
    with pytest.raises(Left):
        by_one(tmp_path, ["T3"], ("T3", 2))
    torchrun(tmp_path, stages=["T3"], shard=shard)
    assert losses(tmp_path)["T3"] == pytest.approx(alone[1]["T3"], abs=1e-5)


def test_four_processes_that_work_in_parts_have_the_losses_of_one(alone, tmp_path):
    begun(alone[0], tmp_path, "T3")
    torchrun(tmp_path, stages=["T3", "U1", "U2"], processes=4, per_device=[1] * 9)
    for name in ("T3", "U1", "U2"):
        assert losses(tmp_path)[name] == pytest.approx(alone[1][name], abs=1e-5), name


@pytest.mark.parametrize("name, step", [("T3", 3), ("U2", 2)])  # in T3's third step the adversary has learned
def test_a_stopped_stage_ends_in_the_same_bits(name, step, alone, tmp_path):
    """As one that was never saved on its way."""
    begun(alone[0], tmp_path, name)
    with pytest.raises(Left):
        by_one(tmp_path, [name], (name, step))
    assert not (tmp_path / f"{name}.pt").exists() and (tmp_path / "resume" / f"{name}-{step:07}").is_dir()
    by_one(tmp_path, [name])
    a, b = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (tmp_path, alone[0]))
    for part in ("weights", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in b[part])


@pytest.mark.parametrize("name", ["P1", "T1", "P3", "U2"])
def test_the_shares_of_several_processes_are_together_the_batch_of_one(name, tiny):
    stage = train.stage_named(name)
    shares = {"edits": 0.5, "captions": 0.5, "outcomes": 0.5}
    whole, *parts = (Batches(tiny(), name, stage.sample, shares, *who)[3] for who in ((0, 1), (0, 2), (1, 2)))
    assert {len(part["images"]) for part in parts} == {4}
    shared = [x.sum().item() for part in parts for x in part["images"]]
    assert sorted(x.sum().item() for x in whole["images"]) == sorted(shared)
    if "noise" in whole:
        for i in range(2):
            drawn = [{tuple(row) for row in batch["noise"][i].unsqueeze(1).flatten(1).tolist()}
                     for batch in (whole, *parts)]
            assert drawn[0] == drawn[1] | drawn[2]


def test_a_batch_that_the_processes_cannot_share_is_told(tiny):
    stage = train.STAGES[0]
    with pytest.raises(ValueError, match="P1 has a batch of 8, which 3 processes cannot share"):
        Batches(tiny(), "P1", stage.sample, {}, 0, 3)


@pytest.mark.parametrize("name", ["P1", "U2"])
def test_workers_make_the_same_batches(name, tiny, tmp_path):
    stage = train.stage_named(name)
    source = Batches(tiny(), name, stage.sample, {"edits": 0.5, "captions": 0.5, "outcomes": 0.5})
    ahead = torch.utils.data.DataLoader(source, batch_size=None, sampler=range(2), num_workers=2)
    for step, batch in enumerate(ahead):
        assert torch.equal(batch["images"], source[step]["images"])
