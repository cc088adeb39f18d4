"""The README's commands are the ones that CI runs, and what it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    for line in re.findall(r"```sh\n(python3 -m venv .*)\n```", README):
        for part in line.split(" && "):
            assert any(here.split(" --steps-scale")[0].replace(" --quiet", "").startswith(part) for here in ci.splitlines()), part


def test_every_file_and_test_that_the_readme_names_exists():
    for name in re.findall(r"`([a-z_]+\.py)`", README):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_every_flag_that_the_readme_names_exists():
    import train
    source = "".join((ROOT / name).read_text() for name in ("train.py", "sample.py", "evaluate.py", "check.py", "openmoji.py", "tests/torture.py")) + '"--help"'
    fields = {"--" + field.replace("_", "-") for field in train.make_config().__dict__}
    fields |= {"--no-" + field[2:] for field in fields}
    torchruns = {"--standalone", "--nproc-per-node", "--max-restarts"}
    for flag in set(re.findall(r"(--[a-z][a-z-]+)", README)) - torchruns:
        assert flag in fields or f'"{flag.replace("--no-", "--")}"' in source, flag
