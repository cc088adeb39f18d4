"""Claims about the nine stages and the loop that runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import losses
import train
from plumbing.command import UserError
from plumbing.run_folder import load_run
from spar import NAMES, SPAR, make_config
from world.drawing import FACT_WORDS, Object

ROOT = Path(__file__).parent.parent
TRAINS = {  # README and paper: what each stage trains, as name prefixes
    "P1": ("tokenizer.vision", "mllm.llm"), "P2": ("pixel_encoder", "tokenizer.decoder"), "P3": ("dit", "mllm.connector"),
    "T1": ("tokenizer.semantic_stream", "tokenizer.pixel_stream", "tokenizer.fusion"),
    "T2": ("tokenizer.semantic_stream", "tokenizer.pixel_stream", "tokenizer.fusion", "tokenizer.decoder"),
    "T3": ("tokenizer",), "U1": ("mllm.queries", "mllm.router", "mllm.connector"),
    "U2": ("mllm.queries", "mllm.router", "mllm.connector", "dit", "align_head"),
    "U3": ("mllm.queries", "mllm.router", "mllm.connector", "dit", "align_head")}


def run_stage(model: SPAR, name: str, folder: Path) -> list[dict]:
    stage = next(stage for stage in train.STAGES if stage.name == name)
    train.train_stage(model, stage, folder, lambda speed: 0.0)
    return [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if line["stage"] == name]


def state(model: SPAR) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_listed_modules_train(name, tiny, tmp_path):
    model = model_of(tiny())
    before = state(model)
    if name == "P3":  # its start copies LLM layers into the connector; only training is of interest here
        model.mllm.connector.copy_layers(model.mllm.llm)
        before = state(model)
    run_stage(model, name, tmp_path)
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    listed = {key for key in before if any(key == prefix or key.startswith(prefix + ".") for prefix in TRAINS[name])}
    assert moved <= listed, f"moved though frozen: {sorted(moved - listed)}"
    for prefix in TRAINS[name]:
        assert any(key.startswith(prefix) for key in moved), f"{prefix} did not move"


def test_with_a_frozen_encoder_t3_leaves_it_alone_to_the_bit(tiny, tmp_path):
    model = model_of(tiny(freeze_encoder=True))
    before = state(model)
    run_stage(model, "T3", tmp_path)
    after = state(model)
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("tokenizer.vision"))
    assert not torch.equal(after["tokenizer.decoder.out.conv.weight"], before["tokenizer.decoder.out.conv.weight"])


@pytest.mark.parametrize("name, field, symbol", [
    ("T1", "lambda_lpips", "L_lpips"), ("T1", "lambda_p", "L_p"), ("T3", "lambda_s", "L_s"), ("T3", "lambda_gan", "L_gan"),
    ("U2", "lambda_a", "L_align"), ("P2", "lambda_z", "L_z"), ("T2", "lambda_f", "L_f")])
def test_a_term_with_weight_zero_leaves_no_trace(name, field, symbol, tiny, tmp_path):
    logs = {}
    for weight in (0.0, 0.5):
        folder = tmp_path / str(weight)
        folder.mkdir()
        torch.manual_seed(0)
        model = model_of(tiny(**{field: weight}))
        logs[weight] = run_stage(model, name, folder), state(model)
    assert symbol not in logs[0.0][0][-1] and symbol in logs[0.5][0][-1]
    assert any(not torch.equal(a, b) for a, b in zip(logs[0.0][1].values(), logs[0.5][1].values()))


def test_the_teachers_get_no_gradient(tiny, tmp_path):
    seen = []
    compute = losses.tokenizer_losses

    def watched(model, batch, wanted, h):
        seen.append(h)
        return compute(model, batch, wanted, h)

    stage = next(stage for stage in train.STAGES if stage.name == "T3")
    model = model_of(tiny())
    train.train_stage(model, train.Stage(**{**vars(stage), "compute": watched}), tmp_path, lambda speed: 0.0)
    for teacher in (seen[0].teacher, seen[0].perceptual):
        assert teacher is not None
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_thing_is_named_by_the_visual_tokens_of_its_quarter_and_by_no_others(tiny):
    model = model_of(tiny())
    thing = Object("cross", "blue", "small", 1)
    words = [model.words.ids[thing.word(fact)] for fact in FACT_WORDS]
    with torch.no_grad():
        said = 100 * torch.nn.functional.normalize(model.mllm.llm.embedding.weight, dim=1)[words].sum(0)
    right = torch.tensor([[options.index(thing.word(fact)) for fact, options in FACT_WORDS.items()]])
    found = []
    for place in range(4):
        f_v = torch.zeros(1, 4, 4, len(said))
        f_v[:, place // 2 * 2:place // 2 * 2 + 2, place % 2 * 2:place % 2 * 2 + 2] = said
        things = torch.tensor([0]), torch.tensor([thing.place]), right
        found.append(losses.naming_loss(f_v.flatten(1, 2), things, model).item())
    assert found[1] < 0.2 * min(found[0], *found[2:])


def test_not_a_number_stops_before_the_update_and_names_stage_step_and_term(tiny, tmp_path):
    model = model_of(tiny())
    before = state(model)
    stage = next(stage for stage in train.STAGES if stage.name == "P2")
    bad = train.Stage(**{**vars(stage), "compute": lambda *given: {
        key: value * torch.nan if key == "L_z" else value for key, value in stage.compute(*given).items()}})
    with pytest.raises(UserError, match="P2 step 0: L_z is nan"):
        train.train_stage(model, bad, tmp_path, lambda speed: 0.0)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    assert not (tmp_path / "P2.pt").exists()


def test_the_same_seed_gives_the_same_bits(tiny, tmp_path):
    results = []
    for attempt in range(2):
        train.train(tiny(), tmp_path / str(attempt), ["P1", "P2", "P3"], "cpu", None)
        results.append(state(load_run(tmp_path / str(attempt))))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    train.train(tiny(seed=1), tmp_path / "other", ["P1"], "cpu", None)
    other = state(load_run(tmp_path / "other"))
    assert not torch.equal(other["mllm.llm.embedding.weight"], results[0]["mllm.llm.embedding.weight"])


def test_the_same_seed_gives_the_same_bits_at_the_toys_own_size_where_threads_share_a_sum(tmp_path):
    for i in range(3):
        train.train(make_config(steps=(2,) * 9), tmp_path / str(i), ["P1"], "cpu", None)
    ends = [torch.load(tmp_path / str(i) / "P1.pt", weights_only=True)["weights"] for i in range(3)]
    assert all(torch.equal(ends[0][key], end[key]) for end in ends[1:] for key in end)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
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


def test_resume_never_trains_the_named_stages_anew(tiny, tmp_path):
    train.train(tiny(), tmp_path, ["P1", "P2"], "cpu", None)
    before = {name: (tmp_path / f"{name}.pt").stat().st_mtime_ns for name in ("P1", "P2")}
    train.train(tiny(), tmp_path, ["P2"], "cpu", None, resume=False)
    after = {name: (tmp_path / f"{name}.pt").stat().st_mtime_ns for name in ("P1", "P2")}
    assert after["P1"] == before["P1"] and after["P2"] > before["P2"]


def test_a_scale_of_the_steps_is_part_of_the_configuration(tmp_path):
    config, _ = train.parse(["--steps-scale", "0.01"])
    assert config.steps == tuple(max(1, round(steps / 100)) for steps in make_config().steps)
    train.check_same_run(config, tmp_path)
    with pytest.raises(UserError, match="was begun with steps"):
        train.check_same_run(train.parse([])[0], tmp_path)


def test_finished_stages_are_skipped_and_a_missing_predecessor_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match="P3 needs P1"):
        train.train(tiny(), tmp_path / "gap", ["P3"], "cpu", None)
    train.train(tiny(), tmp_path / "run", ["P1"], "cpu", None)
    stamp = (tmp_path / "run" / "P1.pt").stat().st_mtime_ns
    train.train(tiny(), tmp_path / "run", ["P1", "P2"], "cpu", None)
    assert (tmp_path / "run" / "P1.pt").stat().st_mtime_ns == stamp and (tmp_path / "run" / "P2.pt").exists()


@pytest.mark.parametrize("change, first", [({"fusion": "last"}, "U1"), ({"align": "none"}, "U2"), ({"anchor": False}, "T3"),
                                           ({"tokenizer": "pixel-only"}, "T1"), ({"skip_stage": "T2"}, "T2"),
                                           ({"steps": (2,) * 7 + (3, 2)}, "U2"), ({"d": 64, "llm_mlp": 64}, "P1")])
def test_only_stages_before_the_changed_one_are_reused(change, first, tiny, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    train.check_same_run(tiny(), (source.mkdir(), source)[1])
    for name in NAMES:
        (source / f"{name}.pt").write_bytes(b"-")
    run.mkdir()
    train.take_over(tiny(**change), run, source)
    assert {path.stem for path in run.glob("*.pt")} == set(NAMES[:NAMES.index(first)])


def test_every_ablation_trains_and_differs_from_the_standard(tiny, tmp_path):
    def end(**change):
        torch.manual_seed(0)
        model = model_of(tiny(**change))
        folder = tmp_path / "-".join(change)
        folder.mkdir(exist_ok=True)
        for name in ("T1", "T3", "U1", "U2"):
            run_stage(model, name, folder)
        return state(model)

    teacher = tmp_path / "teacher"
    teacher.mkdir()
    torch.manual_seed(5)
    run_stage(model_of(tiny()), "P1", teacher)
    standard = end()
    for change in ({"tokenizer": "semantic-only"}, {"tokenizer": "pixel-only"}, {"anchor": False}, {"freeze_encoder": True},
                   {"align": "none"}, {"fusion": "last"}, {"fusion": "mean"}, {"fusion": "concat"}, {"fusion": "static"},
                   {"symmetric": "with"}, {"symmetric": "without"}, {"reference": "tokens"},
                   {"align": "external", "teacher": str(teacher)}):
        other = end(**change)
        same = [key for key in standard if key in other and torch.equal(standard[key], other[key])]
        assert len(same) < len(standard), f"{change} changed nothing"
        assert set(other) != set(standard) or any(not torch.equal(standard[key], other[key]) for key in standard), change


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
    train.save(path, {"old": 1})

    def full(content, beside):
        beside.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="P1.pt: PytorchStreamWriter failed"):
        train.save(path, {"new": 2})
    assert torch.load(path, weights_only=True) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["P1.pt"]


def test_the_schedule_warms_up_and_ends_where_it_says():
    rates = [train.schedule(step, 100, 0.1, 0.05) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.05, abs=0.01) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("arguments, words", [
    ("train.py --stepps-scale 1", "did you mean --steps-scale"), ("train.py --fusion lst", "invalid choice"),
    ("train.py --stages P1,P9", "unknown stage 'P9'"), ("train.py --stages T1 --out {tmp}/run", "needs P1"),
    ("evaluate.py {tmp}/none", "no run in"), ("sample.py generate a --run {tmp}/none", "no run in"),
    ("sample.py edit blue", "--image"), ("sample.py generate", "needs words"), ("train.py --from {tmp}/none --out {tmp}/new", "no run in"),
    ("train.py --steps 1,2 --out {tmp}/new", "takes 9 numbers"), ("train.py --align external --out {tmp}/new", "--teacher RUN"),
    ("sample.py generate two green circles", "in quotes"), ("evaluate.py {tmp}/none --count 1", "at least 2"),
    ("train.py --plan --queries 15", "square grid"), ("sample.py generate circle --image x.png", "edit --image")])
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, words, tmp_path):
    command = [sys.executable, *arguments.format(tmp=tmp_path).split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "new").exists()
