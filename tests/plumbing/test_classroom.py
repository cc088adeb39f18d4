"""What a class shares and pools, and the sheet of exercise 10: right ones pass, mistakes are told in one line."""

import copy
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from evaluate import evaluation_id
from exercises import pool, share
from exercises.answers import a10
from exercises.checks import e10
from plumbing.command import UserError, run_command
from plumbing.run_folder import finished_stages, load_config, load_run, write_config
from spar import Protocol, make_config
from tests.conftest import TINY
from tests.tools.commands import ROOT
from tests.tools.models import model_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of three stages, with optimizers that make up most of it."""
    torch.manual_seed(3)
    run, config = tmp_path_factory.mktemp("trained") / "run", make_config(**TINY)
    run.mkdir()
    write_config(config, run)
    weights = dict(model_of(config).named_parameters())
    for name, prefixes in (("P1", ("tokenizer.vision", "mllm.llm")), ("P2", ("pixel_encoder", "tokenizer.decoder")),
                           ("T1", ("tokenizer.semantic_stream", "tokenizer.pixel_stream", "tokenizer.fusion"))):
        kept = {key: value.detach().clone() for key, value in weights.items() if key.startswith(prefixes)}
        torch.save({"weights": kept, "ema": {key: value + 0.5 for key, value in kept.items()},
                    "latent_scale": torch.tensor(1.25), "optimizer": [copy.deepcopy(kept), copy.deepcopy(kept)],
                    "position": 3, "seconds": 1.0}, run / f"{name}.pt")
    a10.measure(run, {"reconstruction": {"psnr": 30.0}}, Protocol().of(config))
    (run / "log.jsonl").write_text('{"stage": "P1", "step": 0}\n')
    (run / "resume").mkdir()
    return run


@pytest.fixture
def packed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(share, "commit", lambda: "a" * 40)
    share.pack(trained, tmp_path / "shared.tar")
    return tmp_path / "shared.tar"


def with_sum(name: str, content: bytes = b"x"):
    """A member of any name, of which sums.json has the right sum."""
    def change(members):
        sums = json.loads(members["sums.json"])
        sums["sums"][name] = hashlib.sha256(content).hexdigest()
        members |= {name: content, "sums.json": json.dumps(sums).encode()}
        return members

    return change


def rewritten(file, change):
    """The pack with its members, name -> bytes, changed by `change(members)`; a TarInfo in it is written as it is."""
    with tarfile.open(file) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    members = change(members) or members
    with tarfile.open(file, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if info is content else len(content)
            tar.addfile(info, None if info is content else io.BytesIO(content))
    return file


def told(monkeypatch, capsys, module, *arguments) -> tuple[int, str]:
    """-> (exit code, what stands on stderr) of a script's main"""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        run_command(module.main)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


# ---------------------------------------------------------------- share


def test_an_unpacked_run_is_the_packed_one_to_the_bit(trained, packed, tmp_path):
    run = tmp_path / "class" / "mine"
    names = share.unpack(packed, run)
    assert {path.name for path in run.iterdir()} == set(names) == {
        "P1.pt", "P2.pt", "T1.pt", "config.json", "log.jsonl", "results.json"}
    models = []
    for folder in (trained, run):
        torch.manual_seed(0)  # of what no stage has trained yet
        models.append(load_run(folder))
    before, after = models
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    how = Protocol(**json.loads((run / "results.json").read_text())["protocol"])
    assert evaluation_id(run, how) == json.loads((run / "results.json").read_text())["eval_id"]
    assert finished_stages(run, load_config(run)) == {"P1", "P2", "T1"}
    assert [path.name for path in run.parent.iterdir()] == ["mine"]


def test_a_pack_has_no_optimizers_and_the_same_bytes_each_time(trained, packed, tmp_path):
    whole = sum(path.stat().st_size for path in trained.glob("*.pt"))
    assert packed.stat().st_size < 0.4 * whole
    share.pack(trained, tmp_path / "again.tar")
    assert packed.read_bytes() == (tmp_path / "again.tar").read_bytes()
    with tarfile.open(packed) as tar:  # whoever packs, and whenever
        assert {(m.uid, m.gid, m.mtime, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
    assert {path.name for path in tmp_path.iterdir()} == {"shared.tar", "again.tar"}


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE = {
    "a link in a stage's place": lambda m: m.update({"P1.pt": link("P1.pt", "/etc/passwd")}),
    "a hard link": lambda m: m.update({"P1.pt": link("P1.pt", "T1.pt", tarfile.LNKTYPE)}),
    "a folder": lambda m: m.update({"P1.pt": link("P1.pt", "", tarfile.DIRTYPE)}),
    "a pipe": lambda m: m.update({"P1.pt": link("P1.pt", "", tarfile.FIFOTYPE)}),
    "a name that leads out": with_sum("../out.pt"),
    "one that leads out of two folders": with_sum("../../P1.pt"),
    "an absolute name": with_sum("/tmp/out.pt"),
    "a name in a folder": with_sum("report/x.png"),
    "code": with_sum("sitecustomize.py"),
    "a name that sums.json does not know": lambda m: m.update({"U3.pt": b"x"}),
    "another byte": lambda m: m.update({"P1.pt": m["P1.pt"][:-1] + bytes([m["P1.pt"][-1] ^ 1])}),
    "a shorter file": lambda m: m.update({"T1.pt": m["T1.pt"][:-1]}),
    "a missing stage": lambda m: m.pop("T1.pt") and None,
    "no sums": lambda m: m.pop("sums.json") and None,
    "sums that are none": lambda m: m.update({"sums.json": b"[1, 2]"}),
    "sums of other names": lambda m: m.update({"sums.json": b'{"commit": "", "sums": {"../x": "0"}}'}),
    "a member that is there twice": lambda m: [*m.items(), ("P1.pt", m["P1.pt"])],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_unpacking_writes_nothing_where_something_is_wrong(name, packed, tmp_path):
    rewritten(packed, HOSTILE[name])
    with pytest.raises(UserError) as error:
        share.unpack(packed, tmp_path / "deep" / "mine")
    assert "\n" not in str(error.value) and packed.name in str(error.value)
    assert {path.name for path in tmp_path.rglob("*")} <= {"shared.tar", "deep"}
    assert not Path("/tmp/out.pt").exists()


@pytest.mark.parametrize("kept", (0, 100, 5000, -2000))
def test_a_pack_cut_short_is_told_and_leaves_nothing(kept, packed, tmp_path):
    packed.write_bytes(packed.read_bytes()[:kept] if kept > 0 else b"" if not kept else packed.read_bytes()[:-30000])
    with pytest.raises(UserError):
        share.unpack(packed, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["shared.tar"]


def test_another_commits_pack_is_refused_unless_it_is_asked_for(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(share, "commit", lambda: "b" * 40)
    code, err = told(monkeypatch, capsys, share, "unpack", packed, tmp_path / "mine")
    assert code == 2 and err.count("\n") == 1 and "aaaaaaaaaaaa" in err and not (tmp_path / "mine").exists()
    assert told(monkeypatch, capsys, share, "unpack", packed, tmp_path / "mine", "--any-commit") == (0, "")
    monkeypatch.setattr(share, "commit", lambda: "")  # a copy without git cannot tell
    share.unpack(packed, tmp_path / "other")


@pytest.mark.parametrize("arguments, words", [
    (("unpack", "nowhere.tar", "mine"), "nowhere.tar"), (("pack", "nowhere", "x.tar"), "no run in"),
    (("fold", "a", "b"), "invalid choice"), (("unpack", "shared.tar", "shared.tar"), "choose a new folder")])
def test_mistakes_end_in_one_line(arguments, words, packed, monkeypatch, capsys):
    monkeypatch.chdir(packed.parent)
    code, err = told(monkeypatch, capsys, share, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_nothing_is_unpacked_over_a_run(packed, trained, tmp_path):
    with pytest.raises(UserError, match="new folder"):
        share.unpack(packed, trained)
    (tmp_path / "empty").mkdir()
    assert share.unpack(packed, tmp_path / "empty")


def test_a_broken_stage_is_not_packed(trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((trained / "config.json").read_bytes())
    with pytest.raises(UserError, match="no finished stage"):
        share.pack(run, tmp_path / "x.tar")
    whole = (trained / "P1.pt").read_bytes()
    other = bytearray(whole)
    other[len(whole) // 2] ^= 1  # inside a tensor
    for broken in (whole[:-5000], other):
        (run / "P1.pt").write_bytes(broken)
        with pytest.raises(UserError, match="P1"):
            share.pack(run, tmp_path / "x.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_commit_is_this_repositorys_own(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-C", str(tmp_path), *words], capture_output=True, text=True, check=True).stdout

    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setattr(share, "ROOT", tmp_path)
    assert share.commit() == ""
    (tmp_path / "folder").mkdir()
    git("init", "-q")
    git("-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x")
    assert share.commit() == git("rev-parse", "HEAD").strip() != ""
    monkeypatch.setattr(share, "ROOT", tmp_path / "folder")  # a copy inside another repository
    assert share.commit() == ""


# ---------------------------------------------------------------- pool


@pytest.fixture
def class_of(tmp_path):
    """The control's folder, and results of two arms."""
    _, _, control = a10.make(tmp_path)
    for seed, (psnr, understanding) in enumerate(((31.0, 0.91), (31.4, 0.93), (31.2, 0.93))):
        a10.make_run(tmp_path / "class" / f"pair{seed}", psnr, understanding, lambda_s=0.0, seed=seed)
    a10.make_run(tmp_path / "class" / "pair9", 28.0, 0.91, router="last")
    return control, sorted((tmp_path / "class").glob("*/results.json"))


def test_a_class_is_pooled_by_what_it_changed_and_told_by_the_rule(class_of):
    control, results = class_of
    held, arms = pool.pool("reconstruction.psnr", results, [control])
    assert held.mean == pytest.approx(30.2667, abs=1e-4) and held.spread == pytest.approx(0.1528, abs=1e-4)
    assert {arm.label: len(arm.values) for arm in arms} == {"lambda_s 0.0": 3, "router last": 1}
    assert arms[0].mean == pytest.approx(31.2) and arms[0].spread == pytest.approx(0.2) and arms[1].spread is None
    assert [pool.verdict(arm, held) for arm in arms] == ["higher", "lower"]
    held, arms = pool.pool("understanding.overall", results, [control])
    assert [pool.verdict(arm, held) for arm in arms] == ["cannot be told"] * 2
    assert "0.9233" in pool.table("understanding.overall", held, arms)


@pytest.mark.parametrize("away, wanted", [
    (1.9, "cannot be told"), (-1.9, "cannot be told"), (2.1, "higher"), (-2.1, "lower")])
def test_the_rule_is_twice_the_spread_and_the_difference_has_its_sign(away, wanted):
    control = pool.Arm("control", [30.0, 30.1, 30.2])
    arm = pool.Arm("arm", [30.1 + away * 0.1])
    assert control.spread == pytest.approx(0.1) and pool.verdict(arm, control) == wanted
    line = pool.table("x.y", control, [arm]).splitlines()[2]
    assert f" {away * 0.1:+.4f}   {wanted}" in line and len(pool.table("x.y", control, [arm]).splitlines()) == 4


def test_a_run_that_is_handed_in_twice_counts_once_and_is_named(class_of, tmp_path, capsys):
    control, results = class_of
    again = shutil.copyfile(results[0], tmp_path / "again.json")
    held, arms = pool.pool("reconstruction.psnr", [*results, again], [control, *control.glob("seed0")])
    assert len(held.values) == 3 and [len(arm.values) for arm in arms] == [3, 1]
    assert f"{again} has the weights of {results[0].parent}: counted once" in capsys.readouterr().out


def test_a_folder_of_results_by_any_name_is_read_without_what_macos_leaves_there(class_of, tmp_path):
    control, results = class_of
    for folder, files in ((tmp_path / "held", sorted(control.glob("*/results.json"))), (tmp_path / "arms", results)):
        folder.mkdir()
        for number, file in enumerate(files):
            shutil.copyfile(file, folder / f"{number}.json")
        (folder / "._1.json").write_bytes(b"\x00\x05\x16\x07")
    wanted, there = (pool.pool("reconstruction.psnr", *given) for given in (
        (results, [control]), ([tmp_path / "arms"], [tmp_path / "held"])))
    assert there == wanted and len(there[0].values) == 3


def test_the_dots_are_drawn(class_of, tmp_path, monkeypatch, capsys):
    control, results = class_of
    out = tmp_path / "drawn" / "pool.png"
    given = "reconstruction.psnr", *results, "--control", control, "--out", out
    assert told(monkeypatch, capsys, pool, *given) == (0, "")
    with pool.Image.open(out) as image:
        assert image.width > image.height > 100 and len(image.getcolors(1 << 20)) > 5
    same = pool.Arm("one value", [0.5] * 7)
    assert pool.dot_plot("x.y", pool.Arm("control", [0.5, 0.5]), [same]).size[0] > 100


@pytest.mark.parametrize("words, given", [
    ("two seeds", lambda control, results: (results, [control / "seed0"])),
    ("no figure", lambda control, results: (results, [control])),
    ("there is no", lambda control, results: ([control / "nothing.json"], [control])),
    ("protocol", lambda control, results: (results, [control])),
    ("other data", lambda control, results: (results, [control])),
    ("the control's runs differ in router", lambda control, results: (results, [control, results[-1]]))])
def test_what_cannot_be_pooled_is_told_in_one_line(words, given, class_of, tmp_path, monkeypatch, capsys):
    control, results = class_of
    if words == "protocol":
        results.append(a10.make_run(tmp_path / "odd", 30.0, 0.9, count=20, lambda_s=0.0))
    if words == "other data":
        run = a10.make_run(tmp_path / "odd", 30.0, 0.9, lambda_s=0.0)
        told_so = json.loads((run / "results.json").read_text()) | {"data": "openmoji"}
        (run / "results.json").write_text(json.dumps(told_so))
        results.append(run)
    runs, controls = given(control, results)
    code, err = told(monkeypatch, capsys, pool, "x.y" if words == "no figure" else "reconstruction.psnr", *runs,
                     "--control", *controls, "--out", tmp_path / "pool.png")
    assert code == 2 and err.count("\n") == 1 and words in err and not (tmp_path / "pool.png").exists()


# ---------------------------------------------------------------- exercise 10


def judged(tmp_path, change) -> list[dict]:
    run, sheet, control = a10.make(tmp_path)
    change(run, sheet, control)
    (tmp_path / "sheet.json").write_text(json.dumps(sheet))
    return e10.verdicts([str(run), str(tmp_path / "sheet.json"), "--control", str(control)])


@pytest.mark.parametrize("name", a10.RIGHT)
def test_a_right_sheet_passes(name, tmp_path):
    assert [row for row in judged(tmp_path, a10.RIGHT[name]) if not row["ok"]] == []


@pytest.mark.parametrize("name", a10.WRONG)
def test_a_wrong_sheet_is_told_in_one_line(name, tmp_path):
    told = [row["why"] for row in judged(tmp_path, a10.WRONG[name]) if not row["ok"]]
    assert told and all(why and "\n" not in why and "Error" not in why for why in told)


def test_a_sheet_may_begin_with_a_mark_as_some_editors_write_it(tmp_path):
    run, sheet, control = a10.make(tmp_path)
    (tmp_path / "sheet.json").write_text(json.dumps(sheet), encoding="utf-8-sig")
    assert all(row["ok"] for row in e10.verdicts([str(run), str(tmp_path / "sheet.json"), "--control", str(control)]))


def test_a_late_prediction_is_a_remark(tmp_path, monkeypatch):
    monkeypatch.setattr(e10, "WORK", tmp_path / "work")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "predictions.md").write_text("# What I expect\n\n## 1 Two streams\n")  # of another exercise
    os.utime(tmp_path / "work" / "predictions.md", (1e9, 1e9))
    row = judged(tmp_path / "late", a10.RIGHT["the prediction written late: a remark"])[-1]
    assert row["ok"] and "remark" in row["why"]
    assert not judged(tmp_path / "timely", lambda *_: None)[-1]["why"]


def test_results_of_seeds_do_for_a_control(tmp_path):
    run, sheet, control = a10.make(tmp_path)
    (tmp_path / "sheet.json").write_text(json.dumps(sheet))
    files = []
    for number, path in enumerate(sorted(control.glob("*/results.json"))):
        files.append(path.rename(tmp_path / f"seed{number}.json"))
    given = [str(run), str(tmp_path / "sheet.json"), "--control", *map(str, files)]
    assert all(row["ok"] for row in e10.verdicts(given))
    apart = [*given[:2], *(word for path in files for word in ("--control", str(path)))]
    assert e10.verdicts(apart) == e10.verdicts(given)
    one = e10.verdicts(given[:-2])  # one run has no spread: the one on the sheet is taken as given
    assert [row["claim"] for row in one if not row["ok"]] == ["the numbers on the sheet are those of the results"]


@pytest.mark.parametrize("text", ("", "[]", "{", "null", '{"seeds": 3}', "[" * 100_000))
def test_a_sheet_that_is_none_is_told_in_one_line(text, tmp_path):
    run, _, control = a10.make(tmp_path)
    (tmp_path / "sheet.json").write_text(text)
    rows = e10.verdicts([str(run), str(tmp_path / "sheet.json"), "--control", str(control)])
    assert len(rows) == 1 and not rows[0]["ok"] and "\n" not in rows[0]["why"]


def test_a_command_without_a_control_is_the_users_mistake():
    with pytest.raises(UserError, match="--control"):
        e10.verdicts(["run", "sheet.json"])


def test_the_printers_handout_says_the_same_as_the_other():
    folder = ROOT / "exercises"
    text, page = ((folder / f"handout.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    text = re.sub(r"^(\*One sheet.*|## (Front|Back): .*)$|^```(sh)?$|[*`]|\\(?=\|)|^\d\. ", "", text, flags=re.M)
    page = re.sub(r"<h2.*?</h2>|<style>.*?</style>|<title>.*?</title>|</?(?:b|i|code)>", "", page, flags=re.S)
    page = re.sub(r"<[^>]+>", " ", page)
    words = [re.sub(r"[|\-#]", " ", part).split() for part in (text, html.unescape(page))]
    assert words[0] == words[1] and len(words[0]) > 300
