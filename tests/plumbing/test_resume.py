"""Claims about runs that cannot be lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from diffusion import Noise
from parts.words import Turns
from plumbing import checkpoints
from plumbing.checkpoints import saved_progress
from plumbing.command import UserError
from plumbing.replay import replay
from plumbing.run_folder import load_run
from spar import NAMES, make_config
from tests.conftest import TINY
from tests.tools.commands import ROOT
from tests.tools.torture import same

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.mark.parametrize("kills, workers", [(6, 0), (2, 2)])
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(kills, workers, tmp_path):
    seed, steps = (1, 3) if workers else (0, 4)
    script = ("import pathlib, train; from tests.tools.torture import torture; train.report_so_far = lambda *_: ''; "
              f"print(torture({kills}, {workers}, {seed}, pathlib.Path({str(tmp_path)!r}), {steps}))")
    command = [sys.executable, "-c", script]  # a process that has no threads yet
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    n, lost, runs, other = eval(done.stdout.splitlines()[-1])
    assert n >= kills and runs >= 1 and lost == 0 and other == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_and_leaves_and_the_same_command_goes_on(number, tmp_path):
    changes = json.dumps({"steps": [400] * 9, "save_minutes": 60.0})
    command = [sys.executable, "-m", "tests.tools.tiny_run", str(tmp_path / "run"), changes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                             cwd=ROOT)
    log = tmp_path / "run" / "log.jsonl"
    while child.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.05)
    child.send_signal(number)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "P1 is saved after step" in said and "the same command goes on" in said
    saved = saved_progress(tmp_path / "run", "P1")
    assert len(saved) == 1 and f"after step {int(saved[0].name[3:])} of" in said


def test_a_second_signal_leaves_at_once(tmp_path):
    code = ("import os, signal\nfrom plumbing.processes import Stop\nwith Stop():\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n    print('going on', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n    print('never', flush=True)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGINT and done.stdout == "going on\n" and "Traceback" not in done.stderr


def stopped(config, run: Path, monkeypatch, at: int) -> None:
    """A run of P1 that ends after the checkpoint of step `at`."""
    save = train.save_progress

    def until(run, stage, step, state, *where):
        save(run, stage, step, state, *where)
        if step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_progress", until)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, run, ["P1"], "cpu", None)


def spoil(kind: str, folder: Path, other: Path) -> None:
    data = next(folder.glob("*.distcp"))
    if kind == "cut short":
        data.write_bytes(data.read_bytes()[:-100])
    elif kind == "one bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif kind == "empty":
        data.write_bytes(b"")
    elif kind == "no description":
        (folder / ".metadata").unlink()
    elif kind == "no sums":
        (folder / "sums.json").unlink()
    elif kind == "another model's":
        shutil.rmtree(folder)
        shutil.copytree(other, folder)


SIX = TINY | dict(steps=(6,) * 9, save_minutes=0.0)


@pytest.fixture(scope="module")
def runs_of_p1(tmp_path_factory):
    """One that went through, one stopped after step 4, and one of another model stopped there too."""
    home = tmp_path_factory.mktemp("p1")
    train.train(make_config(**SIX), home / "straight", ["P1"], "cpu")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stopped(make_config(**SIX), home / "run", monkeypatch, 4)
        stopped(make_config(**SIX | dict(d=16, llm_mlp=16)), home / "other", monkeypatch, 4)
    return home


@pytest.mark.parametrize("kind", ["cut short", "one bit", "empty", "no description", "no sums", "another model's"])
def test_a_broken_checkpoint_is_told_and_the_one_before_it_used(kind, runs_of_p1, tmp_path, capsys):
    run = shutil.copytree(runs_of_p1 / "run", tmp_path / "run")
    saved = saved_progress(run, "P1")
    assert [int(path.name[3:]) for path in saved] == [3, 4]
    spoil(kind, saved[-1], saved_progress(runs_of_p1 / "other", "P1")[-1])
    capsys.readouterr()
    train.train(make_config(**SIX), run, ["P1"], "cpu")
    told = capsys.readouterr().out
    assert str(saved[-1]) in told and "going on from the one before it" in told
    a, b = (torch.load(folder / "P1.pt", weights_only=True) for folder in (runs_of_p1 / "straight", run))
    assert same({key: a[key] for key in ("weights", "ema", "optimizer")},
                {key: b[key] for key in ("weights", "ema", "optimizer")})


def test_a_broken_stage_file_is_told_and_its_stage_trained_again_from_its_last_progress(tiny, tmp_path, capsys):
    config = tiny(steps=(5,) * 9, save_minutes=0.0)
    train.train(config, tmp_path, ["P1", "P2"], "cpu", None)
    before = torch.load(tmp_path / "P2.pt", weights_only=True)
    content = bytearray((tmp_path / "P2.pt").read_bytes())
    middle = len(content) // 2
    part = slice(middle, middle + 300)  # one byte might be padding
    content[part] = bytes(byte ^ 255 for byte in content[part])
    (tmp_path / "P2.pt").write_bytes(content)
    with_log = (tmp_path / "log.jsonl").read_text().count('"P2"')
    capsys.readouterr()
    train.train(config, tmp_path, ["P1", "P2"], "cpu", None)
    assert "P2.pt is broken" in capsys.readouterr().out
    after = torch.load(tmp_path / "P2.pt", weights_only=True)
    assert same(before["weights"], after["weights"]) and (tmp_path / "log.jsonl").read_text().count('"P2"') == with_log


def test_a_full_disk_while_saving_progress_leaves_the_last_good_state(tiny, tmp_path, monkeypatch):
    config = tiny(steps=(6,) * 9, save_minutes=0.0)
    stopped(config, tmp_path, monkeypatch, 3)
    good = saved_progress(tmp_path, "P1")

    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.checkpoints, "save", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        train.train(config, tmp_path, ["P1"], "cpu", None)
    assert saved_progress(tmp_path, "P1") == good
    monkeypatch.undo()
    train.train(config, tmp_path, ["P1"], "cpu", None)


def shown_again(folder: Path) -> str:
    return replay(folder, "cpu", train.STAGES, train.training_of, train.one_step, {"Noise": Noise, "Turns": Turns})


@pytest.mark.parametrize("name, symbol", [("P1", "L_lm"), ("T3", "L_mse"), ("U2", "L_fm")])
def test_a_step_that_is_not_finite_is_kept_and_shown_again(name, symbol, tiny, whole_run, tmp_path, monkeypatch):
    config, begin = tiny(), train.begin
    for path in ("config.json", *(f"{earlier}.pt" for earlier in NAMES[:NAMES.index(name)])):
        shutil.copyfile(whole_run / path, tmp_path / path)

    def spoiled(module):
        now = begin(module)
        if module.stage.name == name:
            next(iter(now.weights.values())).data.view(-1)[0] = torch.nan
        return now

    with monkeypatch.context() as patched:
        patched.setattr(train, "begin", spoiled)
        with pytest.raises(UserError, match=f"{name} step 0: .* is nan.*--replay"):
            train.train(config, tmp_path, [name], "cpu", None)
    told = shown_again(tmp_path / "replay")
    assert f"{name} step 0" in told and "weights not finite: 1" in told and "then nan" in told and "now nan" in told
    line = next(line for line in told.splitlines() if line.startswith("loss"))
    assert line.split()[2] == line.split()[4]
    with pytest.raises(UserError, match="holds no step"):
        shown_again(tmp_path)


def test_a_log_is_cut_to_the_step_that_a_run_goes_on_from(tiny, tmp_path, monkeypatch):
    config = tiny(steps=(25,) * 9, save_minutes=0.0)
    stopped(config, tmp_path / "run", monkeypatch, 15)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"stage": "P1", "step": 20, "loss": 99}\n{"stage": "P1", "st')  # after the last save, then torn
    train.train(config, tmp_path / "run", ["P1"], "cpu", None)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 10, 20, 24]
    assert load_run(tmp_path / "run").finished_stages == ["P1"]


def test_a_checkpoint_may_have_been_written_on_any_system_and_looked_into(tmp_path):
    for kind in ("Path", "PosixPath", "WindowsPath"):  # torch writes where it was saved; Python 3.13 says it otherwise
        assert {("pathlib", kind), ("pathlib._local", kind)} <= checkpoints.HARMLESS
    assert ("pathlib", "os") not in checkpoints.HARMLESS
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    known = checkpoints.sums(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"Finder")
    assert checkpoints.sums(tmp_path) == known and len(known) == 1
