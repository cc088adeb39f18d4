"""benchmarks/gpu.py runs from end to end without a GPU: a machine that has one is for measuring, not for debugging."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import attention as attention_benchmark
from benchmarks import gpu
from parts.attention_triton import triton
from spar import NAMES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def read(folder):
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text())


def errors(figures):
    parts = [(part, values) for part, values in figures.items() if isinstance(values, dict)]
    return [(part, name, value) for part, values in parts for name, value in values.items()
            if isinstance(value, dict) and isinstance(value.get("error"), str)]


@pytest.mark.skipif(triton is None, reason="the kernels need Triton")
def test_part_1_runs_a_test_and_times_the_kernels_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--part", "1", "--tiny", "--out", tmp_path], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = read(tmp_path)
    assert not errors(figures)
    assert figures["kernels"]["tests"]["passed"] == 1 and not figures["kernels"]["tests"]["reasons"]
    assert list(figures["kernels agree with torch's"].values()) == [True, True]
    assert figures["speed"]["tiny"]["ours"]["forward"] > 0 and figures["speed against the best"]["tiny"]["both"] > 0


def test_part_2_and_part_3_measure_every_stage_and_a_whole_run_into_one_file(tmp_path):
    gpu.main(["--part", "2", "--tiny", "--out", str(tmp_path)])
    gpu.main(["--part", "3", "--tiny", "--out", str(tmp_path)])
    figures = read(tmp_path)
    assert not errors(figures)
    assert list(figures["a step of tiny"]) == ["P1", "T2", "U3"]  # one of each kind
    for row in figures["a step of tiny"].values():
        assert row["step"] > 0 and row["flops"] > 0 and row["forecast_bytes"] > 0 and 0 <= row["waiting"] < 1
    whole = figures["tiny, whole"]
    assert list(whole["training"]["stages"]) == list(NAMES) and whole["evaluation"]["eval_id"]
    assert all((tmp_path / name).stat().st_size for name in whole["pictures"]) and len(whole["pictures"]) == 2


def test_what_fails_or_takes_too_long_becomes_a_line_and_what_is_measured_is_written_at_once(tmp_path):
    figures = gpu.Figures(tmp_path, "cpu", minutes=1)
    figures.measure("part", "wrong", lambda: 1 / 0)
    figures.measure("part", "leaves", lambda: sys.exit("error: not here\nnor there"))
    figures.measure("part", "endless", lambda: time.sleep(20), seconds=1.1)
    assert figures.measure("part", "right", lambda: {"number": 1}) == {"number": 1}
    written = read(tmp_path)["part"]
    assert written["wrong"] == {"error": "ZeroDivisionError: division by zero"} and written["right"] == {"number": 1}
    assert written["leaves"] == {"error": "SystemExit: error: not here"}
    assert written["endless"]["error"].startswith("TimeoutError: no time left")
    figures.end = 0
    figures.measure("part", "late", lambda: pytest.fail("there is no time for it"))
    assert "no time left" in read(tmp_path)["part"]["late"]["error"]


def test_tests_that_fail_are_counted_and_named(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['a b', 2])\ndef test_one(x):\n    assert x == 2\n"
        "def test_two():\n    pytest.skip('not today')\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-qqq")  # of the user's own runs
    result = gpu.run_tests(["test_some.py"], 60)
    assert (result["passed"], result["failed"], result["skipped"], result["not_run"]) == (1, 1, 1, 0)
    assert result["names"] == ["test_some.py::test_one[a b]"]
    assert any("assert 'a b' == 2" in line for line in result["reasons"])


def test_the_attention_bench_prints_what_ran_and_what_refused_and_writes_where_it_should(tmp_path, monkeypatch, capsys):
    row = dict(forward=1e-3, both=4e-3, forward_tflops=300.0, both_tflops=250.0, peak_bytes=2**20, error=1e-3)
    refused = {"refused": "no kernel for this width"}
    tables = [{"ours": row, "flash": row | {"both": 6e-3}, "math": refused}, {"ours": refused, "flash": row}]
    monkeypatch.setattr(attention_benchmark, "SHAPES", {"encoder": (), "LLM": ()})
    monkeypatch.setattr(attention_benchmark, "compare", lambda *rest: tables.pop(0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 9)
    monkeypatch.chdir(tmp_path)
    attention_benchmark.main(lambda q, k, v: q)
    written = json.loads((tmp_path / "runs" / "bench" / "attention-Some-GPU.json").read_text())
    assert written["summary"] == {"encoder": {"forward": 1.0, "both": 1.5, "error": 1.0, "memory": 1.0}, "LLM": {}}
    text = capsys.readouterr().out
    assert "no kernel for this width" in text and "against the best: forward 1.00, with backward 1.50" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: there is no GPU here; --tiny"):
        gpu.main(["--part", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: --bench compares kernels on a GPU"):
        attention_benchmark.main(lambda q, k, v: q)
