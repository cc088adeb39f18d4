"""The house, read from its source: which files there are and how long, who imports whom, and that what the README
points at exists."""

import ast
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tools.commands import ROOT, call, subprocess_of

MODELS = ("attention", "router", "tokenizer", "mllm", "diffusion")
SCRIPTS = (*MODELS, "spar", "data", "train", "sample", "evaluate")
COMMANDS = ("train", "sample", "evaluate", "data", "attention")
FOLDERS = ("parts", "world", "disk", "plumbing", "public")
LONGEST = {"train": 420, "spar": 420}  # lines of a root file; any other: 360
README = (ROOT / "README.md").read_text()


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def house() -> dict[str, Path]:
    """Module -> its file: the root's scripts, what is in the five folders, and the benchmarks."""
    paths = [*ROOT.glob("*.py"), *source_files(*FOLDERS, "benchmarks")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, modules) -> set[str]:
    """The modules of the house that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module
                      for alias in node.names}
    return names & set(modules)


def graph() -> dict[str, set[str]]:
    modules = house()
    return {name: imports(path, modules) for name, path in modules.items()}


# ---------------------------------------------------------------- files and lines


def test_the_root_has_exactly_the_ten_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_root_file_is_short_enough_to_be_read_at_once(name):
    assert length(ROOT / f"{name}.py") <= LONGEST.get(name, 360)


def test_a_file_in_a_folder_has_at_most_420_lines():
    assert {str(path): length(path) for path in source_files(*FOLDERS) if length(path) > 420} == {}


def test_no_line_is_longer_than_120_characters():
    every = [*ROOT.glob("*.py"), *source_files(*FOLDERS, "tests", "benchmarks", "exercises")]
    long = [f"{path.relative_to(ROOT)}:{number}" for path in every
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert long == []


def in_text_mode(call: ast.Call) -> bool:
    """Whether this reads or writes a file as text."""
    attribute = isinstance(call.func, ast.Attribute)
    name = call.func.attr if attribute else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return attribute  # a path's; ours of that name say it themselves
    modes = [one.value for one in call.args[:1 if attribute else 2] if isinstance(one, ast.Constant)]
    return name == "open" and modes[-1:] in (["r"], ["w"], ["a"], ["x"])


def test_every_text_file_names_its_encoding():
    """Windows would take another one, in which tokenizer.py cannot be written."""
    every = [*ROOT.glob("*.py"), *source_files(*FOLDERS, "benchmarks", "exercises")]
    calls = [(path, node) for path in every for node in ast.walk(tree(path))
             if isinstance(node, ast.Call) and in_text_mode(node)]
    assert len(calls) > 30
    assert [f"{path.relative_to(ROOT)}:{call.lineno}" for path, call in calls
            if "encoding" not in {keyword.arg for keyword in call.keywords}] == []


def test_the_readme_has_at_most_180_lines_the_method_6383_and_what_reads_others_pictures_and_folders_its_own():
    rooms = [folder for folder in FOLDERS if folder not in ("disk", "public")]
    assert len(README.splitlines()) <= 180
    assert sum(map(length, [*ROOT.glob("*.py"), *source_files(*rooms)])) <= 6383
    assert sum(map(length, source_files("disk"))) <= 1850
    assert sum(map(length, source_files("public"))) <= 1120


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_at_its_door_what_is_in_it(folder):
    body = tree(ROOT / folder / "__init__.py").body
    assert len(body) == 1 and ast.get_docstring(tree(ROOT / folder / "__init__.py"))
    for path in (ROOT / folder).glob("[a-z]*.py"):
        assert re.search(rf"^    {path.stem} ", body[0].value.value,
                         re.M), f"{folder}/__init__.py does not name {path.stem}"


# ---------------------------------------------------------------- imports


def may_import(name: str, other: str) -> bool:
    """The one way that imports run: parts ← the model's files ← spar ← data ← train, sample, evaluate."""
    folder, target = name.partition(".")[0], other.partition(".")[0]
    if name in MODELS:
        return target in ("parts", *MODELS) or (name, other) == ("attention", "benchmarks.attention")
    if name == "plumbing.command":
        return False
    if target == "benchmarks":  # what a run costs and how fast its machine is, forecast or measured
        told = ("benchmarks.cost", "benchmarks.look", "benchmarks.yardstick")
        return folder == "benchmarks" or other in told and name in ("train", "evaluate")
    return {"parts": target == "parts",
            "spar": target in ("parts", *MODELS),
            "world": target in ("parts", "world"),
            "disk": target in ("parts", "disk") or other in ("plumbing.command", "public.openmoji"),
            "public": target in ("parts", "public", "spar", "disk") or other in (
                "plumbing.command", "plumbing.checkpoints", "plumbing.run_folder", "plumbing.training",
                "plumbing.pictures"),
            "plumbing": target not in ("data", "train", "sample", "evaluate"),
            "data": target not in ("train", "sample", "evaluate"),
            }.get(folder, True)


@pytest.mark.parametrize("name", house())
def test_imports_run_one_way_late_ones_too(name):
    others = imports(house()[name], house())
    assert [other for other in others if not may_import(name, other)] == []


def test_no_files_import_one_another_in_a_circle():
    left = graph()
    while free := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}, "in a circle, or on the way to one"


# ---------------------------------------------------------------- what the README points at


def table_under(heading: str) -> list[list[str]]:
    """The rows of cells of the first table under a heading that has this word in it."""
    section = re.search(rf"^#+ [^\n]*\b{heading}\b[^\n]*\n(.*?)(?=^#|\Z)", README, re.M | re.S | re.I)
    lines = section[1].splitlines() if section else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows[1:] if not set(row[0]) <= set("-: ")]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def patterns(path: Path):
    """(line, string) of every pattern for einops and einsum."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("rearrange", "repeat", "reduce", "einsum"):
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value,
                                                                         str) and "->" in argument.value:
                        yield node.lineno, argument.value


def test_every_letter_of_a_pattern_is_in_the_readmes_key():
    key = {letter for row in table_under("key") for name in named(row[0]) for letter in re.findall(r"\w+", name)}
    unknown = {}
    for path in [*ROOT.glob("*.py"), *source_files(*FOLDERS)]:
        for line, pattern in patterns(path):
            for letter in set(re.findall(r"[A-Za-z]\w*", pattern)) - key:
                unknown.setdefault(letter, []).append(f"{path.relative_to(ROOT)}:{line}")
    assert unknown == {}


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) + 1


def definitions(path: Path) -> dict[str, int]:
    """Functions, classes, their methods and constants, as the README writes them -> how many lines they have."""
    names = {}
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = lines_of(node)
            names |= {f"{node.name}.{part.name}": lines_of(part) for part in getattr(node, "body", [])
                      if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.If):  # kernels, where Triton is there
            names |= {part.name: lines_of(part) for part in node.body if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: lines_of(node) for target in targets if isinstance(target, ast.Name)}
    return names


def claims() -> list[dict[str, str]]:
    """The README's table of claims: its columns have the names file, function and test."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines()
            if line.startswith("|")]
    head = next(i for i, row in enumerate(rows) if {"file", "function", "test"} <= set(row))
    count = len(rows[head])
    table = []
    for row in rows[head + 2:]:
        if len(row) != count or set(row[0]) <= set("-: "):
            break
        table.append(dict(zip(rows[head], row)))
    return table


def test_every_file_function_and_test_of_the_claims_table_exists():
    table, tests = claims(), source_files("tests")
    assert len(table) >= 8
    for row in table:
        files = [ROOT / name for name in named(row["file"])]
        assert files and all(path.exists() for path in files), row
        known = set().union(*map(definitions, files))
        assert named(row["function"]) and not set(named(row["function"])) - known, row
        for name in named(row["test"]):
            file, _, function = name.partition("::")
            places = [path for path in tests if path.as_posix().endswith("/" + file)]
            assert len(places) == 1, row
            assert not function or function in definitions(places[0]), row


def test_what_is_to_be_read_in_an_hour_exists():
    *rows, together = table_under("hour")
    assert len(rows) >= 5
    for cell, lines, _, _ in rows:
        (file, *names), known = named(cell), definitions(ROOT / named(cell)[0])
        assert not set(names) - set(known), (file, names)
        assert int(lines) == sum(known[name] for name in names), (file, names)
    assert [int(together[i]) for i in (1, 3)] == [sum(int(row[i]) for row in rows) for i in (1, 3)]


# ---------------------------------------------------------------- what runs


def alone(name: str):
    """-> (the process, its seconds)"""
    start = time.time()
    return subprocess_of(f"{name}.py", timeout=120), time.time() - start


@pytest.fixture(scope="module")
def processes():
    """Each file by itself, two at a time."""
    names = (*MODELS, "data")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(alone, names)))


@pytest.mark.parametrize("name", [*MODELS, "data"])
def test_a_file_alone_shows_its_shapes_in_under_20_seconds(name, processes):
    done, seconds = processes[name]
    assert done.returncode == 0, done.stderr
    assert re.search(r"\(\d+(, \d+)+\)", done.stdout) and seconds < 20


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_help(name):
    done = (subprocess_of if name == "attention" else call)(f"{name}.py",
                                                            "--help")  # its `main` is not there to be called
    assert done.returncode == 0 and "usage:" in done.stdout, done.stdout + done.stderr


AT_TORCH = """import importlib, os, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
importlib.import_module(sys.argv[1])"""


@pytest.mark.parametrize("given, seen", [({}, "1200"), ({"GOMP_SPINCOUNT": "7"}, "7")])
@pytest.mark.parametrize("name", ["train", "evaluate", "sample"])
def test_how_threads_wait_is_settled_before_torch_is_loaded(name, given, seen):
    others = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", AT_TORCH, name], cwd=ROOT, env=others | given, capture_output=True,
                          text=True)
    assert done.stdout.split() == [seen], done.stderr
