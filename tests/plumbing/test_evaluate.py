"""Claims about the measures: they equal values computed in other ways, and a run is measured the same twice."""

import hashlib
import inspect
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
import evaluate as evaluate_module
from evaluate import (TABLES, Protocol, asked_alike, drawn_tables, editing, evaluate, evaluation_id, generation,
                      understanding)
from parts.metrics import frechet_distance, mean_interval, psnr, share_interval, ssim
from plumbing import pictures
from plumbing.pictures import draw_report
from plumbing.run_folder import load_run
from spar import NAMES
from tests.tools.commands import call
from world.drawing import draw
from world.language import EDIT_KINDS, MEASURED, QUESTION_KINDS, DrawnWorld, twin


def test_psnr_equals_the_formula_by_hand():
    a = torch.zeros(1, 3, 4, 4)
    b = a.clone()
    b[0, 0, 0, 0] = 0.5  # in [0, 1] an error of 0.25 in one of 48 values
    assert psnr(a, b).item() == pytest.approx(10 * math.log10(1 / (0.25**2 / 48)), abs=1e-4)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    assert psnr(a, b, mask).item() == pytest.approx(10 * math.log10(1 / (0.25**2 / 3)), abs=1e-4)
    assert psnr(a, a).item() == math.inf


def test_ssim_equals_a_loop_over_windows():
    torch.manual_seed(0)
    a = torch.rand(2, 3, 16, 14) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    line = np.exp(-(np.arange(11) - 5) ** 2 / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    wanted = []
    for x, y in zip(((a + 1) / 2).double().numpy(), ((b + 1) / 2).double().numpy()):
        scores = []
        for c in range(3):
            for i in range(16 - 10):
                for j in range(14 - 10):
                    p, q = x[c, i:i + 11, j:j + 11], y[c, i:i + 11, j:j + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    scores.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        wanted.append(np.mean(scores))
    assert ssim(a, b).tolist() == pytest.approx(wanted, abs=1e-8)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_the_interval_of_a_few_values_is_students():
    """Against numpy: of many samples of five values from one normal distribution, 95 % of the intervals hold its
    mean; by the normal quantile 88 % would."""
    rng = np.random.default_rng(0)
    for n in (2, 5, 10):
        drawn = rng.normal(3, 2, (4000, n))
        held = [low <= 3 <= high for low, high in map(mean_interval, torch.from_numpy(drawn))]
        assert np.mean(held) == pytest.approx(0.95, abs=0.011), n


def test_of_several_results_the_mean_of_each_figure_over_runs_is_printed(tmp_path):
    def results(name, overall, **changes):
        content = {"protocol": {"count": 2}, "data": "", "eval_id": name, "seed": 0, "seconds": 1.0,
                   "editing": {"add": 0.5, "overall": overall, "texts": {"add": 7}}} | changes
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    files = [results(f"{i}.json", overall) for i, overall in enumerate((0.7, 0.8, 0.9))]
    done = call("evaluate.py", *files)
    means = done.stdout[done.stdout.index("mean of 3 runs"):]
    half = 4.303 * 0.1 / 3**0.5
    assert re.search(rf"editing +overall +0.800 +{0.8 - half:.3f} to {0.8 + half:.3f}\n", means), means
    assert re.search(r"editing +add +0.500 +0.500 to 0.500\n", means), means
    for change in ({"protocol": {"count": 3}}, {"data": "openmoji"}):
        done = call("evaluate.py", files[0], results("other.json", 0.5, **change))
        assert done.returncode == 2 and "measured by other protocols" in done.stderr


@pytest.mark.parametrize("n, m, d", [(200, 150, 5), (4, 6, 10), (30, 3, 8)])  # the last two: covariances of low rank
def test_the_frechet_distance_equals_the_formula_with_eigenvalues(n, m, d):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, d)) * np.arange(1, d + 1), rng.normal(size=(m, d)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(torch.tensor(a), torch.tensor(a + 2)) == pytest.approx(4 * d, rel=1e-6)


QUICK = Protocol(count=4, steps=2, guidance=1.5, sampler="renoise")


@pytest.fixture(scope="module")
def measured(whole_run, tmp_path_factory):
    """A copy of the whole run with its results; -> (folder, what `evaluate` returned)."""
    run = shutil.copytree(whole_run, tmp_path_factory.mktemp("measured") / "run")
    return run, evaluate(run, QUICK)


def test_a_run_measured_twice_gives_the_same_id_and_figures(measured, tmp_path):
    first, run = measured[1], shutil.copytree(measured[0], tmp_path / "run")
    clock = {"seconds": 0, "normalised_minutes": 0}  # what a run took is no figure of it
    assert {**first, **clock} == {**evaluate(run, QUICK), **clock}
    assert evaluation_id(run, QUICK) == first["eval_id"] != evaluation_id(run, replace(QUICK, guidance=2.5))
    content = torch.load(run / "U3.pt", weights_only=True)
    next(iter(content["ema"].values())).add_(1.0)
    torch.save(content, run / "U3.pt")
    assert evaluation_id(run, QUICK) != first["eval_id"]


def test_a_protocol_that_does_not_say_how_to_draw_draws_as_the_run_does(measured, tmp_path):
    first, run = measured[1], shutil.copytree(measured[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"sampling_steps": 2}
    (run / "config.json").write_text(json.dumps(config))
    again = evaluate(run, Protocol(count=4))
    assert again["protocol"] == first["protocol"] and again["eval_id"] == first["eval_id"]
    assert again["generation_direct"] == first["generation_direct"]


def test_the_samplers_shift_is_part_of_the_protocol_and_of_the_id_where_it_is_not_the_usual(measured, tmp_path):
    """Figures of before there was such a field keep their id, and are compared with today's."""
    first, run = measured[1], shutil.copytree(measured[0], tmp_path / "run")
    assert first["protocol"]["shift"] == 3.0 and first["preset"] == "toy" and first["stages"] == [*NAMES]
    before = {key: value for key, value in first["protocol"].items() if key != "shift"}
    digest = hashlib.sha256(json.dumps([before, "ema"]).encode())
    for path in sorted(run.glob("[PTU][123].pt")):
        for name, value in sorted(torch.load(path, weights_only=True)["ema"].items()):
            digest.update(name.encode() + value.numpy().tobytes())
    assert digest.hexdigest()[:16] == first["eval_id"]
    assert asked_alike(first) == asked_alike(first | {"protocol": before})
    config = json.loads((run / "config.json").read_text()) | {"sampling_shift": 1.0}
    (run / "config.json").write_text(json.dumps(config))
    again = evaluate(run, QUICK, only="generation_direct")
    assert again["protocol"]["shift"] == 1.0 and again["eval_id"] != first["eval_id"]
    assert asked_alike(again) != asked_alike(first)


def test_results_have_every_key_of_the_contract(measured):
    results = json.loads((measured[0] / "results.json").read_text())
    wanted = {"reconstruction": "psnr ssim rfd",
              "understanding": "overall colour shape size place count relation appearance twins before_t3",
              "generation": "overall single two counting colours position binding held_out knowledge",
              "generation_direct": "overall single held_out knowledge", "p3_generation": "overall held_out knowledge",
              "generation_taught": "overall knowledge", "generation_direct_taught": "overall knowledge",
              "p3_generation_direct": "overall held_out knowledge",
              "editing_direct": "overall hybrid preservation_psnr",
              "editing": "overall add adjust extract replace remove background style hybrid action preservation_psnr"}
    assert {"eval_id", "seed", "seconds", "ablation", *wanted} <= set(results)
    for part, keys in wanted.items():
        assert set(keys.split()) <= set(results[part]), part
        for key, (low, high) in results[part]["interval"].items():
            assert low <= results[part][key] + 1e-3 and results[part][key] <= high + 1e-3, (part, key)
        if part != "reconstruction":
            assert set(results[part]["texts"]) <= set(results[part]) and min(results[part]["texts"].values()) >= 1


# ---------------------------------------------------------------- what the drawn world's tables count


class Stub:
    """A model that answers and draws what it is told, and writes down how it was asked."""

    device, tokenizer = torch.device("cpu"), None

    def __init__(self, answers=None, drawn=None):
        self.answers, self.drawn, self.calls, self.rewritten = answers, drawn, [], []

    def answer(self, images, questions):
        return [self.answers(image, question) for image, question in zip(images, questions)]

    def rewrite(self, texts, images=None, seed=0):
        self.rewritten.append((images is not None, seed))
        return [f"{text} written out" for text in texts]

    def generate(self, texts, images, *how):
        self.calls.append((texts, images, how))
        return self.drawn(len(texts), images), None


def test_a_model_that_answers_right_has_one_in_every_kind_and_twins_want_both(tiny):
    world, how, right = DrawnWorld(32, 0, "test"), Protocol(count=6), {}
    for kind in QUESTION_KINDS:
        scenes, *rest = world.questions(range(6), kind)
        right |= {(picture.numpy().tobytes(), question): answer for picture, question, answer
                  in zip(draw(scenes, 32), *rest)}
    scenes = [world.scene(i) for i in range(6)]
    first, second = {}, {}
    for scene, (other, question, answer, its_answer) in [(s, twin(s, world.rng("twin", i))) for i, s in
                                                         enumerate(scenes)]:
        assert answer != its_answer
        first[draw([scene], 32)[0].numpy().tobytes(), question] = answer
        second[draw([other], 32)[0].numpy().tobytes(), question] = its_answer
    for known, twins in ((right | first | second, 1.0), (right | first, 0.0), (right | second, 0.0)):
        model = Stub(answers=lambda image, question: known.get((image.numpy().tobytes(), question), "no idea"))
        table = understanding(model, world, how)
        assert table["twins"] == twins and {table[kind] for kind in (*QUESTION_KINDS, "overall")} == {1.0}
    table = understanding(Stub(answers=lambda image, question: "no idea"), world, how)
    assert {table[kind] for kind in (*QUESTION_KINDS, "overall", "twins")} == {0.0}


@pytest.mark.parametrize("rewrite", [True, False])
@pytest.mark.parametrize("which, text_only, count", [
    ("untaught", False, 6), ("taught", False, 3), ("untaught", True, 3)])
def test_drawing_is_asked_as_the_protocol_says_and_counted_kind_by_kind(rewrite, which, text_only, count, monkeypatch):
    how, world = Protocol(count=6, seed=3, steps=5, guidance=2.5, sampler="dpm"), DrawnWorld(32, 0, "test")
    model, kinds = Stub(drawn=lambda n, images: torch.zeros(n, 3, 32, 32)), [*MEASURED[which]]
    places = iter(range(1000))
    monkeypatch.setattr(evaluate_module, "detect", lambda pictures: [next(places) for _ in pictures])
    monkeypatch.setattr(evaluate_module, "fulfils", lambda place, request: place % count == 0)
    table = generation(model, world, how, rewrite, which, text_only)
    assert [len(texts) for texts, *_ in model.calls] == [count] * len(kinds)
    for kind, (texts, images, asked) in zip(kinds, model.calls):
        plain = [request.text for request in world.measured_prompts(range(count), kind, which)]
        assert texts == ([f"{text} written out" for text in plain] if rewrite else plain)
        assert images is None and asked == (3, 5, 2.5, "dpm", text_only)
        assert table[kind] == pytest.approx(1 / count, abs=1e-4)
    assert model.rewritten == [(False, 3)] * len(kinds) * rewrite
    assert table["overall"] == pytest.approx(1 / count, abs=1e-4)


def test_an_edit_is_right_where_the_target_comes_out_and_preservation_is_of_what_it_leaves_alone():
    how, world = Protocol(count=8, seed=3, steps=5, guidance=2.5, sampler="dpm"), DrawnWorld(32, 0, "test")
    kinds = [*EDIT_KINDS]
    for side, share in (("target", 1.0), ("source", 0.0)):
        model = Stub(drawn=lambda n, images: draw([getattr(e, side) for e in world.edits(range(4), next(turn))], 32))
        for rewrite in (True, False):
            turn = iter(kinds)
            table = editing(model, world, how, rewrite)
            assert {table[kind] for kind in (*EDIT_KINDS, "overall")} == {share}
            assert table["preservation_psnr"] == math.inf
        assert {asked[2] for asked in model.calls} == {(3, 5, 2.5, "dpm")}
        for kind, (texts, images, _) in zip(kinds, model.calls[len(kinds):]):
            edits = world.edits(range(4), kind)
            assert texts == [one.instruction for one in edits]
            assert torch.equal(images, draw([one.source for one in edits], 32))
        assert model.calls[0][0] == [f"{text} written out" for text in model.calls[len(kinds)][0]]
        assert model.rewritten == [(True, 0)] * len(kinds)


def test_each_table_is_of_the_model_and_the_path_that_its_name_says(whole_run, monkeypatch):
    model, before, worlds = load_run(whole_run), load_run(whole_run, upto="P1"), []
    world = evaluate_module.DrawnWorld
    monkeypatch.setattr(evaluate_module, "DrawnWorld", lambda *given: worlds.append(given) or world(*given))
    for name in ("reconstruction", "understanding", "generation", "editing"):
        signature = inspect.signature(getattr(evaluate_module, name))

        def record(*given, signature=signature, **named):
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            return {"overall": bound.arguments}

        monkeypatch.setattr(evaluate_module, name, record)
    tables = drawn_tables(whole_run, model, before, QUICK, [*TABLES])
    found = {name: table["overall"] for name, table in tables.items()}
    assert worlds == [(model.config.side, model.config.seed, "test")] and set(found) == {*TABLES} - {"retrieval"}
    assert tables["understanding"]["before_t3"]["model"] is before
    for name, arguments in found.items():
        early = name.startswith("p3_")
        assert arguments["model"].finished_stages == ["P1", "P2", "P3"] if early else arguments["model"] is model, name
        assert arguments["how"] == QUICK
        if "generation" in name:
            assert arguments["rewrite"] == ("direct" not in name) and arguments["text_only"] == early
            assert arguments["which"] == ("taught" if "taught" in name else "untaught")
        elif "editing" in name:
            assert arguments["rewrite"] == ("direct" not in name)
    assert found["reconstruction"]["before"] is before


def test_the_report_has_its_four_pictures(measured):
    shutil.rmtree(measured[0] / "report", ignore_errors=True)
    assert str(measured[0] / "report" / "summary.png") in draw_report(measured[0])
    names = {path.name for path in (measured[0] / "report").iterdir()}
    assert names == {"summary.png", "losses.png", "streams.png", "routing.png"}


def part_of(whole_run, folder, last):
    """A copy of the whole run as it was after a stage."""
    folder.mkdir()
    for path in ("config.json", "log.jsonl", *(f"{name}.pt" for name in NAMES[:NAMES.index(last) + 1])):
        shutil.copyfile(whole_run / path, folder / path)
    return folder


P3 = {"p3_generation", "p3_generation_direct"}


@pytest.mark.parametrize("last, tables", [
    ("P1", {"understanding"}), ("P2", {"understanding"}), ("P3", {"understanding", *P3}),
    ("T1", {"understanding", "reconstruction", *P3}),
    ("U1", {"understanding", "reconstruction", *P3, *(name for name in TABLES if name.startswith("generation"))})])
def test_of_a_run_with_some_stages_what_is_there_is_measured(last, tables, whole_run, tmp_path):
    run = part_of(whole_run, tmp_path / "run", last)
    done = call("evaluate.py", run, "--count", "4", "--steps", "1")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    *lines, of_the_run, pictures = done.stdout.splitlines()
    assert set(results) & set(TABLES) == tables == {line.split()[0] for line in lines}
    assert of_the_run.startswith("eval_id") and pictures.startswith(f"pictures after {last}: ")
    assert (run / "report" / "summary.png").exists()


def test_only_the_tables_that_are_asked_for_are_measured_and_alike(measured, tmp_path):
    run = shutil.copytree(measured[0], tmp_path / "run")
    results = evaluate(run, QUICK, only="reconstruction,editing_direct")
    assert set(results) & set(TABLES) == {"reconstruction", "editing_direct"}
    for name in ("reconstruction", "editing_direct", "eval_id"):
        assert results[name] == measured[1][name]
    done = call("evaluate.py", run, "--only", "reconstruction,drawing")
    assert done.returncode == 2 and "tables are reconstruction" in done.stderr


@pytest.mark.parametrize("last, titles", [
    ("P1", ["ask"]), ("P2", ["pixel autoencoder", "ask"]), ("T1", ["reconstruct", "ask"]),
    ("U1", ["reconstruct", "ask", "draw"]),
    ("U3", ["reconstruct", "ask", "draw", "edit"])])
def test_the_report_of_a_run_with_some_stages_shows_what_is_there(last, titles, whole_run, tmp_path, monkeypatch):
    sections, sheet = [], pictures.sheet
    monkeypatch.setattr(pictures, "sheet", lambda rows, **options: sections.append(rows) or sheet(rows, **options))
    run = part_of(whole_run, tmp_path / "run", last)
    assert draw_report(run).startswith(f"pictures after {last}: {run / 'report' / 'summary.png'}")
    assert [title.split(":")[0] for title, _ in sections[-1]] == titles


def colours(image) -> set:
    return {colour for _, colour in image.getcolors(1 << 20)}


@pytest.mark.parametrize("right", [True, False, None])
def test_the_words_under_a_picture_are_green_where_it_is_right_and_red_where_it_is_wrong(right):
    image = pictures.sheet([("", [([torch.zeros(3, 8, 8)], "what it shows", right)])])
    wanted = {True: pictures.RIGHT, False: pictures.WRONG, None: pictures.INK}[right]
    assert {pictures.RIGHT, pictures.WRONG, pictures.INK} & colours(image) == {wanted}


def test_what_the_judge_rejects_is_marked_as_wrong(whole_run, monkeypatch):
    verdicts = iter([True, False] * 8)
    monkeypatch.setattr(pictures, "fulfils", lambda objects, request: next(verdicts))
    monkeypatch.setattr(pictures, "succeeds", lambda edit, images: [edit.kind != "remove"])
    rows = {title.split(":")[0]: cells for title, cells in pictures.drawn(load_run(whole_run))[0]}
    assert [right for *_, right in rows["draw"]] == [True, False] * 4
    assert [right for _, words, right in rows["edit"]] == [kind != "remove" for kind in EDIT_KINDS[:8]]


def test_the_first_pictures_are_there_after_p1_and_the_run_says_where(tiny, tmp_path, capsys):
    train.train(tiny(), tmp_path, ["P1"], "cpu")
    assert (tmp_path / "report" / "summary.png").exists() and (tmp_path / "report" / "losses.png").exists()
    assert f"pictures after P1: {tmp_path / 'report' / 'summary.png'}" in capsys.readouterr().out


def test_an_interval_counts_texts_that_are_alike_once():
    spread = [(str(i), i % 4 > 0) for i in range(200)]  # 200 texts: the interval of 200 independent verdicts
    alike = [(str(i % 8), i % 8 < 6) for i in range(200)]  # eight texts, each always right or always wrong
    low, high = share_interval(spread)
    assert 0.68 < low < 0.69 < 0.80 < high < 0.81  # Wilson, n = 200, p = 0.75
    wide = share_interval(alike)
    assert wide[1] - wide[0] > 4 * (high - low)
    assert share_interval([("a", True)] * 50 + [("b", True)] * 50)[0] < 0.4 < 0.96 < share_interval(
        [("a", True)] * 100, pictures=True)[0]
    low, high = mean_interval(torch.arange(100.0))
    assert low == pytest.approx(49.5 - 1.96 * 29.0115 / 10, abs=1e-3) and high == pytest.approx(99 - low, abs=1e-3)
