"""Claims about the loop that runs the stages: same bits, stopping, what is reused, and what is told in one line."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import train
from plumbing.checkpoints import save
from plumbing.command import UserError
from plumbing.flags import parse
from plumbing.run_folder import check_same_run, load_run, take_over
from spar import NAMES, make_config
from tests.tools.commands import call, subprocess_of
from tests.tools.models import model_of, run_stage, state


def test_not_a_number_stops_before_the_update_and_names_stage_step_and_term(tiny, tmp_path):
    model = model_of(tiny())
    before = state(model)
    stage = train.stage_named("P2")

    def spoiled(*given):
        losses, reconstruction = stage.compute(*given)
        return losses | {"L_z": losses["L_z"] * torch.nan}, reconstruction

    with pytest.raises(UserError, match="P2 step 0: L_z is nan"):
        run_stage(model, replace(stage, compute=spoiled), tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    assert not (tmp_path / "P2.pt").exists()


def test_the_first_picture_is_there_before_the_first_step(tiny, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(), tmp_path, ["P1"], "cpu", None)
    picture = Image.open(tmp_path / "report" / "data.png")
    assert picture.width > 800 and len(picture.getcolors(1 << 20)) > 100


@pytest.mark.usefixtures("without_pictures")
def test_the_same_seed_gives_the_same_bits(tiny, tmp_path):
    results = []
    for attempt in range(2):
        train.train(tiny(), tmp_path / str(attempt), ["P1", "P2", "P3"], "cpu", None)
        results.append(state(load_run(tmp_path / str(attempt))))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    train.train(tiny(seed=1), tmp_path / "other", ["P1"], "cpu", None)
    other = state(load_run(tmp_path / "other"))
    assert not torch.equal(other["mllm.llm.embedding.weight"], results[0]["mllm.llm.embedding.weight"])


@pytest.mark.usefixtures("without_pictures")
def test_the_same_seed_gives_the_same_bits_at_the_toys_own_size_where_threads_share_a_sum(tmp_path):
    for i in range(3):
        train.train(make_config(steps=(2,) * 9), tmp_path / str(i), ["P1"], "cpu", None)
    ends = [torch.load(tmp_path / str(i) / "P1.pt", weights_only=True)["weights"] for i in range(3)]
    assert all(torch.equal(ends[0][key], end[key]) for end in ends[1:] for key in end)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.usefixtures("without_pictures")
def test_a_stage_stopped_between_two_steps_ends_in_the_same_bits(optimizer, tiny, tmp_path, monkeypatch):
    def stopped(run, stage, step, state):
        save(run, stage, step, state)
        raise KeyboardInterrupt

    config, save = tiny(optimizer=optimizer, steps=(4,) * 9, save_minutes=0.0), train.save_progress
    train.train(config, tmp_path / "straight", ["P1"], "cpu", None)
    monkeypatch.setattr(train, "save_progress", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "stopped", ["P1"], "cpu", None)
    monkeypatch.undo()
    train.train(config, tmp_path / "stopped", ["P1"], "cpu", None)
    a, b = (torch.load(tmp_path / name / "P1.pt", weights_only=True) for name in ("straight", "stopped"))
    assert all(torch.equal(a[part][key], b[part][key]) for part in ("weights", "ema") for key in a[part])
    assert len(list((tmp_path / "stopped" / "resume").iterdir())) == 2  # kept until the next stage ends


@pytest.mark.usefixtures("without_pictures")
def test_resume_never_trains_the_named_stages_anew(tiny, tmp_path):
    train.train(tiny(), tmp_path, ["P1", "P2"], "cpu", None)
    before = {name: (tmp_path / f"{name}.pt").stat().st_mtime_ns for name in ("P1", "P2")}
    train.train(tiny(), tmp_path, ["P2"], "cpu", None, resume=False)
    after = {name: (tmp_path / f"{name}.pt").stat().st_mtime_ns for name in ("P1", "P2")}
    assert after["P1"] == before["P1"] and after["P2"] > before["P2"]


def test_a_scale_of_the_steps_is_part_of_the_configuration(tmp_path):
    config, _ = parse(arguments=["--steps-scale", "0.01"])
    assert config.steps == tuple(max(1, round(steps / 100)) for steps in make_config().steps)
    check_same_run(config, tmp_path)
    check_same_run(parse(arguments=["--steps-scale", "0.02"])[0], tmp_path)  # nothing is computed yet
    (tmp_path / "P1.pt").touch()
    with pytest.raises(UserError, match="was begun with steps"):
        check_same_run(config, tmp_path)


def test_a_number_of_some_stages_alone_is_given_by_their_names():
    config, usual = parse(arguments=["--steps", "T3=390,U2=400", "--lr", "P1=0.5"])[0], make_config()
    assert config.steps == (*usual.steps[:5], 390, usual.steps[6], 400, usual.steps[8])
    assert config.lr == (0.5, *usual.lr[1:]) and config.batch == usual.batch
    assert parse(arguments=["--edits", "0.25"])[0].edits == (0.0,) * 7 + (0.25,) * 2  # whoever draws alone never edits
    for wrong in ("T4=3", "T3=3,4"):
        with pytest.raises(UserError):
            parse(arguments=["--steps", wrong])
    with pytest.raises(UserError, match="NAME=NUMBER is for"):
        parse(arguments=["--ae-widths", "T3=3"])


def test_finished_stages_are_skipped_and_a_missing_predecessor_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match="P3 needs P1"):
        train.train(tiny(), tmp_path / "gap", ["P3"], "cpu", None)
    train.train(tiny(), tmp_path / "run", ["P1"], "cpu", None)
    stamp = (tmp_path / "run" / "P1.pt").stat().st_mtime_ns
    train.train(tiny(), tmp_path / "run", ["P1", "P2"], "cpu", None)
    assert (tmp_path / "run" / "P1.pt").stat().st_mtime_ns == stamp and (tmp_path / "run" / "P2.pt").exists()


@pytest.mark.parametrize("change, kept", [
    ({"router": "last"}, "P1 P2 T1 T2 T3"), ({"router": "concat"}, "P1 P2 P3 T1 T2 T3"),
    ({"align": "none"}, "P1 P2 P3 T1 T2 T3 U1"), ({"anchor": False}, "P1 P2 P3 T1 T2"),
    ({"tokenizer": "pixel-only"}, "P1 P2 P3"), ({"skip_stage": "T2"}, "P1 P2 P3 T1"),
    ({"steps": (2,) * 7 + (3, 2)}, "P1 P2 P3 T1 T2 T3 U1"), ({"steps": (2, 2, 3) + (2,) * 6}, "P1 P2 T1 T2 T3"),
    ({"steps": (3,) + (2,) * 8}, "P2"), ({"steps": (2, 3) + (2,) * 7}, "P1"),
    ({"reseed": 5}, " ".join(NAMES)), ({"d": 64, "llm_mlp": 64}, "")])
def test_stages_that_a_change_does_not_touch_nor_any_that_they_build_on_are_reused(change, kept, tiny, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    check_same_run(tiny(), (source.mkdir(), source)[1])
    for name in NAMES:
        (source / f"{name}.pt").write_bytes(b"-")
    run.mkdir()
    take_over(tiny(**change), run, source)
    assert {path.stem for path in run.glob("*.pt")} == set(kept.split())


@pytest.mark.parametrize("k, said", [(3, 1), (4, 0)])
def test_a_run_that_starts_says_once_that_its_layers_are_uneven(k, said, tiny, tmp_path, capsys):
    train.train(tiny(k=k), tmp_path, [], "cpu", None)
    assert capsys.readouterr().out.count("layers [1, 2, 4], an uneven menu") == said


def test_averaged_weights_are_what_a_run_loads(tiny, tmp_path):
    train.train(tiny(), tmp_path, ["P1"], "cpu", None)
    content = torch.load(tmp_path / "P1.pt", weights_only=True)
    key = "mllm.llm.embedding.weight"
    assert torch.equal(state(load_run(tmp_path))[key], content["ema"][key])
    torch.manual_seed(0)
    start = state(model_of(tiny()))[key]
    assert not any(torch.equal(content["ema"][key], other) for other in (start, content["weights"][key]))


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    path = tmp_path / "P1.pt"
    save(path, {"old": 1})

    def full(content, beside):
        beside.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="P1.pt: PytorchStreamWriter failed"):
        save(path, {"new": 2})
    assert torch.load(path, weights_only=True) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["P1.pt"]


@pytest.mark.parametrize("arguments, words", [
    ("train.py --stepps-scale 1", "did you mean --steps-scale"), ("train.py --router lst", "invalid choice"),
    ("train.py --stages P1,P9", "unknown stage 'P9'"), ("train.py --stages T1 --out {tmp}/run", "needs P1"),
    ("evaluate.py {tmp}/none", "no run in"), ("sample.py generate a --run {tmp}/none", "no run in"),
    ("sample.py edit blue", "--image"), ("sample.py generate", "needs words"),
    ("train.py --from {tmp}/none --out {tmp}/new", "no run in"),
    ("train.py --steps 1,2 --out {tmp}/new", "takes one number, or 9"),
    ("train.py --align external --out {tmp}/new", "--teacher RUN"),
    ("train.py --sampling-steps 0 --out {tmp}/new", "sampling_steps is 0: at least 1"),
    ("train.py --drop-words 2 --out {tmp}/new", "drop_words is 2.0: at least 0, at most 1"),
    ("train.py --steps T3=0 --out {tmp}/new", "steps is 0"),
    ("train.py --clip 0 --out {tmp}/new", "clip is 0.0: above 0"),
    ("train.py --lr nan --out {tmp}/new", "a finite number"), ("train.py --betas 0.9 --out {tmp}/new", "2 are wanted"),
    ("train.py --steps-scale 0 --out {tmp}/new", "above 0"),
    ("sample.py generate two green circles", "in quotes"), ("evaluate.py {tmp}/none --count 1", "at least 2"),
    ("train.py --plan --queries 15", "square grid"), ("sample.py generate circle --image x.png", "edit --image")])
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, words, tmp_path):
    done = call(*arguments.format(tmp=tmp_path).split())
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script, arguments, words", [
    ("train.py", ["--stepps-scale", "1"], "did you mean --steps-scale"), ("evaluate.py", ["none"], "no run in"),
    ("sample.py", ["ask", "?", "--image", "x.png", "--run", "none"], "no run in")])
def test_a_commands_own_process_ends_in_that_one_line_too(script, arguments, words, tmp_path):
    done = subprocess_of(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
