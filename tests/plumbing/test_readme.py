"""The README's commands are the ones that CI runs, and what it names exists."""

import re

import pytest

from spar import Config
from tests.tools.commands import ROOT

README = (ROOT / "README.md").read_text()
TEXTS = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("disk", "plumbing", "results", "exercises")),
         ROOT / "exercises" / "teacher.md", ROOT / "exercises" / "handout.md"]
SOURCES = ("plumbing/flags.py", "sample.py", "evaluate.py", "disk/check.py", "public/openmoji.py", "attention.py",
           "tests/tools/torture.py", "benchmarks/*.py", "exercises/*.py")


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    plain = [line.split(" --steps-scale")[0].replace(" --quiet", "") for line in ci]
    install = re.findall(r"```sh\n(python3 -m venv .*)\n```", README)
    tests = re.findall(r"`(\.venv/bin/python -m pytest.*?)`", README)
    assert install and tests
    for line in install + tests:
        for part in line.split(" && "):
            assert any(command.startswith(part) for command in plain), part


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_readme_names_exists(path):
    if not path.exists():
        pytest.skip(f"there is no {path}")
    for name in re.findall(r"`([\w/]+\.py|toy[\w-]*\.json|results/[\w-]+\.json)`", path.read_text()):
        assert (ROOT / name).exists() or (path.parent / name).exists() or [*ROOT.glob(f"*/**/{name}")], name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_that_a_readme_names_exists(path):
    if not path.exists():
        pytest.skip(f"there is no {path}")
    source = "".join(file.read_text() for pattern in SOURCES for file in ROOT.glob(pattern)) + '"--help"'
    fields = {"--" + field.replace("_", "-") for field in Config.__dataclass_fields__}
    fields |= {"--no-" + field[2:] for field in fields}
    others = {"--standalone", "--nproc-per-node", "--max-restarts",
              "--include"}  # of torchrun, pip, grep
    for flag in set(re.findall(r"(--[a-z][a-z-]+)", path.read_text())) - others:
        assert flag in fields or f'"{flag.replace("--no-", "--")}"' in source, flag
