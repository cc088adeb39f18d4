"""Taking functions out of the source by name, putting others in, and loading what comes out beside the real thing.

A name is that of a function, `add_noise`, of a method, `DTR.weights`, or of a row of train.py's table, `STAGES.T1`, of
which what trains and the losses are taken out. All other lines, signatures and docstrings stay to the letter.
"""

import ast
import importlib
import importlib.abc
import importlib.util
import linecache
import sys
import textwrap
import zipfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("parts", "world", "exercises", "tests")  # folders of ours that import no file that an exercise changes
OURS = {path.stem for path in [*ROOT.glob("*.py"), *(init.parent for init in ROOT.glob("*/__init__.py"))]} - {*SHARED}


PACKED = ROOT / "exercises" / "source.zip"  # in a class's pack, whose files all have holes: the source, for the graders


class NoSuchName(ValueError):
    pass


@cache
def packed() -> dict[str, str]:
    """file -> its text without holes, in a class's pack; elsewhere the files themselves are whole."""
    if not PACKED.exists():
        return {}
    with zipfile.ZipFile(PACKED) as found:
        return {name: found.read(name).decode() for name in found.namelist()}


def source_of(file: str) -> str:
    """The real text of a file."""
    return packed().get(file) or (ROOT / file).read_text(encoding="utf-8")


def places(source: str) -> dict[str, tuple[int, int, int]]:
    """name -> (first line of its body behind the docstring, last line, columns of its indent); lines count from 1."""
    found, tree = {}, ast.parse(source)
    owners = [("", tree.body), *((f"{node.name}.", node.body) for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner, body in owners:
        for node in (node for node in body if isinstance(node, ast.FunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            found[owner + node.name] = first.lineno, node.end_lineno, first.col_offset
    return found


def rows(source: str) -> dict[str, list[ast.expr]]:
    """Name of a stage in train.py's table -> its `trains` and its `losses`."""
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(target, "id", "") == "STAGES":
            return {call.args[0].value: pair for call in node.value.elts
                    if None not in (pair := [argument(call, 2, "trains"), argument(call, 5, "losses")])}
    return {}


def argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    return call.args[place] if len(call.args) > place else named.get(name)


def names_in(source: str) -> set[str]:
    """What `put_in` and `bodies_of` can find in it."""
    return places(source).keys() | {f"STAGES.{name}" for name in rows(source)}


def put_in(source: str, bodies: dict[str, str]) -> str:
    """`source` with other bodies; "+" is put behind its imports. Of a row of the table the body is two expressions,
    one a line. Raises NoSuchName."""
    known, table = places(source), {f"STAGES.{name}": pair for name, pair in rows(source).items()}
    lines, changes = source.splitlines(keepends=True), []
    for name, body in bodies.items():
        if name == "+":
            last = max(node.end_lineno for node in ast.parse(source).body
                       if isinstance(node, (ast.Import, ast.ImportFrom)))
            changes.append((last, 0, last, 0, "".join(line + "\n" for line in textwrap.dedent(body).splitlines())))
        elif name in known:
            first, last, indent = known[name]
            line, column = lines[first - 1], 0
            if line[:indent].strip():  # the body stands behind its def
                column, indent = len(line[:indent].rstrip()), len(line) - len(line.lstrip()) + 4
            text = textwrap.indent(textwrap.dedent(body).strip("\n") + "\n", " " * indent)
            changes.append((first - 1, column, last, 0, "\n" * (column > 0) + text))
        elif name in table:
            for node, text in zip(table[name], textwrap.dedent(body).strip().splitlines()):
                changes.append((node.lineno - 1, node.col_offset, node.end_lineno - 1, node.end_col_offset, text))
        else:
            raise NoSuchName(f"the source has no {name} any more: change CUT of the exercise")
    for row, column, last, end, text in sorted(changes, reverse=True):
        tail = lines[last][end:] if last < len(lines) else ""
        head = lines[row][:column] if row < len(lines) else ""
        lines[row:last + (1 if last < len(lines) else 0)] = [head + text + tail]
    return "".join(lines)


def cut(source: str, names: list[str], number: int) -> tuple[str, int]:
    """-> (the source with these bodies taken out, how many lines they had)"""
    known, taken = places(source), 0
    bodies = {}
    for name in names:
        if name.startswith("STAGES."):
            bodies[name], taken = "{}\n{}", taken + 2
        else:
            bodies[name] = f'raise NotImplementedError("exercise {number}: {name}")'
            taken += known[name][1] - known[name][0] + 1 if name in known else 0
    return put_in(source, bodies), taken


def bodies_of(source: str, names: list[str]) -> dict[str, str]:
    """The real bodies, as `put_in` takes them."""
    known, lines, table = places(source), source.splitlines(), rows(source)
    found = {}
    for name in names:
        if name.startswith("STAGES."):
            pair = (ast.get_source_segment(source, node) for node in table[name.partition(".")[2]])
            found[name] = "\n".join(" ".join(text.split()) for text in pair)
        else:
            first, last, indent = known[name]
            body = [" " * indent + lines[first - 1][indent:], *lines[first:last]]
            found[name] = textwrap.dedent("\n".join(body))
    return found


def stand_alone(file: str, text: str, others: list[str]) -> str:
    """A learner's file, in which the functions of other exercises are the real ones: so that no exercise rests on
    another. Names that the learner's file lacks are left out."""
    there = names_in(text)
    return put_in(text, bodies_of(source_of(file), [name for name in others if name in there]))


# ---------------------------------------------------------------- several versions side by side


class Source(importlib.abc.SourceLoader):
    """A module whose text is given."""

    def __init__(self, path: str, text: str):
        self.path, self.text = path, text
        linecache.cache[path] = len(text), None, text.splitlines(True), path

    def get_filename(self, name):
        return self.path

    def get_data(self, path):
        return self.text.encode()


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules in `sources`, name -> (path, text); all others are the real ones."""

    def __init__(self, sources: dict[str, tuple[str, str]]):
        self.sources = sources

    def find_spec(self, name, path, target=None):
        if name in self.sources:
            where, text = self.sources[name]
            return importlib.util.spec_from_file_location(name, where, loader=Source(where, text))
        return None


def is_ours(name: str) -> bool:
    """Whether a loaded module is one that every version has for itself."""
    return name.partition(".")[0] in OURS


def whole() -> dict[str, tuple[str, str]]:
    """What a `Finder` takes in the place of a pack's files with holes."""
    return {file[:-3]: (f"source.zip/{file}", text) for file, text in packed().items()}


class Version:
    """The whole project with some files changed; an attribute is a module of it: `Version({…}).router.DTR`."""

    def __init__(self, sources: dict[str, tuple[str, str]] | None = None):
        self._finder, self._modules = Finder(whole() | (sources or {})), {}

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._modules:
            return self._modules[name]
        others = {key: sys.modules.pop(key) for key in list(sys.modules) if is_ours(key)}
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self._finder)
        try:
            return importlib.import_module(name)
        finally:
            sys.meta_path.remove(self._finder)
            self._modules = {key: sys.modules.pop(key) for key in list(sys.modules) if is_ours(key)}
            sys.modules.update(others)


def version_with(files: dict[str, dict[str, str]], label: str) -> Version:
    """The project with other bodies in some files: {"router.py": {"DTR.weights": "…"}}."""
    return Version({file[:-3]: (f"<{label}>/{file}", put_in(source_of(file), bodies))
                    for file, bodies in files.items()})
