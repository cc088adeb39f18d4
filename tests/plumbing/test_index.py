"""Claims about the index of shards: it gives what a look gives, and is refused where it is not of what is there."""

import json
import os
import shutil

import pytest
import torch

from disk.files import BadFile
from disk.index import index_shard, open_data, write_index
from disk.layouts import scan
from disk.reading import DiskData
from disk.samples import KINDS
from tests.tools.commands import call
from tests.tools.planted import everything, noise, shard
from tests.tools.strange_folders import Strange


def seen(folder):
    """All that is known of each sample, by kind and side; what is wrong; what was passed over."""
    samples = {(kind, split): [(sample.file, sample.key, sample.kinds, sample.is_test, sample.content,
                                {role: blob[:3] for role, blob in sample.has.items()})
                               for sample in folder.of(kind, split)]
               for kind in (*KINDS, "any") for split in ("train", "test")}
    return samples, folder.faults, folder.counted("passed"), folder.counted("layouts"), folder.summary(), folder.notes


@pytest.mark.parametrize("part", range(4))
def test_an_index_gives_what_a_look_gives(part, tmp_path):
    for seed in range(10 * part, 10 * part + 10):
        Strange(tmp_path / str(seed), seed)
        looked = seen(scan(tmp_path / str(seed)))
        if not looked[0]["any", "train"]:
            continue
        assert seen(write_index(tmp_path / str(seed), 1)) == looked, seed
        assert seen(open_data(tmp_path / str(seed))) == looked, seed


def test_training_reads_the_same_with_and_without_an_index(tmp_path):
    root = everything(tmp_path / "data")
    looked = scan(root)
    write_index(root)
    indexed = open_data(root)
    for name in ("text_to_image_samples", "dialogue_samples", "pictures", "edit_samples"):
        one, other = (getattr(DiskData(folder, 16, 3, 1, edits=name == "edit_samples"), name)(range(40))
                      for folder in (looked, indexed))
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (one, other))):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("change, told", [
    (lambda root: shard(root / "0.tar", [("x.png", noise(99)), ("x.txt", b"x")]), "0.tar has changed since the index"),
    (lambda root: os.utime(root / "1.tar"), "1.tar has changed since the index"),
    (lambda root: (root / "1.tar").unlink(), "1.tar is in the index and no more in the folder"),
    (lambda root: shard(root / "9.tar", [("x.png", noise(99))]), "9.tar is not in the index"),
    (lambda root: (root / "alone.png").write_bytes(noise(98)), "what stands beside the shards has changed"),
    (lambda root: (root / ".index" / "index.json").write_text("{"), "index.json is broken")])
def test_an_index_of_something_else_is_refused_by_name_until_it_is_made_again(change, told, tmp_path):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", [(f"{i}.png", noise(10 * number + i)) for i in range(4)])
    (tmp_path / "beside.png").write_bytes(noise(77))
    write_index(tmp_path, 1)
    change(tmp_path)
    with pytest.raises(BadFile, match=f"{told}.*python data.py --index"):
        open_data(tmp_path)
    write_index(tmp_path, 1)
    assert seen(open_data(tmp_path)) == seen(scan(tmp_path))


def test_only_new_and_changed_shards_are_read_again(tmp_path, monkeypatch):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", [(f"{i}.png", noise(10 * number + i)) for i in range(4)])
    write_index(tmp_path, 1)
    tables = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".index").glob("*.npy")}
    shard(tmp_path / "1.tar", [("new.png", noise(50)), ("new.txt", b"words")])
    (tmp_path / "2.tar").unlink()
    found = write_index(tmp_path, 1)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".index").glob("*.npy")}
    assert len(after) == 2 and len(tables.items() & after.items()) == 1
    assert seen(found) == seen(scan(tmp_path))


def test_a_table_runs_nothing(tmp_path):
    shard(tmp_path / "0.tar", [(f"{i}.png", noise(i)) for i in range(4)])
    write_index(tmp_path, 1)
    table = next((tmp_path / ".index").glob("*.npy"))

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    import numpy as np
    np.save(table, np.array([Harm()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        open_data(tmp_path).of("pictures")[0]
    assert not (tmp_path / "harm").exists()


def test_the_command_says_how_well_windows_mix(tmp_path):
    for number in range(20):
        shard(tmp_path / f"{number:03}.tar", [(f"{i}.png", noise(10 * number + i)) for i in range(6)])
    done = call("data.py", "--index", tmp_path)
    assert done.returncode == 0 and "20 shards" in done.stdout and "16 shards a window" in done.stdout, done.stderr
    assert json.loads((tmp_path / ".index" / "index.json").read_text())["shards"]["000.tar"]["totals"]["pictures"] == 6
    moved = shutil.move(tmp_path, tmp_path.with_name("moved"))
    assert len(open_data(tmp_path.with_name("moved")).of("pictures")) and moved


def test_a_shard_is_indexed_by_reading_it_once(tmp_path):
    path = shard(tmp_path / "test" / "0.tar", [("a.png", noise(1)), ("a.txt", b"words"), ("b.gif", b"x")])
    line = index_shard(tmp_path, path, "test/0.tar")
    assert line["totals"]["captions"] == 1 and line["faults"] == [("b.gif", "is a gif: save it as png, jpg or webp")]
