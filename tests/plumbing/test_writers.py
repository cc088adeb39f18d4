"""`evaluate.py --write`: names and places as GenEval, WISE and ImgEdit publish them, and pairs for rFID, PSNR, SSIM."""

import json

import pytest
import torch

from disk.files import Blob, read_picture
from disk.reading import as_tensor
from plumbing.run_folder import load_run
from public import writers
from spar import Protocol
from tests.tools.commands import call
from tests.tools.planted import noise, picture


def write(run, kind, source, out):
    return call("evaluate.py", run, "--write", kind, source, out, "--steps", "2")


def pixels(path, side=16):
    return as_tensor(read_picture(Blob(str(path), 0, path.stat().st_size, path.name)), side, None)


def test_geneval_has_four_samples_of_each_prompt_beside_its_own_line(whole_run, tmp_path):
    lines = [{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
             {"tag": "counting", "prompt": "two green squares"}]
    source = tmp_path / "evaluation_metadata.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert write(whole_run, "geneval", source, tmp_path / "out").returncode == 0
    for number, line in enumerate(lines):
        folder = tmp_path / "out" / f"0000{number}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        drawn = sorted((folder / "samples").iterdir())
        assert [path.name for path in drawn] == [f"0000{k}.png" for k in range(4)]
    rows = writers.geneval(source, tmp_path / "again")
    model = load_run(whole_run)
    writers.write_drawings(model, rows, Protocol(steps=2).of(model.config))
    for number in range(2):
        for k in range(4):
            name = f"0000{number}/samples/0000{k}.png"
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_wise_and_imgedit_name_pictures_by_their_keys_and_edits_see_their_picture(whole_run, tmp_path):
    (tmp_path / "wise.json").write_text(json.dumps([{"Prompt": "a red circle", "prompt_id": 7, "Category": "x"}]))
    assert write(whole_run, "wise", tmp_path / "wise.json", tmp_path / "wise").returncode == 0
    assert [path.name for path in (tmp_path / "wise").iterdir()] == ["7.png"]
    (tmp_path / "animal").mkdir()
    (tmp_path / "animal" / "1.png").write_bytes(noise(1))
    (tmp_path / "animal" / "2.png").write_bytes(picture(size=(16, 16)))
    edits = {f"key{i}": {"id": f"animal/{i}.png", "prompt": "make the red circle blue"} for i in (1, 2)}
    (tmp_path / "singleturn.json").write_text(json.dumps(edits))
    seen, model = [], load_run(whole_run)
    generate = model.generate
    model.generate = lambda texts, references, *rest: seen.append(references) or generate(texts, references, *rest)
    writers.write_for("imgedit", model, tmp_path / "singleturn.json", tmp_path / "edited", Protocol(steps=2))
    assert sorted(path.name for path in (tmp_path / "edited").iterdir()) == ["key1.png", "key2.png"]
    assert seen[0].equal(torch.stack([pixels(tmp_path / "animal" / f"{i}.png") for i in (1, 2)]))


def test_reconstructions_are_pairs_and_what_is_there_is_not_made_again(whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "SIDE", 10)  # no whole tokens of 4 pixels: mirrored outwards to 12
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(noise(i))
    assert write(whole_run, "reconstruction", tmp_path / "pictures", tmp_path / "out").returncode == 0
    original, copy = (tmp_path / "out" / name / "1.png" for name in ("original", "reconstruction"))
    image = pixels(tmp_path / "pictures" / "1.png", 10)
    assert (pixels(original, 10) - image).abs().max() < 0.01
    padded = torch.nn.functional.pad(image[None], (1, 1, 1, 1), mode="reflect")
    wanted = load_run(whole_run).reconstruct(padded)[0, :, 1:11, 1:11]
    assert (pixels(copy, 10) - wanted).abs().max() < 0.02
    copy.write_bytes(b"mine")
    assert write(whole_run, "reconstruction", tmp_path / "pictures", tmp_path / "out").returncode == 0
    assert copy.read_bytes() == b"mine"


@pytest.mark.parametrize("kind, content, message", [
    ("geneval", '[{"tag": "x"}]', "is not geneval's (KeyError: 'prompt')"), ("wise", "{", "Expecting"),
    ("imgedit", '{"a": {"id": "../x.png", "prompt": "y"}}', "leads out of"), ("genevil", "[]", "one of geneval, wise"),
    ("wise", '[{"Prompt": "x", "prompt_id": "../../y"}]', "invalid literal"), ("imgedit", "[1]", "is not imgedit's"),
    ("wise", '[{"Prompt": "x", "prompt_id": Infinity}]', "OverflowError"), ("wise", "[]", "holds no prompts"),
    ("wise", '[{"Prompt": 7, "prompt_id": 1}]', "7 is no prompt"), ("wise", "[" * 100000, "recursion"),
    ("imgedit", '{"a/1": {"id": "x.png", "prompt": "y"}}', "no file's name")])
def test_other_files_are_refused_in_one_line(whole_run, tmp_path, kind, content, message):
    (tmp_path / "x.json").write_text(content)
    done = write(whole_run, kind, tmp_path / "x.json", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") <= 2, done.stderr
    assert not list(tmp_path.glob("**/*.png"))
