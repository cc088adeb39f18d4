"""Files made to do harm, each given to what reads it in a process of its own; prints one JSON line for each: name, what
was told, seconds, megabytes above the start, and what the process wrote or ran that it should not have.

    python -m tests.tools.hostile FOLDER
"""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import torch
import torch._dynamo  # here, so that no forked process has to
import torch.distributed.checkpoint as checkpoints

import train
from disk.bytepair import load_vocabulary
from disk.check import check
from plumbing.checkpoints import BrokenCheckpoint, load_progress, saved_progress, sums
from plumbing.command import UserError
from plumbing.run_folder import load_run
from sample import read_picture
from spar import make_config
from tests.conftest import TINY
from tests.tools.models import model_of
from tests.tools.planted import TALK, chunk, claimed_png, folder_of_captions, picture, record, shard

MARK = Path(sys.argv[1]).resolve() / "HARMED"  # what the files try to write


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


class Eval:
    def __reduce__(self):
        return eval, (f"open({str(MARK)!r}, 'w').close()",)


def pickled(thing, protocol=2) -> bytes:
    return pickle.dumps(thing, protocol)


def a_zip(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", files.pop("packing", zipfile.ZIP_STORED)) as packed:
        for name, content in files.items():
            packed.writestr(f"archive/{name.replace('__', '.')}", content)
    return out.getvalue()


def png_bomb(text: bytes = b"") -> bytes:
    """50 000 × 50 000 pixels that are all there, packed."""
    rows, size = zlib.compress(b"\0" * 10**6), struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + text + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def long_name_tar(path: Path, size: int, kind: bytes) -> None:
    """A header that says that a name of `size` bytes follows; the file is as long as that, but holds nothing."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, size
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(size + 4096)


def data(root: Path, **files):
    """A sound folder with hostile files, checked; -> the faults."""
    folder_of_captions(root, 4)
    for name, content in files.items():
        name = name.replace("__", ".")
        content(root / name) if callable(content) else (root / name).write_bytes(content)
    report, sound = check(root)
    assert not sound, report
    return [line for line in report.splitlines() if line.startswith("fault")]


def changed(run: Path, **fields):
    """The run with other values in its config."""
    found = json.loads((run / "config.json").read_text()) | fields
    (run / "config.json").write_text(json.dumps(found))
    load_run(run)


def stage_file(run: Path, content):
    if isinstance(content, bytes):
        (run / "P1.pt").write_bytes(content)
    else:
        torch.save(content, run / "P1.pt")
    load_run(run)


def edited(run: Path, change):
    """The run with one thing changed in its first stage's file."""
    content = torch.load(run / "P1.pt", weights_only=True)
    change(content)
    stage_file(run, content)


def set_ema(key, value):
    def change(content):
        content["ema"][key if key else next(iter(content["ema"]))] = value
    return change


def progress(run: Path, file: str, content: bytes):
    """The run with a hostile file in its last progress, whose checksums are made to fit."""
    folder = saved_progress(run, "P1")[-1]
    (folder / file).write_bytes(content)
    (folder / "sums.json").write_text(json.dumps(sums(folder)))
    load_progress(folder, train.training_of(model_of(make_config(**TINY)), train.STAGES[0]).state())


def progress_saved_with(run: Path, harm):
    """The run with a last progress one of whose plain entries is `harm`, as PyTorch itself writes it."""
    folder = saved_progress(run, "P1")[-1]
    state = train.training_of(model_of(make_config(**TINY)), train.STAGES[0]).state()
    checkpoints.save(state | {"step": 2, "seconds": harm}, checkpoint_id=folder, no_dist=True)
    (folder / "sums.json").write_text(json.dumps(sums(folder)))
    load_progress(folder, state | {"step": 0, "seconds": 0.0})


def endless_member(path: Path):
    """A shard whose one file says to have 2⁶³ − 1 bytes; its checksum is right."""
    shard(path, [("q.png", picture())])
    head = bytearray(path.read_bytes()[:512])
    head[124:136] = b"\x80" + (2**63 - 1).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(bytes(head) + path.read_bytes()[512:])


deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
CASES = {
    # checkpoints
    "pickle that runs a command as a stage": lambda run, root: stage_file(run, pickled(Bomb())),
    "pickle that evaluates": lambda run, root: stage_file(run, pickled(Eval())),
    "newer pickle that runs a command": lambda run, root: stage_file(run, pickled(Bomb(), 5)),
    "torch file that runs a command":
        lambda run, root: stage_file(run, a_zip(**{"data__pkl": pickled(Bomb()), "version": b"3\n"})),
    "torch file whose weights are a command":
        lambda run, root: stage_file(run, a_zip(**{"data__pkl": pickled({"ema": Bomb()}), "version": b"3\n"})),
    "stage that is text": lambda run, root: stage_file(run, b"hello"),
    "stage of 0 bytes": lambda run, root: stage_file(run, b""),
    "stage cut short": lambda run, root: stage_file(run, (run / "P1.pt").read_bytes()[:-500]),
    "stage that is a packed bomb":
        lambda run, root: stage_file(run, a_zip(**{"data__pkl": b"\0" * (1 << 28), "packing": zipfile.ZIP_DEFLATED})),
    "stage that is a list": lambda run, root: stage_file(run, [1, 2, 3]),
    "stage without weights": lambda run, root: stage_file(run, {"ema": {}, "latent_scale": torch.ones(())}),
    "stage whose weights are a number": lambda run, root: stage_file(run, {"ema": 7, "latent_scale": torch.ones(())}),
    "weights of another shape": lambda run, root: edited(run, set_ema("", torch.zeros(3, 3))),
    "weights that are text": lambda run, root: edited(run, set_ema("", "weights")),
    "weights of another kind":
        lambda run, root: edited(run, lambda c: c["ema"].update({k: v.double() for k, v in c["ema"].items()})),
    "another model's keys": lambda run, root: edited(run, set_ema("model.layers.0.weight", torch.zeros(2))),
    "key that is a number": lambda run, root: edited(run, set_ema(7, torch.zeros(2))),
    "NaN weights":
        lambda run, root: edited(run, lambda c: next(iter(c["ema"].values())).view(-1)[0].fill_(float("nan"))),
    "infinite weights":
        lambda run, root: edited(run, lambda c: next(iter(c["ema"].values())).view(-1)[0].fill_(float("inf"))),
    "NaN scale": lambda run, root: edited(run, lambda c: c.update(latent_scale=torch.tensor(float("nan")))),
    "scale that is a matrix": lambda run, root: edited(run, lambda c: c.update(latent_scale=torch.ones(5, 5))),
    "tensor that says to be endless": lambda run, root: edited(run, set_ema("", torch.zeros(1).expand(10**12))),
    # a stage in progress
    "description that runs a command": lambda run, root: progress(run, ".metadata", pickled(Bomb())),
    "description that evaluates": lambda run, root: progress(run, ".metadata", pickled(Eval(), 5)),
    "description that is text": lambda run, root: progress(run, ".metadata", b"hello"),
    "description that is a list": lambda run, root: progress(run, ".metadata", pickled([1])),
    "tensors that are text": lambda run, root: progress(run, "__0_0.distcp", b"hello"),
    "entries that evaluate": lambda run, root: progress_saved_with(run, Eval()),
    "entries that run a command": lambda run, root: progress_saved_with(run, Bomb()),
    # config and vocabulary
    "config that is text": lambda run, root: ((run / "config.json").write_text("hello"), load_run(run)),
    "config nested too deep": lambda run, root: ((run / "config.json").write_bytes(deep), load_run(run)),
    "config of 100 MB":
        lambda run, root: ((run / "config.json").write_text("[" + "1," * (50 << 20) + "1]"), load_run(run)),
    "config with a field of nobody's": lambda run, root: changed(run, run_this="rm"),
    "config with a huge width": lambda run, root: changed(run, c=10**6, dit_heads=1000),
    "config with a million layers": lambda run, root: changed(run, dit_layers=10**6),
    "config with a width that is text": lambda run, root: changed(run, d="os.system('x')"),
    "config with a width below 0": lambda run, root: changed(run, d=-128),
    "config with a number too large to be one": lambda run, root: changed(run, d=10**400),
    "config with queries without end": lambda run, root: changed(run, queries=10**8),
    "config with a list for a number": lambda run, root: changed(run, d=[1, 2]),
    "vocabulary nested too deep":
        lambda run, root: ((root.mkdir(), (root / "v.json").write_bytes(deep)), load_vocabulary(root / "v.json", 64)),
    "vocabulary whose tokens double": lambda run, root: (root.mkdir(), (root / "v.json").write_text(json.dumps(
        {"merges": [[4, 4]] + [[i, i] for i in range(260, 320)]})), load_vocabulary(root / "v.json", 64)),
    # pictures
    "picture of 50 000 × 50 000": lambda run, root: data(root, x__png=png_bomb()),
    "picture that says to be 2³¹ wide": lambda run, root: data(root, x__png=claimed_png(2**31 - 1, 2**31 - 1)),
    "picture of no size": lambda run, root: data(root, x__png=claimed_png(0, 0)),
    "picture of 200 MB":
        lambda run, root: data(root, x__png=lambda path: (path.write_bytes(b"\x89PNG"), os.truncate(path, 200 << 20))),
    "PostScript by a picture's name":
        lambda run, root: data(root, x__png=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch " +
                               str(MARK).encode() + b") (w) file\n"),
    "svg by a picture's name":
        lambda run, root: data(
            root, x__png=b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "bomb given to sample.py":
        lambda run, root: (root.mkdir(), (root / "x.png").write_bytes(png_bomb()), read_picture(root / "x.png", 16)),
    "text given to sample.py":
        lambda run, root: (root.mkdir(), (root / "x.png").write_bytes(b"hello"), read_picture(root / "x.png", 16)),
    # words and records
    "caption of 1 GB":
        lambda run, root: data(root, x__png=picture(), x__txt=lambda path: (path.touch(), os.truncate(path, 1 << 30))),
    "records nested too deep": lambda run, root: data(root, x__json=b"[" + deep + b"]"),
    "record of 50 MB": lambda run, root: data(root, x__json=b'[{"a": "' + b"x" * (50 << 20) + b'"}]'),
    "number with a million digits": lambda run, root: data(root, x__json=b'[{"image": ' + b"9" * 10**6 + b"}]"),
    "key record nested too deep": lambda run, root: data(root, x__png=picture(), x__json=deep),
    "record that names /etc/passwd":
        lambda run, root: data(root, x__json=record(image="/etc/passwd", conversations=TALK).encode()),
    "record that leads out":
        lambda run, root: data(root, x__json=record(image="a/../../../etc/passwd", conversations=TALK).encode()),
    "record that names a device":
        lambda run, root: data(root, x__json=record(image="dev.png", conversations=TALK).encode(),
               dev__png=lambda path: os.mkfifo(path)),
    "record with a control character":
        lambda run, root: data(root, x__json=record(image="a\u001b[2Jb.png", conversations=TALK).encode()),
    # shards
    "tar with ..": lambda run, root: data(root, x__tar=lambda path: shard(path, [("../../HARMED", b"x")])),
    "tar with an absolute name": lambda run, root: data(root, x__tar=lambda path: shard(path, [(str(MARK), b"x")])),
    "tar with a link out":
        lambda run, root: data(
            root,
            x__tar=lambda path: shard(path, [("q.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})])),
    "tar with a hard link out":
        lambda run, root: data(
            root,
            x__tar=lambda path: shard(path, [("q.png", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})])),
    "tar with a device":
        lambda run, root: data(
            root, x__tar=lambda path: shard(path, [("q.png", b"", {"type": tarfile.CHRTYPE, "devmajor": 1})])),
    "tar with a pipe":
        lambda run, root: data(root, x__tar=lambda path: shard(path, [("q.png", b"", {"type": tarfile.FIFOTYPE})])),
    "tar with a name of 4 GB":
        lambda run, root: data(root, x__tar=lambda path: long_name_tar(path, 4 << 30, tarfile.GNUTYPE_LONGNAME)),
    "tar with 4 GB of header":
        lambda run, root: data(root, x__tar=lambda path: long_name_tar(path, 4 << 30, tarfile.XHDTYPE)),
    "tar with 4 GB of common header":
        lambda run, root: data(root, x__tar=lambda path: long_name_tar(path, 4 << 30, tarfile.XGLTYPE)),
    "tar whose file says to be 8 EB": lambda run, root: data(root, x__tar=endless_member),
    "sparse tar":
        lambda run, root: data(
            root, x__tar=lambda path: shard(path, [("q.png", b"", {"type": tarfile.GNUTYPE_SPARSE})])),
}


def judge(name: str, case, sound: Path, folder: Path) -> dict:
    run, root = folder / "run", folder / "data"
    shutil.copytree(sound, run)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, told = time.time(), None
    try:
        faults = case(run, root)
        refused = isinstance(faults, list) and 1 <= len(faults) <= 2
        told = faults[-1] if refused else f"not refused: {faults!r}"[:200]
    except (BrokenCheckpoint, ValueError, OSError, UserError) as error:
        told, refused = str(error), True
    except BaseException as error:
        told, refused = f"{type(error).__name__}: {error}", False
    seconds = time.time() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"name": name, "refused": refused, "told": told, "seconds": seconds, "megabytes": megabytes,
            "harmed": MARK.exists()}


def main() -> None:
    home = Path(sys.argv[1])
    torch.set_num_threads(1)
    config = make_config(**TINY | {"save_minutes": 0.0, "steps": (3,) * 9})
    sound = home / "sound"
    child = os.fork()
    if not child:
        train.train(config, sound, ["P1"], "cpu", None)
        os._exit(0)
    os.waitpid(child, 0)
    for number, (name, case) in enumerate(CASES.items()):
        if number >= 2:  # two at a time
            os.wait()
        child = os.fork()
        if not child:
            folder = home / str(number)
            folder.mkdir()
            sys.stderr = open(os.devnull, "w")
            sys.stdout = open(os.devnull, "w")
            verdict = json.dumps(judge(name, case, sound, folder))
            shutil.rmtree(folder, ignore_errors=True)
            os.write(1, f"{verdict}\n".encode())  # at once: a print is two writes, and the other process writes as well
            os._exit(0)
    for _ in range(min(2, len(CASES))):
        os.wait()


if __name__ == "__main__":
    main()
