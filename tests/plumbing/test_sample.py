"""Claims about use: each command does its work, and wrong input ends in one line with nothing written."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from plumbing import pictures
from plumbing.run_folder import load_config, load_run
from sample import read_picture
from tests.tools.commands import Ended, call, subprocess_of


@pytest.fixture(scope="module")
def run(whole_run, tmp_path_factory):
    folder = shutil.copytree(whole_run, tmp_path_factory.mktemp("sample") / "run")
    Image.new("RGB", (16, 16), "white").save(folder / "exact.png")
    Image.new("RGB", (50, 30), "white").save(folder / "other.png")
    (folder / "text.png").write_text("no picture")
    return folder


def sample(run: Path, *arguments: str) -> Ended:
    return call("sample.py", *arguments, "--run", run)


@pytest.mark.parametrize("arguments", [
    ("generate", "a red circle"), ("edit", "--image", "{exact}", "make the red circle blue"),
    ("reconstruct", "--image", "{exact}"), ("streams", "--image", "{exact}"), ("route", "two green circles"),
    ("generate", "a red circle", "--count", "3", "--sampler", "euler", "--steps", "4")])
def test_every_use_writes_its_picture(arguments, run, tmp_path):
    arguments = [a.format(exact=run / "exact.png") for a in arguments]
    done = sample(run, *arguments, "--out", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    width = Image.open(tmp_path / "out.png").size[0]
    assert width == 3 * 16 if "--count" in arguments else width >= 16


def test_a_process_of_its_own_draws_the_same_picture(run, tmp_path):
    options = "generate", "a red circle", "--run", run, "--out"
    done = subprocess_of("sample.py", *options, tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert call("sample.py", *options, tmp_path / "b.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_ask_prints_an_answer_and_a_picture_of_another_size_is_resized_and_said(run):
    done = sample(run, "ask", "--image", str(run / "other.png"), "how many objects are there ?")
    assert done.returncode == 0 and "resized from 50×30 to 16×16" in done.stdout
    model, picture = load_run(run), read_picture(run / "other.png", 16)
    assert done.stdout.splitlines()[-1] == model.answer(picture, ["how many objects are there ?"])[0]


@pytest.fixture(scope="module")
def plain_picture(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.png"
    assert sample(run, "generate", "a red circle", "--out", str(path)).returncode == 0
    return path.read_bytes()


@pytest.mark.parametrize("flag", [
    ("--seed", "1"), ("--guidance", "9"), ("--steps", "2"), ("--sampler", "euler"), ("--no-rewrite",)])
def test_every_option_changes_the_picture(flag, run, plain_picture, tmp_path):
    assert sample(run, "generate", "a red circle", "--out", str(tmp_path / "other.png"), *flag).returncode == 0
    assert (tmp_path / "other.png").read_bytes() != plain_picture


@pytest.mark.parametrize("arguments, words", [
    (("generate", ""), "needs words"), (("generate", "a red zebra"), "'zebra' (nearest:"),
    (("ask", "what is it ?", "--image", "{run}/text.png"), "no png, jpg or webp inside"),
    (("ask", "what is it ?", "--image", "{run}/none.png"), "No such file"),
    (("reconstruct", "--image", "{run}"), "Is a directory"), (("edit", "remove it"), "--image"),
    (("generate", "a circle", "--out", "x.txt"), ".png"), (("export", "--out", "x.pt"), ".safetensors"),
    (("page", "--seed", "1"), "page does not read --seed"), (("page", "a circle"), "page does not read words"),
    (("ask", "what is it ?", "--image", "{run}/exact.png", "--no-rewrite"), "ask does not read --no-rewrite"),
    (("route", "a circle", "--count", "2"), "route does not read --count"), (("export", "--image", "x"), "--image"),
    (("generate", "a circle", "--as", "sana"), "generate does not read --as"),
    (("generate", "a circle", "--count", "0"), "at least 1"),
    (("generate", "a circle", "--sede", "1"), "did you mean --seed"), (("paint", "a circle"), "invalid choice")])
def test_wrong_input_ends_in_one_line_with_nothing_written(arguments, words, run, tmp_path):
    done = call("sample.py", *(a.format(run=run) for a in arguments), "--run", run, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(run, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / ".out.part.png").symlink_to("/dev/full")
    done = sample(run, "generate", "a red circle", "--out", str(tmp_path / "out.png"))
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_exported_weights_are_read_back_bit_for_bit(run, tmp_path):
    reader = pytest.importorskip("safetensors.torch")
    done = sample(run, "export", "--out", str(tmp_path / "out" / "model.safetensors"))
    assert done.returncode == 0, done.stderr
    model, found = load_run(run), reader.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert load_config(tmp_path / "out") == model.config
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_the_routing_map_has_a_row_for_each_token_that_the_llm_reads(run, monkeypatch):
    maps, model = [], load_run(run)
    monkeypatch.setattr(pictures, "heat_map", lambda weights, rows, *_: maps.append((len(weights), rows)))
    for reference in (None, torch.zeros(1, 3, model.config.side, model.config.side)):
        pictures.routing_pictures(model, "two green circles", reference)
    assert maps == [(6, ["<bos>", "describe", "two", "green", "circles", "queries (mean)"]),
                    (5, ["<bos>", "two", "green", "circles", "queries (mean)"])]
