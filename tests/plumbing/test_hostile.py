"""Files made to do harm are refused with one line, soon, in little memory, and nothing of them runs."""

import json
import subprocess
import sys

import pytest

from tests.tools.commands import ROOT

SCRIPT = ROOT / "tests" / "tools" / "hostile.py"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    command = [sys.executable, "-m", "tests.tools.hostile", str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_at_least_fifty_were_tried_and_each_came_back(verdicts):
    assert len(verdicts) == SCRIPT.read_text().count("lambda run, root:") >= 50


@pytest.mark.parametrize("what, sound", [
    ("refused", lambda v: v["refused"]),
    ("one line", lambda v: v["told"] and "\n" not in v["told"] and "\x1b" not in v["told"] and len(v["told"]) < 500),
    ("under 5 s", lambda v: v["seconds"] < 5), ("under 1 GB", lambda v: v["megabytes"] < 1024),
    ("nothing ran", lambda v: not v["harmed"])])
def test_every_hostile_file_is_harmless(what, sound, verdicts):
    wrong = {v["name"]: v for v in verdicts if not sound(v)}
    assert not wrong, json.dumps(wrong, indent=1)
