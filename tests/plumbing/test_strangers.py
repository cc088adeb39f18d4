"""What strangers bring: each test is a kind of fault that was met, in public projects or here. What a folder holds is
read, told as a fault, or passed over and counted."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

import train
from disk import samples
from disk.bytepair import BytePairTokenizer, learn_merges
from disk.check import check
from disk.files import BadFile, read_picture
from disk.layouts import data_path, readings, scan
from disk.measure import readable
from disk.reading import DiskData
from disk.samples import KINDS
from evaluate import Protocol, evaluate
from parts.words import UnknownWords, WordTokenizer, dialogue
from plumbing import command
from plumbing.command import UserError, run_command
from plumbing.flags import parse
from public import openmoji
from public.qwen import load_qwen
from spar import SPAR
from tests.tools.commands import call
from tests.tools.planted import TALK, chunk, folder_of_captions, noise, picture, shard
from tests.tools.public_folders import write_slow_tokenizer
from tests.tools.strange_folders import Strange
from world.language import WORDS


def listed(root: Path, *records: dict, name: str = "list.json") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(records))
    return root


def both(found, kind: str = "any") -> list:
    return [*found.of(kind), *found.of(kind, "test")]


def pictures_of(found, split: str) -> set[bytes]:
    """The contents of the pictures of a side; of edits the sources."""
    return {(sample.has.get("source") or sample.has["image"]).read(1 << 20) for sample in found.of("any", split)
            if sample.has.keys() & {"source", "image"}}


# ---------------------------------------------------------------- who is who


def test_equal_keys_in_several_shards_are_several_samples_also_where_bad_ones_are_counted(tiny, tmp_path):
    for s in range(4):
        files = [(f"{i:04}.{end}", noise(100 * s + i) if end == "png" else f"{s} and {i}".encode())
                 for i in range(10) for end in ("png", "txt")]
        shard(tmp_path / f"{s}.tar", files)
    found = scan(tmp_path)
    data, count = DiskData(found, 16, 0, 0), len(found.of("captions"))
    assert len(both(found)) == 40 and count > 30
    assert len({caption for _, caption in data.dialogue_samples(range(count))[2]}) == count
    for s in range(4):
        shard(tmp_path / "bad" / f"{s}.tar", [("0.png", noise(s)[:200]), ("0.txt", b"broken"), ("1.txt", b"lonely")])
        shard(tmp_path / "bad" / f"{s + 4}.tar", [(f"{i}.png", noise(10 * s + i)) for i in range(20)])
    config = tiny(data=str(tmp_path / "bad"), steps=(30,) * 9, max_bad=7.5 / 88, edits=(0.0,) * 9)
    folder = scan(tmp_path / "bad")
    assert len(folder.faults) == 4 and len(both(folder)) == 84
    with pytest.raises(UserError, match="8 bad samples are more than --max-bad"):  # four of each, all of key 0 or 1
        count_bad = train.bad_samples(tmp_path, folder, config.max_bad)
        for s in range(4):
            count_bad("P2", s, [(f"{s}.tar", "0", "broken"), (f"{s}.tar", "0", "again")])


@pytest.mark.parametrize("form", ["pax", "gnu"])
def test_long_and_odd_names_in_shards_are_read_and_shortened_only_for_the_eye(form, tmp_path):
    import tarfile
    names = ["long/" + "x" * 150, "ä" * 90 + "/" + "b" * 80, "with space", "ab:c", "…" * 130]
    files = [(f"{name}.{end}", content) for i, name in enumerate(names)
             for end, content in (("png", noise(i)), ("txt", b"words"))]
    shard(tmp_path / "0.tar", files, format={"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}[form])
    found = scan(tmp_path)
    assert {sample.key for sample in both(found, "captions")} == {*names} and not found.faults


@pytest.mark.parametrize("files, keys", [
    (("v1.5/0.jpg", "v1.5/0.txt"), {"v1.5/0"}),
    (("shot 12.30.45.png", "shot 12.30.45.txt"), {"shot 12.30.45"}),
    (("A.JPG", "A.Txt", "b.PNG", "b.TXT"), {"A", "b"}),
    (("0001.large.jpg", "0001.txt"), {"0001"}),  # WebDataset's reading finds the partner
    (("0001.jpg", "0001.en.txt"), {"0001"}),
    (("cat.source.png", "cat.source.txt"), {"cat.source"}),  # no edit: nothing is its target
    (("a.b.jpg", "a.b.txt", "a.jpg", "a.txt"), {"a", "a.b"})])
def test_a_name_with_dots_and_endings_in_any_case_finds_its_partner(files, keys, tmp_path):
    for number, make in enumerate(("folder", "shard")):
        root = tmp_path / make
        contents = [(name, b"some words" if name.lower().endswith("txt") else
                     picture((i, 9, 9), kind="png" if name.lower().endswith("png") else "jpeg"))
                    for i, name in enumerate(files)]
        if make == "shard":
            shard(root / "0.tar", [(f"./{name}", content) for name, content in contents])
        for name, content in contents if make == "folder" else ():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        found = scan(root)
        assert {sample.key for sample in both(found, "captions")} == keys and not found.faults, found.faults


def test_a_record_whose_folder_has_a_dot_keeps_its_picture(tmp_path):
    for name in ("v1.5", "v2"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(picture((9 * i, 9, len(name)), kind="jpeg"))
            (tmp_path / name / f"{i}.json").write_text(json.dumps({"conversations": TALK}))
        (tmp_path / name / "9.jpg").write_bytes(picture((1, 2, len(name)), kind="jpeg"))
        listed(tmp_path / name, {"image": "9.jpg", "conversations": TALK}, name="chat.json")
    found = scan(tmp_path)
    assert len(both(found, "talks")) == len(both(found, "pictures")) == 8 and not found.faults


def test_what_is_measured_is_not_one_kind_of_those_that_stand_in_turns(tmp_path):
    for i in range(30):
        for part in ("source", "target"):
            (tmp_path / f"{i:02}.{part}.png").write_bytes(noise(2 * i + (part == "target")))
        (tmp_path / f"{i:02}.instruction.txt").write_text(("make it red", "turn it")[i % 2])
    every = scan(tmp_path).of("edits")
    sound, pictures = readable(every, "source", 16, len(every) // 2)
    assert len(sound) == len(pictures) == len(every) // 2 and {sample.instruction() for sample in sound} == {
        "make it red", "turn it"} and sorted(samples.some_of(every, 10**6)) == [*range(len(every))]
    assert max(samples.some_of(range(1999), 1000)) > 1900  # and not of the beginning alone


def test_a_vocabulary_is_learned_from_what_has_words_and_from_nothing_else(tmp_path, monkeypatch):
    root = folder_of_captions(tmp_path, 40)
    for i in range(500):
        (root / f"alone{i}.png").write_bytes(noise(1000 + i))
    monkeypatch.setattr(samples, "TEXTS", 10)  # of which as many are taken: pictures alone do not count
    found = scan(root)
    texts = [*found.texts()]
    assert 10 <= len(texts) - 2 <= 20 and len(found.of("pictures")) > 400


def test_a_sign_may_have_two_names_at_most():
    assert readings("a/x.source.png") == [("a/x", "source"), ("a/x.source", "image"), ("a/x", "image")]
    assert readings("a.b/x.txt") == [("a.b/x", "words")] and readings("x.psd.md") == readings("noend") == []
    assert readings(".png") == []


# ---------------------------------------------------------------- nothing is dropped in silence


def test_faults_found_while_looking_are_listed_before_the_first_step_and_count(tiny, tmp_path, capsys):
    root = listed(folder_of_captions(tmp_path / "data", 20),
                  *({"image": f"none{i}.png", "conversations": TALK} for i in range(20)))
    with pytest.raises(UserError, match=r"20 bad samples are more than --max-bad 0.02 of the data .*--check"):
        train.train(tiny(data=str(root), edits=(0.0,) * 9), tmp_path / "run", ["P1"], "cpu")
    assert "not read: list.json [0]: none0.png is not in the data's folder" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()  # told before anything is learned from it
    (tmp_path / "other").mkdir()  # what was bad in steps that are done again, and has been mended, is forgotten
    (tmp_path / "other" / "bad.jsonl").write_text("".join(
        json.dumps({"stage": "P1", "step": 0, "file": "", "key": str(i), "why": "broken"}) + "\n" for i in range(99)))
    train.train(tiny(data=str(root), edits=(0.0,) * 9, max_bad=0.6), tmp_path / "other", ["P1"], "cpu")


def test_a_list_that_breaks_is_read_up_to_there_and_the_break_is_told(tmp_path):
    folder_of_captions(tmp_path, 3)
    good = [json.dumps({"image": f"00{i}.png", "conversations": TALK}) for i in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join([*good[:2], "{broken", good[2]]))
    found = scan(tmp_path)
    assert len(both(found, "talks")) == 2 and "record 2 is broken" in found.faults[0][2]


@pytest.mark.parametrize("what, first, make", [
    ("of a Mac", "._000.png", lambda root: (root / "._000.png").write_bytes(b"\0\5\x16\7")),
    ("of a Mac", "__MACOSX/", lambda root: folder_of_captions(root / "__MACOSX", 3)),
    ("of a Mac", ".DS_Store", lambda root: (root / ".DS_Store").write_bytes(b"x")),
    ("of Windows", "Thumbs.db", lambda root: (root / "Thumbs.db").write_bytes(b"x")),
    ("of a downloader", "00000.parquet", lambda root: (root / "00000.parquet").write_bytes(b"x")),
    ("of a downloader", "00000_stats.json", lambda root: (root / "00000_stats.json").write_text('{"count": 3}')),
    ("hidden", ".git/", lambda root: folder_of_captions(root / ".git", 3)),
    ("of other kinds", "notes.md", lambda root: (root / "notes.md").write_text("x")),
    ("vocabularies", "vocabulary.json", lambda root: (root / "vocabulary.json").write_text('{"merges": []}'))])
def test_what_programs_leave_behind_is_passed_over_counted_and_named(what, first, make, tmp_path):
    make(folder_of_captions(tmp_path / "data", 24))
    report, sound = check(tmp_path / "data")
    assert sound and f"passed    over: 1 {what}, the first {first}" in report and "24 folder" in report
    shard(tmp_path / "tars" / "0.tar",
          [("a.png", noise(1)), ("a.txt", b"x"), (first + "x" * first.endswith("/"), b"?")])
    inside = scan(tmp_path / "tars")
    assert inside.counted("passed")[what][0] == 1 and not inside.faults


def test_a_run_inside_the_data_is_no_data(tiny, tmp_path):
    root = folder_of_captions(tmp_path / "data")
    train.train(tiny(data=str(root), edits=(0.0,) * 9), root / "run", ["P1", "P2", "P3", "T1"], "cpu")
    first, second = (evaluate(root / "run", Protocol(count=6, steps=2)) for _ in range(2))
    assert first["reconstruction"] == second["reconstruction"]
    found = scan(root)
    assert found.counted("passed")["runs"] == [1, "run/"] and len(both(found)) == 24


def test_what_may_not_be_read_is_one_fault_and_the_rest_is_read(tmp_path, monkeypatch):
    listed(folder_of_captions(tmp_path), {"conversations": TALK})
    folder_of_captions(tmp_path / "shut", 3)
    scandir, opened = os.scandir, open

    def no_scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def no_open(path, *more, **named):
        if isinstance(path, (str, Path)) and Path(path).name == "list.json":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **named)

    monkeypatch.setattr(os, "scandir", no_scandir)
    monkeypatch.setattr("builtins.open", no_open)
    found = scan(tmp_path)
    assert sorted(fault[0] for fault in found.faults) == ["list.json", "shut"] and len(both(found)) == 24
    assert all("give the right to read it" in fault[2] for fault in found.faults)


@pytest.mark.parametrize("files", [(), ("0.jfif", "1.jfif"), ("a.parquet",)])
def test_no_sample_at_all_is_a_fault_that_says_what_was_there(files, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(picture(kind="jpeg"))
    done = call("data.py", "--check", tmp_path)
    assert done.returncode == 1 and "holds no sample that can be read" in done.stdout
    assert all(name in done.stdout for name in files)


def test_pictures_without_words_where_most_have_some_and_texts_that_are_cut_are_told(tmp_path):
    folder_of_captions(tmp_path)
    for name in "xyzu":
        (tmp_path / f"{name}.png").write_bytes(noise(ord(name)))
    (tmp_path / "000.txt").write_text(" ".join(str(i) for i in range(500)))
    report, sound = check(tmp_path, longest=20)
    assert sound and "4 pictures have no caption, where most have one: " in report
    assert "1 of 24 texts are longer than 20 tokens" in report


def test_edits_whose_pictures_differ_in_shape_are_told(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.source.png").write_bytes(picture((i, 0, 0), size=(20, 16)))
        (tmp_path / f"{i}.target.png").write_bytes(picture((i, 9, 0), size=(16, 20) if i == 2 else (20, 16)))
        (tmp_path / f"{i}.instruction.txt").write_text("turn it")
    report, sound = check(tmp_path)
    assert sound and "1 edits have two pictures of different shapes: 2 (20×16, 16×20)" in report


def test_several_tars_one_behind_the_other_are_read_and_what_is_none_is_a_fault(tmp_path):
    whole = [shard(tmp_path / f"{i}.part", [(f"{i}.png", noise(i)), (f"{i}.txt", b"words")]).read_bytes()
             for i in range(3)]
    root = tmp_path / "data"
    root.mkdir()
    (root / "all.tar").write_bytes(b"".join(whole))
    found = scan(root)
    assert sorted(sample.key for sample in both(found)) == ["0", "1", "2"] and not found.faults
    (root / "all.tar").write_bytes(whole[0] + whole[1] + b"no tar" * 200)
    found = scan(root)
    assert len(both(found)) == 2 and "stops being a tar at byte 20480" in found.faults[0][2]


# ---------------------------------------------------------------- lists and tables


@pytest.mark.parametrize("fields, kind, told", [
    ({"image": ""}, "texts", ""), ({"image": None}, "texts", ""), ({}, "texts", ""), ({"image": []}, "texts", ""),
    ({"image": ["000.png"]}, "talks", ""), ({"images": ["000.png"]}, "talks", ""), ({"image": "000.png"}, "talks", ""),
    ({"image": ["000.png", "001.png"]}, "", "'image' names 2 pictures"),
    ({"image": "..\\000.png"}, "", "leads out"), ({"image": "sub\\000.png"}, "talks", "")])
def test_odd_records_of_llava_are_understood_or_refused_by_name(fields, kind, told, tmp_path):
    folder_of_captions(tmp_path, 6), folder_of_captions(tmp_path / "sub", 2)
    found = scan(listed(tmp_path, {"conversations": TALK, **fields}))
    assert [fault[2] for fault in found.faults] == [] if kind else told in found.faults[0][2]
    assert not kind or len(both(found, kind)) == 1


def test_a_system_turn_stands_before_the_first_question(tmp_path):
    turns = [{"from": "system", "value": "be kind"}, *TALK, {"from": "human", "value": "and ?"},
             {"from": "gpt", "value": "that"}]
    found = scan(listed(tmp_path, {"conversations": turns}))
    assert both(found, "texts")[0].turns() == [("be kind what ?", "this"), ("and ?", "that")]


def test_metadata_are_captions_as_lines_and_as_a_table(tmp_path):
    texts = ['a red disc, "large"', "two\nlines", "ümlaut", "plain"]
    for folder in ("lines", "table"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            (tmp_path / folder / f"{i}.png").write_bytes(noise(10 * len(folder) + i))
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "lines" / "metadata.jsonl").write_text("\n".join(lines))
    rows = ["file_name,text", *('{}.png,"{}"'.format(i, text.replace('"', '""')) for i, text in enumerate(texts))]
    (tmp_path / "table" / "metadata.csv").write_text("\r\n".join(rows), newline="")
    found = scan(tmp_path)
    assert not found.faults and len(both(found)) == 8
    for folder in ("lines", "table"):
        captions = [sample.caption() for sample in both(found, "captions") if sample.file.startswith(folder)]
        assert sorted(captions) == sorted(" ".join(text.split()) for text in texts)


def test_a_table_whose_quote_stays_open_is_read_up_to_there_and_told(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(noise(i))
    (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,red\n1.png,"blue\n2.png,green\n')
    found = scan(tmp_path)
    assert [sample.caption() for sample in both(found, "captions")] == ["red"]
    assert found.faults == [("metadata.csv", "",
                             "a quote stays open behind row 1; it and what is behind it are not read")]


# ---------------------------------------------------------------- pictures whose metadata are broken


def exif_of(**tags) -> bytes:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[int(tag[1:])] = value
    return exif.tobytes()


@pytest.mark.parametrize("exif", [
    b"Exif\0\0", b"Exif\0\0garbage that is none", b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40,
    b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\xff\xff\xff\x7f\0\0\0\0", exif_of(_282=(0, 0), _274=1)])
def test_sound_pixels_with_broken_metadata_are_read(exif, tmp_path):
    from disk.files import Blob
    for kind in ("jpeg", "png", "webp"):
        path = tmp_path / f"x.{kind}"
        path.write_bytes(picture((200, 40, 40), kind=kind, exif=exif))
        image = read_picture(Blob(str(path), 0, path.stat().st_size, path.name))
        assert image.size == (20, 16) and image.getpixel((3, 3))[0] > 150


def test_a_png_with_endless_words_or_a_profile_that_is_none_is_read(tmp_path):
    from disk.files import Blob
    words = PngImagePlugin.PngInfo()
    words.add_text("parameters", "x" * (3 << 20), zip=True)
    words.add_itxt("XML:com.adobe.xmp", "y" * (2 << 20), zip=True)
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (200, 40, 40)).save(file, "png", pnginfo=words, icc_profile=b"no profile")
    (tmp_path / "x.png").write_bytes(file.getvalue())
    image = read_picture(Blob(str(tmp_path / "x.png"), 0, len(file.getvalue()), "x.png"))
    assert image.getpixel((3, 3)) == (200, 40, 40)


def test_words_that_unpack_to_200_megabytes_are_never_unpacked(tmp_path):
    import tracemalloc
    import zlib
    from disk.files import Blob
    sound = picture((200, 40, 40))
    end = sound.index(b"IDAT") - 4
    words = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (200 << 20)))
    (tmp_path / "x.png").write_bytes(sound[:end] + words + sound[end:])
    tracemalloc.start()
    image = read_picture(Blob(str(tmp_path / "x.png"), 0, (tmp_path / "x.png").stat().st_size, "x.png"))
    assert image.getpixel((3, 3)) == (200, 40, 40) and tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


# ---------------------------------------------------------------- what is held out


def test_records_about_one_picture_and_equal_pictures_are_on_one_side(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(noise(i))
        shutil.copy(tmp_path / f"{i}.png", tmp_path / f"copy of {i}.png")
    listed(tmp_path, *({"image": f"{i}.png", "conversations": TALK} for i in range(40) for _ in range(6)))
    found = scan(tmp_path)
    train_on, held = (pictures_of(found, split) for split in ("train", "test"))
    assert held and not train_on & held and len(train_on | held) == 40 and len(both(found)) == 280


# ---------------------------------------------------------------- one folder, however spelled, and what changes in it


def test_one_folder_is_one_folder_and_what_is_no_folder_is_told_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of_captions(tmp_path / "data")
    spellings = "data", "data/", "./data", str(tmp_path / "data"), "~/data", "data/../data"
    assert {data_path(text) for text in spellings} == {str(tmp_path / "data")}
    assert parse(arguments=["--data", "./data"])[0].data == str(tmp_path / "data")
    config = parse(arguments=["--data", "openmoji"])[0]  # which train.py knows again, and makes
    assert Path(config.data) == openmoji.folder(config.side) == tmp_path / "pictures" / "openmoji-32"
    for number in range(3):
        shard(tmp_path / "tars" / f"{number:03}.tar", [("a.png", noise(number)), ("a.txt", b"x")])
    assert len(both(scan(Path(data_path("tars/001.tar"))))) == 1
    assert len(both(scan(Path(data_path("tars/{000..002}.tar"))))) == 3
    for text, told in (("", "--data is empty"), (" ", "--data is empty"), ("nowhere", "no such folder"),
                       ("data/000.png", "is a file: give the folder"), ("tars/{000..004}.tar", "003.tar is not there"),
                       ("tars/*.tar", "no such folder"), ("tars/{0..99999999999}.tar", "more than 1000000 shards")):
        with pytest.raises(BadFile, match=told):
            data_path(text)
        assert call("data.py", "--check", text).returncode == 2
    with pytest.raises(BadFile, match="--data is empty"):
        parse(arguments=["--data", ""])


def test_a_run_goes_on_where_its_data_moved_and_stops_where_they_changed(tiny, tmp_path):
    root, run = folder_of_captions(tmp_path / "data"), tmp_path / "run"
    settings = dict(edits=(0.0,) * 9)
    train.train(tiny(data=str(root), **settings), run, ["P1"], "cpu")
    root = root.rename(tmp_path / "moved")
    train.train(tiny(data=str(root), **settings), run, ["P1", "P2", "P3", "T1"], "cpu")
    for i in range(5):
        (root / f"new{i}.png").write_bytes(noise(i))
        (root / f"new{i}.txt").write_text(f"a new thing {i}")
    with pytest.raises(UserError, match=r"other data \(/: 29 samples, were 24\): .*--changed-data"):
        train.train(tiny(data=str(root), **settings), run, ["P1", "P2", "T2"], "cpu")
    words = (run / "vocabulary.json").read_bytes()
    train.train(tiny(data=str(root), **settings), run, ["P1", "P2", "T2"], "cpu", changed=True)
    assert (run / "vocabulary.json").read_bytes() == words
    again = root.rename(tmp_path / "again")
    tables = evaluate(run, Protocol(count=4, steps=2), data=str(again))
    assert "reconstruction" in tables


def test_from_takes_a_stage_with_all_that_it_depends_on_or_not_at_all(tiny, tmp_path, capsys):
    root = folder_of_captions(tmp_path / "data")
    settings = dict(edits=(0.0,) * 9, tokens=264)
    train.train(tiny(data=str(root), **settings), tmp_path / "a", ["P1", "P2"], "cpu")
    copied = shutil.copytree(root, tmp_path / "copied")
    train.train(tiny(data=str(copied), shift=2.0, **settings), tmp_path / "b", ["P1", "P2"], "cpu", tmp_path / "a")
    for name in ("P1.pt", "vocabulary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for i in range(40):
        (copied / f"more{i}.png").write_bytes(noise(i))
        (copied / f"more{i}.txt").write_text("zebra crossing quietly walking")
    train.train(tiny(data=str(copied), **settings), tmp_path / "c", ["P1", "P2"], "cpu", tmp_path / "a")
    assert (tmp_path / "a" / "P1.pt").read_bytes() != (tmp_path / "c" / "P1.pt").read_bytes()
    assert "was trained on other data (/: 64 samples, were 24)" in capsys.readouterr().out


# ---------------------------------------------------------------- the same sequence in training and in use


TEXTS = ["", " ", "what is it ?", "a  cat,on\ta mat", "ümlaut…", "red circle"]


def tokenizers():
    return [WordTokenizer(WORDS), BytePairTokenizer(learn_merges(["what is it ?", "a cat on a mat"], 270))]


def test_p1_builds_id_for_id_what_ask_builds():
    for words in tokenizers():
        for text in TEXTS:
            try:
                words.encode(text)
            except UnknownWords:
                continue
            for visual in (0, 4):
                prefix = words.prompts([""], visual)[0][0].tolist()
                turns = dialogue(words, [(text, "red")])
                assert prefix + turns.ids[0].tolist() == [
                    *words.prompts([text], visual)[0][0].tolist(), *words.encode("red"), words.eos_id], (words, text)
                assert turns.columns.tolist() == [*range(len(words.encode(text)), turns.ids.shape[1])]
        assert words.encode("") == words.encode("  ") == []


def test_u_stages_build_id_for_id_what_generate_and_edit_build(tiny, tmp_path):
    write_slow_tokenizer(tmp_path)
    for words in [*tokenizers(), load_qwen(tmp_path, 48)]:
        model = SPAR(tiny(vocabulary=512), words)
        stage = train.stage_named("U2")
        source = train.Batches(tiny(), "U2", stage.sample, stage.shares(tiny()), words=words)
        texts = ["a red circle", "", "what is the shape"]
        for has_image in (False, True):
            pairs = zip(source.prompts(texts, has_image), model.encode_prompts(texts, has_image, to_draw=True))
            assert all(torch.equal(one, other) for one, other in pairs), type(words)


def test_a_question_that_is_the_sign_alone_is_answered_behind_the_picture(tmp_path):
    folder_of_captions(tmp_path, 6)
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a disc"}]
    found = scan(listed(tmp_path, {"image": "000.png", "conversations": talk}))
    assert both(found, "talks")[0].turns() == [("", "a disc")] and not found.faults


# ---------------------------------------------------------------- commands


def test_a_console_that_cannot_show_a_name_shows_escapes(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    run_command(lambda: print("größe 左"))
    sys.stdout.flush()
    assert file.getvalue() == b"gr\\xf6\\xdfe \\u5de6" + os.linesep.encode()


@pytest.mark.parametrize("script, flags", [("sample.py", ["generate", "x", "--guidance", "nan"]),
                                           ("evaluate.py", ["x", "--guidance", "inf"]), ("train.py", ["--lr", "nan"]),
                                           ("train.py", ["--guidance=-inf"]), ("train.py", ["--edits", "U2=nan"])])
def test_numbers_that_are_none_are_refused(script, flags):
    done = call(script, *flags)
    assert done.returncode == 2 and "a finite number is wanted" in done.stderr and done.stderr.count("\n") == 1


def test_where_folders_cannot_be_opened_a_file_is_saved_all_the_same(tmp_path, monkeypatch):
    opened = os.open

    def as_windows(path, *more, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **named)

    monkeypatch.setattr(os, "open", as_windows)
    for i in range(3):
        command.write_text(tmp_path / "x.txt", str(i))
    assert (tmp_path / "x.txt").read_text() == "2"


def test_a_file_that_another_program_holds_for_an_instant_gets_its_name_a_little_later(tmp_path, monkeypatch):
    replaced, waited = os.replace, []

    def held(old, new):
        if len(waited) < 2:
            raise PermissionError(13, "Access is denied", str(old))
        replaced(old, new)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(command.time, "sleep", waited.append)
    with pytest.raises(PermissionError):
        command.write_text(tmp_path / "x.txt", "elsewhere it is a fault")
    monkeypatch.setattr(command, "WINDOWS", True)
    command.write_text(tmp_path / "x.txt", "there")
    assert (tmp_path / "x.txt").read_text() == "there" and waited == [0.1, pytest.approx(0.3)]


def test_windows_shells_leave_wildcards_to_us(tmp_path, monkeypatch):
    for name in ("seed1.json", "seed0.json", "other.txt"):
        (tmp_path / name).write_text("{}")
    parser = command.Parser()
    parser.add_argument("files", nargs="+")
    asked, wanted = [f"{tmp_path}/seed*.json", "a*b"], [f"{tmp_path}/seed{i}.json" for i in (0, 1)]
    assert parser.read(asked).files == asked
    monkeypatch.setattr(command, "WINDOWS", True)
    assert parser.read(asked).files == [*wanted, "a*b"]


# ---------------------------------------------------------------- any folder


@pytest.mark.parametrize("part", range(10))
def test_of_any_folder_each_sample_is_read_told_or_passed_over_and_no_picture_is_on_both_sides(part, tmp_path):
    for seed in range(31 * part, 31 * part + 31):
        there = Strange(tmp_path / str(seed), seed).there
        found = scan(tmp_path / str(seed))
        passed = sum(count for count, _ in found.counted("passed").values())
        none = there["sample"] == 0  # that there is none is a fault as well
        got = {"sample": len(both(found)), "fault": len(found.faults) - none, "passed": passed}
        assert got == {key: there[key] for key in got}, (seed, there, found.faults)
        sides = [pictures_of(found, split) for split in ("train", "test")]
        assert not sides[0] & sides[1], seed
        if not (tmp_path / str(seed) / "test").exists():
            train_on = {kind: {sample.content for sample in found.of(kind)} for kind in KINDS}
            for kind in KINDS:
                assert not both(found, kind) or train_on[kind], (seed, kind)
                if len(train_on[kind]) > 1 and not len(found.of(kind, "test")):  # each is all that another kind has
                    assert all({one} in train_on.values() for one in train_on[kind]), (seed, kind)
        data = DiskData(found, 4, 0, 0, batch=1)
        if data.kinds["pictures"]:
            assert data.pictures(range(5)).shape == (5, 3, 4, 4)
