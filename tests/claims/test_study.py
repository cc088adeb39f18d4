"""The claims study and a class's figures: what is asked, trained and compared, and how a verdict comes about."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exercises import claims, expected, probes
from parts.metrics import STUDENT
from plumbing.command import UserError
from plumbing.flags import parse
from plumbing.run_folder import stage_names, take_over, write_config
from spar import NAMES, Config, make_config
from tests.tools.commands import ROOT
from tests.tools.models import model_of

PUBLISHED = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the claims: what a row asks


@pytest.mark.parametrize("interval, claimed, delta, wanted", [
    ([-2.0, -1.0], -1, 0.5, "holds here"), ([-2.0, 0.1], -1, 0.5, "cannot be told"),
    ([-0.4, -0.2], -1, 0.5, "does not hold here"), ([-0.7, -0.1], -1, 0.5, "cannot be told"),
    ([-0.9, -0.3], -1, 0.5, "holds here"), ([0.3, 0.9], 1, 0.5, "holds here"),  # its mean is δ or more
    ([1.0, 2.0], -1, 0.5, "does not hold here"), ([1.0, 2.0], 1, 0.5, "holds here"), (None, 1, 0.5, "cannot be told")])
def test_the_verdict_follows_the_rule(interval, claimed, delta, wanted):
    assert claims.verdict(interval, claimed, delta) == wanted


@pytest.mark.parametrize("level, freedom, wanted", [(0.95, 1, 12.706), (0.95, 4, 2.776), (0.99, 4, 4.604),
                                                     (0.95, 100, 1.984), (0.998, 4, 7.173)])
def test_quantiles_of_students_t(level, freedom, wanted):
    assert claims.quantile(level, freedom) == pytest.approx(wanted, abs=1e-3)


def test_the_table_of_quantiles_is_students():
    assert STUDENT == pytest.approx([claims.quantile(0.95, n) for n in range(1, len(STUDENT) + 1)], abs=1e-3)


def test_figures_of_seeds_become_rows_and_asking_many_is_paid_for(tmp_path):
    path, asked = tmp_path / "claims.json", sum(len(row.measures) for row in claims.ROWS)
    arms = {row.arm: row for row in claims.ROWS}
    given = {"no_pixel_stream": (-2.0, -2.1, -1.9), "no_T1": (0.4, -0.5, 0.2),  # t: 34.6, and 0.1 and below
             "no_T2": (0.00035, 0.0, 0.0), "no_T3": (0.0, 0.0)}
    for arm, differences in given.items():
        for seed, difference in enumerate(differences):
            claims.keep([{"measure": claims.PSNR, "seed": seed, "value": 30 + difference, "control": 30.0,
                          "eval_id": "x", "machine": {}}], arms[arm], path)
    known = claims.load(path)
    rows = {row["name"]: row for row in known["rows"]}
    first, second, tiny, none = (rows[arm] for arm in given)
    assert first["verdict"] == "holds here" and first["mean"] == -2.0 and second["verdict"] == "cannot be told"
    error, wide = 0.1 / 3**0.5, claims.quantile(1 - 0.05 / asked, 2)
    assert first["interval"] == pytest.approx([-2 - 4.303 * error, -2 + 4.303 * error], abs=1e-3)
    assert first["all_rows"] == pytest.approx([-2 - wide * error, -2 + wide * error], abs=1e-3)
    t = 2 / error
    assert first["p_holm"] == pytest.approx(asked * (1 - t / (2 + t * t)**0.5), abs=1e-4)  # of two degrees of freedom
    assert second["p_holm"] == tiny["p_holm"] == none["p_holm"] == 1 and none["interval"] == [0, 0]
    assert claims.is_known(known, arms["no_T1"], 2) and not claims.is_known(known, arms["no_T1"], 3)
    assert len(claims.table(known).splitlines()) == 6 and claims.draw(known).size[0] > 900


def test_holms_p_never_falls_behind_a_clearer_row_and_counts_the_rows_not_yet_there(tmp_path):
    path, differences = tmp_path / "claims.json", [(-2.0, -2.1, -1.9), (-2.0, -2.1001, -1.8999)]
    for row, values in zip(claims.ROWS, differences):
        for seed, value in enumerate(values):
            claims.keep([{"measure": claims.PSNR, "seed": seed, "value": value, "control": 0.0, "eval_id": "x",
                          "machine": {}}], row, path)
    one, other = (row["p_holm"] for row in claims.load(path)["rows"])
    assert other >= one > 20 * 0.0008


def test_holms_rule_charges_the_clearest_row_for_all_and_the_next_for_one_less_in_whichever_order_they_stand(tmp_path):
    path, asked = tmp_path / "claims.json", sum(len(row.measures) for row in claims.ROWS)
    for row, spread in zip(claims.ROWS, (0.1, 0.05)):
        for seed, more in enumerate((-spread, 0.0, spread)):
            claims.keep([{"measure": claims.PSNR, "seed": seed, "value": 1.0 + more, "control": 0.0, "eval_id": "x",
                          "machine": {}}], row, path)
    second, first = (row["p_holm"] for row in claims.load(path)["rows"])
    p = [1 - t / (2 + t * t) ** 0.5 for t in (3 ** 0.5 / 0.05, 3 ** 0.5 / 0.1)]  # of two degrees of freedom
    assert first == pytest.approx(asked * p[0], abs=6e-5) and second == pytest.approx((asked - 1) * p[1], abs=6e-5)
    assert first > 0 and abs(asked * p[1] - second) > 6e-5


def test_that_an_external_teacher_gains_nothing_is_read_as_it_is_meant(tmp_path):
    row, found = next(row for row in claims.ROWS if row.no_better), {}
    assert row.arm == "external_teacher"
    for about, shift in (("alike", 0.0), ("better", 0.1), ("worse", -0.1)):
        for seed, noise in enumerate((-0.004, 0.0, 0.004)):
            claims.keep([{"measure": claims.DRAWING, "seed": seed, "value": 0.6 + shift + noise, "control": 0.6,
                          "eval_id": "x", "machine": {}}], row, tmp_path / f"{about}.json")
        only, = claims.load(tmp_path / f"{about}.json")["rows"]
        found[about] = only["verdict"], only["no_better"]
    assert found == {"alike": ("does not hold here", "holds here"), "worse": ("holds here", "holds here"),
                     "better": ("does not hold here", "does not hold here")}


CHANGED = {  # arm -> the fields in which it differs from its control
    "no_pixel_stream": {"tokenizer": "semantic-only"}, "no_semantic_stream": {"tokenizer": "pixel-only"},
    "no_semantic_stream_no_anchor": {"tokenizer": "pixel-only", "anchor": False}, "no_anchor": {"anchor": False},
    "no_T3": {"skip_stage": "T3"}, "frozen_T3": {"freeze_encoder": True}, "no_T1": {"skip_stage": "T1"},
    "no_T2": {"skip_stage": "T2"}, "both_with_transformer": {"symmetric": "with"},
    "both_without_transformer": {"symmetric": "without"}, "no_alignment": {"align": "none"},
    "half_of_U2": {"steps": (*Config().steps[:7], Config().steps[7] // 2, Config().steps[8])},
    "last_layer": {"router": "last"}, "external_teacher": {"align": "external", "teacher": "runs/claims/1/teacher"},
    "mean_of_layers": {"router": "mean"}, "static_weights": {"router": "static"}, "concat": {"router": "concat"}}
FIGURES = {"5": "reconstruction,understanding", "6": "generation_direct,editing_direct"}


@pytest.mark.parametrize("row", claims.ROWS, ids=lambda row: row.arm)
def test_an_arm_differs_from_its_control_in_what_it_says_and_in_nothing_else(row):
    *needed, (folder, command) = claims.commands(1, row)
    asked = [(folder, parse(arguments=line.removeprefix("train.py ").split())) for folder, line in needed]
    assert [folder.name for folder, _ in asked] == ["base"] * (1 if row.table == "5" else 2) + (
        ["teacher"] if row.arm == "external_teacher" else [])
    (base, (control, first)), (config, rest) = asked[0], parse(arguments=command.removeprefix("train.py ").split())
    assert rest.out == folder == Path("runs/claims/1") / row.arm and rest.source == base and first.source is None
    assert {key: value for key, value in vars(config).items() if value != vars(control)[key]} == CHANGED[row.arm]
    assert config.seed == control.seed == 1 and rest.only == FIGURES[row.table] and first.only == FIGURES["5"]
    assert rest.stages == ["P1", "P2", "P3", "T1", "T2", "T3", "U1", "U2", "U3"][:6 if row.table == "5" else 9]
    for where, (other, asks) in asked[1:]:
        if where == base:
            assert other == control and asks.only == FIGURES["6"] and len(asks.stages) == 9
        else:
            assert other.seed == 101 and asks.stages == ["P1"] and where == Path(config.teacher)


def test_what_is_asked_is_what_was_published():
    assert len(CHANGED) == len(claims.ROWS) == 17  # sixteen arms and a yardstick
    arms = {row.arm: row for row in claims.ROWS}
    for row in PUBLISHED["rows"]:
        assert (row["measure"], row["claimed"], row["delta"]) in arms[row["name"]].measures
        assert (row["table"], row["about"], row["paper"]) == tuple(
            getattr(arms[row["name"]], key) for key in ("table", "about", "paper"))
    assert claims.summed_up(json.loads(json.dumps(PUBLISHED))) == PUBLISHED
    assert claims.table(PUBLISHED) in (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def test_the_streams_of_both_symmetric_arms_are_what_their_names_say():
    def mixes(symmetric: str) -> list[bool]:
        tokenizer = model_of(make_config(symmetric=symmetric)).tokenizer
        return [any(".attn." in name for name, _ in stream.named_parameters())
                for stream in (tokenizer.semantic_stream, tokenizer.pixel_stream)]

    assert (mixes(""), mixes("with"), mixes("without")) == ([False, True], [True, True], [False, False])


def results_of(folder: Path, name: str = "results.json", **tables) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"eval_id": f"{folder.name} {name}"} | tables))


def test_a_rows_figures_are_the_arms_and_its_controls_own(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "run", lambda *_: None)
    monkeypatch.setattr(claims, "machine_of", lambda threads: {"threads": threads})
    of, arms = tmp_path / "3", {row.arm: row for row in claims.ROWS}
    drawn = [{"generation_direct": {"overall": g}, "editing_direct": {"overall": e}}
             for g, e in ((0.6, 0.8), (0.5, 0.7))]
    tables = [{"reconstruction": {"psnr": p}, "understanding": {"overall": u}} for p, u in ((30.0, 0.99), (28.0, 0.5))]
    results_of(of / "base", "results-T3.json", **tables[0])
    results_of(of / "base", **drawn[0])
    results_of(of / "no_semantic_stream", **tables[1])
    results_of(of / "no_alignment", **drawn[1])
    logs(of / "base", 2.0, 2.0)
    logs(of / "no_alignment", 1.0, 1.6)
    psnr, understanding = claims.finish(3, arms["no_semantic_stream"], 1, tmp_path)
    assert psnr == {"measure": claims.PSNR, "seed": 3, "value": 28.0, "control": 30.0, "machine": {"threads": 1},
                    "eval_id": "no_semantic_stream results.json", "control_eval_id": "base results-T3.json"}
    assert (understanding["value"], understanding["control"]) == (0.5, 0.99)
    drawing, editing, saved = claims.finish(3, arms["no_alignment"], 1, tmp_path)
    assert [(one["value"], one["control"]) for one in (drawing, editing)] == [(0.5, 0.6), (0.7, 0.8)]
    assert drawing["control_eval_id"] == "base results.json" and editing["measure"] == claims.EDITING
    assert saved["value"] == pytest.approx(0.475, abs=0.01) and saved["control"] == 0
    assert saved["seconds"] == pytest.approx(1 - 0.525 * 2.0 / 1.6, abs=0.01)


def test_what_is_measured_is_not_run_again_and_a_base_keeps_its_first_figures(tmp_path, monkeypatch):
    called = []

    def train(command, env, **_):
        called.append((command[1:], env["OMP_NUM_THREADS"]))
        results_of(base, **{"generation_direct" if "editing_direct" in command[-1] else "reconstruction": {}})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(claims.subprocess, "run", train)
    base, first = tmp_path / "base", "train.py --out base --stages P1,T3 --only reconstruction,understanding"
    for _ in range(2):
        claims.run(base, first, 3)
        claims.run(base, "train.py --out base --only generation_direct,editing_direct", 3)
    assert [len(words) for words, _ in called] == [7, 5] and {threads for _, threads in called} == {"3"}
    assert "reconstruction" in json.loads((base / "results-T3.json").read_text())
    assert "generation_direct" in json.loads((base / "results.json").read_text())
    monkeypatch.setattr(claims.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(claims.UserError, match="other.log says why"):
        claims.run(tmp_path / "other", "train.py --only reconstruction", 1)


def test_the_command_prints_each_arms_commands_trained_or_not_and_refuses_what_there_is_not():
    def ask(*words):
        return subprocess.run([sys.executable, "exercises/claims.py", *words], cwd=ROOT, capture_output=True, text=True)

    lines = ask("--seeds", "0,1", "--rows", "no_T2,external_teacher", "--commands", "--jobs", "1").stdout.splitlines()
    assert len(lines) == 10 and len(set(lines)) == 10  # of each seed two of the base, the teacher and two arms
    wanted = [command for row in claims.ROWS if row.arm == "no_T2" for _, command in claims.commands(0, row)]
    assert [line.partition("python ")[2] for line in lines[:2]] == wanted
    assert all(line.startswith("OMP_NUM_THREADS=") for line in lines)
    assert "--rows no_T4: they are no_pixel_stream, " in ask("--rows", "no_T4").stderr
    assert "--seeds 0,1,2" in ask("--seeds", "a").stderr and "--jobs 1 or more" in ask("--jobs", "0").stderr


def logs(run: Path, slope: float, cost: float) -> None:
    """log.jsonl of U2, with other stages around it that log the same loss."""
    run.mkdir(parents=True, exist_ok=True)
    lines = [{"stage": "U2", "step": 10 * i, "L_fm": 10 - slope * i / 100,
              "seconds": cost * i + 9 * max(0, i - 130) * (run.name == "base")} for i in range(201)]  # a neighbour came
    around = [[{"stage": stage, "step": 10 * i, "L_fm": loss, "seconds": 7.0 * i} for i in range(300)]
              for stage, loss in (("P3", 0.1), ("U3", 0.2))]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in around[0] + lines + around[1]))


def test_what_alignment_saves_is_read_from_the_curves(tmp_path):
    logs(tmp_path / "base", 2.0, 2.0)
    logs(tmp_path / "arm", 1.0, 1.6)
    shares = claims.saved(tmp_path / "base", tmp_path / "arm")
    assert shares["steps"] == pytest.approx(0.475, abs=0.01)
    assert shares["seconds"] == pytest.approx(1 - 0.525 * 2.0 / 1.6, abs=0.01)  # its steps are cheaper, so less
    shares = claims.saved(tmp_path / "arm", tmp_path / "base")
    assert shares["steps"] == pytest.approx(-0.9, abs=0.1)  # as much later as the other was sooner


def test_what_alignment_saves_to_draw_alike_lies_on_the_line_between_half_and_all_of_u2():
    def row(name, *differences):
        return {"name": name, "measure": claims.DRAWING,
                "seeds": [{"seed": i, "value": 0.6 + d, "control": 0.6} for i, d in enumerate(differences)]}

    known = {"rows": [row("half_of_U2", -0.2, -0.2, -0.2), row("no_alignment", -0.1, -0.12, -0.08, 9.0)]}
    share = claims.saved_to_do_alike(known, claims.DRAWING)
    assert share == {"share": 0.25, "range": [0.225, 0.275], "seeds": [0, 1, 2]}
    assert claims.saved_to_do_alike(known, claims.EDITING) is None
    worse = {"rows": [row("half_of_U2", 0.1), row("no_alignment", -0.1)]}
    assert claims.saved_to_do_alike(worse, claims.DRAWING) is None
    assert claims.saved_to_do_alike({"rows": [row("no_alignment", -0.1)]}, claims.DRAWING) is None
    uneven = {"rows": [row("half_of_U2", -0.3, -0.1), row("no_alignment", -0.1, -0.1)]}  # of means, not mean of shares
    assert claims.saved_to_do_alike(uneven, claims.DRAWING) == {"share": 0.25, "range": [0.167, 0.5], "seeds": [0, 1]}
    loose = {"rows": [row("half_of_U2", -0.2, 0.1), row("no_alignment", -0.1, -0.1)]}
    assert claims.saved_to_do_alike(loose, claims.DRAWING) == {"share": 1.0, "range": None, "seeds": [0, 1]}
    both = {"rows": [*known["rows"], *[one | {"measure": claims.EDITING, "seeds": one["seeds"][:1]}
                                       for one in known["rows"]]]}
    assert claims.saved_to_do_alike(both, claims.EDITING)["seeds"] == [0]
    rows = [one | {"table": "6", "claimed": -1, "delta": 0.05} for one in both["rows"]]
    told = claims.summed_up({"rows": rows})
    assert told["saved_to_draw_alike"]["seeds"] == [0, 1, 2] and told["saved_to_edit_alike"]["seeds"] == [0]


# ---------------------------------------------------------------- what a class should expect


OF_A_CLASS = {  # arm -> the fields in which it differs from its control
    "lambda_s_0": {"lambda_s": 0.0}, "lambda_s_1": {"lambda_s": 20 * Config().lambda_s},
    "semantic_only": {"tokenizer": "semantic-only"}, "pixel_only": {"tokenizer": "pixel-only"},
    "pixel_only_no_anchor": {"tokenizer": "pixel-only", "anchor": False}, "control": {}, "control_U": {},
    **{arm: CHANGED[arm] for arm in ("frozen_T3", "no_T1", "no_T2", "no_alignment", "last_layer", "mean_of_layers",
                                     "static_weights")}}


@pytest.mark.parametrize("name", expected.ARMS)
def test_every_arm_of_a_class_goes_on_from_the_shared_run_and_differs_from_its_own_control(name, tmp_path):
    *_, lesson = expected.ARMS[name]
    control, asked = parse(arguments=expected.command(lesson.control, 2, Path("runs/class"))[1].split()[1:])
    folder, command = expected.command(name, 2, Path("runs/class"))
    config, rest = parse(arguments=command.split()[1:])
    assert rest.out == folder and rest.source == Path("runs/class") and config.reseed == control.reseed == 2
    assert rest.only == asked.only and config.steps == control.steps
    assert {key: value for key, value in vars(config).items() if value != vars(control)[key]} == OF_A_CLASS[name]
    last = "T3" if lesson is expected.T else "U2"
    assert rest.stages[-1] == last and config.of_stage("steps", last) == (390 if last == "T3" else 400)
    assert sum(a != b for a, b in zip(config.steps, Config().steps)) == 1
    shared = Path(tmp_path / "shared")  # what the arm takes over is all that it needs and does not train
    shared.mkdir()
    for stage in NAMES:
        (shared / f"{stage}.pt").write_bytes(b"")
    write_config(make_config(), shared)
    take_over(config, tmp_path, shared)
    there = {path.stem for path in tmp_path.glob("*.pt")}
    for stage in stage_names(config)[:stage_names(config).index(last) + 1]:
        assert stage in there or stage in rest.stages, stage
    assert last in rest.stages and last not in there


def test_the_published_arms_of_a_class_are_those_that_are_asked_for():
    published = json.loads((ROOT / "results" / "class.json").read_text(encoding="utf-8"))
    assert {name: arm["flags"] for name, arm in published["arms"].items()} == {
        name: expected.ARMS[name][2] for name in published["arms"]}


def test_a_class_is_summed_up_with_its_spread_and_nothing_twice(tmp_path):
    path, shared, given = tmp_path / "class.json", tmp_path / "class", {"reseed": 1}
    shared.mkdir()
    (shared / "P1.pt").write_bytes(b"weights")
    known = expected.load(path)
    expected.is_of(shared, known, path)
    for name, psnr in (("lambda_s_0", 33.0), ("control", 30.0)):
        for pupil, more in ((2, 0.2), (1, -0.2), (2, 0.2)):
            figures = {expected.PSNR: psnr + more, expected.UNDERSTANDING: 0.9}
            expected.keep(known, name, {"reseed": pupil, **figures}, path)
    found = expected.load(path)
    for stage in ("T2", "T1"):  # a stage that comes later belongs to it as well
        expected.is_of(shared, found, path)
        (shared / f"{stage}.pt").write_bytes(b"its weights")
    (shared / "T2.pt").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"another shared run \(T2 differ\)"):
        expected.is_of(shared, found, path)
    assert [*found["arms"]] == ["control", "lambda_s_0"] and len(found["arms"]["control"]["pupils"]) == 2
    head, _, control, other = expected.table(found).splitlines()
    assert "| 2 | 30 ± 0.28 | 0.9 ± 0 |" in control and "33 ± 0.28: higher | 0.9 ± 0" in other
    before = expected.table(known)
    expected.keep(known, "last_layer", given | {expected.DRAWING: 0.5, expected.EDITING: 0.7}, path)
    assert expected.table(known) == before, "nothing to compare it with yet"
    expected.keep(known, "control_U", given | {expected.DRAWING: 0.6, expected.EDITING: 0.8}, path)
    assert "| 1 | 0.5 | 0.7 |" in expected.table(known).splitlines()[-1]
    expected.report(known, path)
    assert path.with_suffix(".png").exists()


def test_a_class_trains_arms_of_its_own_and_takes_no_other_runs_figures_for_them(tmp_path):
    def ask(*words):
        script = str(ROOT / "exercises" / "expected.py")
        return subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)

    assert "error: runs/class is no run" in ask("runs/class").stderr
    (tmp_path / "runs" / "class").mkdir(parents=True)
    (tmp_path / "runs" / "class" / "P1.pt").write_bytes(b"weights")
    lines = ask("runs/class", "--arms", "control", "--commands").stdout.splitlines()
    assert len(lines) == 5 and "--out runs/expected/class/control-1 --reseed 1 " in lines[0]
    published = shutil.copy(ROOT / "results" / "class.json", tmp_path / "published.json")
    assert "another shared run" in ask("runs/class", "--commands", "--results", str(published)).stderr
    told = ask("runs/nowhere", "--report", "--results", str(published)).stdout  # which needs no run
    assert "| 8, 10 | the whole method (`–`) | 5 |" in told and published.with_suffix(".png").exists()


# ---------------------------------------------------------------- probes


def test_a_probe_finds_what_is_linear_and_nothing_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    x, x_test = (torch.randn(n, 12, dtype=torch.float64, generator=generator) for n in (400, 200))
    map_ = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    y, y_test = x @ map_[:, :1] + 5, x_test @ map_[:, :1] + 5
    assert probes.probe(x, y, x_test, y_test, classes=False) > 0.999
    mixed = y[torch.randperm(400, generator=generator)]
    assert abs(probes.probe(x, mixed, x_test, y_test, classes=False)) < 0.1
    kinds, of_test = (torch.nn.functional.one_hot((values @ map_).argmax(1), 3).double() for values in (x, x_test))
    assert probes.probe(x, kinds, x_test, of_test, classes=True) > 0.9
    assert probes.probe(x, kinds[torch.randperm(400, generator=generator)], x_test, of_test, classes=True) < 0.6
    weights, added = probes.ridge(x, y, 0.0)
    assert torch.allclose(weights, map_[:, :1]) and torch.allclose(added, torch.tensor([5.0], dtype=torch.float64))
    assert (probes.ridge(x, y, 1.0)[0].norm() / weights.norm()).item() == pytest.approx(0.5, abs=0.05)  # Var x = 1


def test_probes_learn_from_other_pictures_than_they_are_tested_on_and_read_each_objects_quarter(tiny, monkeypatch):
    splits, model, world = [], model_of(tiny()), probes.DrawnWorld
    monkeypatch.setattr(probes, "DrawnWorld", lambda *given: splits.append(given[-1]) or world(*given))
    monkeypatch.setattr(probes, "load_run", lambda run: model)
    table = probes.probes(Path("run"), 40)
    assert splits == ["probe", "test"] and set(table) == {*probes.CAPTIONED, *probes.UNTOLD}
    assert set(table["shape"]) == {"f_v", "f_v, p axes", "z_s", "z_p", "chance"}
    tokens = torch.arange(16.0)[None, :, None]  # of a 4 by 4 grid
    assert probes.quarters(tokens, 4)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
