"""Automatic wrong answers: the real bodies of an exercise with one small thing changed, wherever it applies.

    python -m tests.tools.mutants [N …]      how many the graders reject, and those that they let pass

An operator turned round (+ and −, × and ÷, < and ≤, and and or) or one of its sides left out, a sign or a `not` taken
away, a constant one more or one less, mean for sum, a `.detach()` or another call without arguments left out, an
argument left out, the two arguments of a call or the first items of a list exchanged, an item left out, a statement
left out. Those in SAME were looked at and say what the source says; none of the others may pass.
"""

import ast
import copy
import sys
import time
from collections.abc import Iterator

from exercises.cut import ROOT, bodies_of, version_with
from exercises.judge import cut_of, passes

TURNED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
          ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
          ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd,
          ast.BitAnd: ast.BitOr}
RENAMED = {"mean": "sum", "sum": "mean", "cos": "sin", "sin": "cos", "amax": "amin", "maximum": "minimum", "max": "min",
           "min": "max", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like"}

SYMMETRIC, CLAMP = "the square of a difference has no order", "no batch of 64 meets the clamp's ends"
SAME = {  # exercise -> a change that no claim rejects: why it says the same
    3: {"Tiled.forward line 4: without device=": "on a CPU",
        "Tiled.forward line 6: 1 → 0": "one −∞ for all rows in place of one each",
        "Tiled.forward line 7: zeros_like → ones_like": "the first tile multiplies it by 2^−∞",
        "Tiled.forward line 12: arguments exchanged": "a maximum has no order",
        "Tiled.forward line 19: 0 → 1": "a sum whose largest term is 1 is 1 at least, or nothing",
        "Tiled.forward line 19: 1.0 → 2.0": "nothing, divided by another number"},
    4: {"logit_normal_times line 3: without the last argument": CLAMP,
        "logit_normal_times line 3: 1e-06 → -0.999999": CLAMP, "logit_normal_times line 3: Sub → Add": CLAMP,
        "logit_normal_times line 3: only the left of Sub": CLAMP, "logit_normal_times line 3: 1 → 2": CLAMP,
        "flow_matching_loss line 2: without .float()": "z and ε are float32 already"},
    5: {"sample line 4: without dtype=": "σ is right to seven digits instead of sixteen",
        "sample line 5: without .tolist()": "a tensor of one number for a number",
        "sample line 16: Add → Sub": "−ε is as likely as ε"},
    6: {"Static.weights line 2: 0 → -1": "the only axis, counted from the other end"},
    7: {"MLLM.with_reference line 7: 1 → 2": "the positions of two rows are those of one",
        "MLLM.with_reference line 7: 1 → 0": "the positions of no row are those of one"},
    8: {"frozen_copy line 2: False → True": "self_distillation detaches it",
        "self_distillation line 2: without .detach()": "frozen_copy has frozen it",
        "self_distillation line 2: arguments exchanged": SYMMETRIC,
        "tokenizer_losses line 3: arguments exchanged": SYMMETRIC,
        "tokenizer_losses line 10: arguments exchanged": SYMMETRIC,
        "tokenizer_losses line 12: arguments exchanged": SYMMETRIC,
        "tokenizer_losses line 16: without with": "in float32",
        "tokenizer_losses line 17: without .float()": "in float32"},
    9: {"alignment_loss line 2: arguments exchanged": "a cosine has no order",
        "alignment_loss line 2: without .float()": "in float32"},
}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """(in words, what stands in the place of `node`; None: nothing)"""
    def with_(**fields):
        new = copy.deepcopy(node)
        for key, value in fields.items():
            setattr(new, key, value)
        return new

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in TURNED:
        yield f"{type(node.op).__name__} → {TURNED[type(node.op)].__name__}", with_(op=TURNED[type(node.op)]())
    if isinstance(node, ast.BinOp):
        for side in ("left", "right"):
            yield f"only the {side} of {type(node.op).__name__}", copy.deepcopy(getattr(node, side))
    if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
        new = TURNED[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} → {new.__name__}", with_(ops=[new(), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield f"without {type(node.op).__name__}", copy.deepcopy(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for step in (1, -1):
            yield f"{node.value} → {node.value + step}", ast.Constant(node.value + step)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield f"{node.value} → {not node.value}", ast.Constant(not node.value)
    if isinstance(node, ast.Attribute) and node.attr in RENAMED:
        yield f"{node.attr} → {RENAMED[node.attr]}", with_(attr=RENAMED[node.attr])
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            yield f"without .{node.func.attr}()", copy.deepcopy(node.func.value)
        for i, keyword in enumerate(node.keywords):
            if keyword.arg:
                yield f"without {keyword.arg}=", with_(keywords=node.keywords[:i] + node.keywords[i + 1:])
        if len(node.args) > 1 and not isinstance(node.args[-1], ast.Starred):
            yield "without the last argument", with_(args=node.args[:-1])
        if len(node.args) == 2 and not any(isinstance(one, ast.Starred) for one in node.args):
            yield "arguments exchanged", with_(args=node.args[::-1])
    if isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 1 and isinstance(node.ctx, ast.Load):
        yield "items exchanged", with_(elts=[node.elts[1], node.elts[0], *node.elts[2:]])
    if isinstance(node, ast.List | ast.Tuple | ast.Set) and len(node.elts) > 1 and isinstance(
            getattr(node, "ctx", ast.Load()), ast.Load):
        for i in range(len(node.elts)):
            yield f"without item {i + 1}", with_(elts=node.elts[:i] + node.elts[i + 1:])
    if isinstance(node, ast.Dict):
        for i in range(len(node.keys)):
            yield f"without item {i + 1}", with_(keys=node.keys[:i] + node.keys[i + 1:],
                                                 values=node.values[:i] + node.values[i + 1:])
    if isinstance(node, ast.IfExp):
        yield "branches exchanged", with_(body=node.orelse, orelse=node.body)
    if isinstance(node, ast.With):
        yield "without with", [copy.deepcopy(statement) for statement in node.body]
    if isinstance(node, ast.Expr | ast.AugAssign):
        yield "a statement left out", None


class Change(ast.NodeTransformer):
    """Makes change number `wanted`, counted in the order in which nodes are visited."""

    def __init__(self, wanted: int):
        self.wanted, self.count, self.about = wanted, 0, ""

    def visit(self, node):
        for about, new in changes(node):
            self.count += 1
            if self.count - 1 == self.wanted:
                self.about = f"line {getattr(node, 'lineno', '?')}: {about}"
                return new
        return self.generic_visit(node)


def mutants(body: str) -> Iterator[tuple[str, str]]:
    """(in words, a body with one thing changed); those that say the same as `body` are left out."""
    before, number = ast.unparse(ast.parse(body)), 0
    while True:
        change = Change(number)
        tree = change.visit(ast.parse(body))
        if not change.about:
            return
        try:
            text = ast.unparse(ast.fix_missing_locations(tree))
            compile("def f():\n" + "\n".join("    " + line for line in text.splitlines()), "", "exec")
            if text.strip() and text != before:
                yield change.about, text
        except (SyntaxError, ValueError, AttributeError):
            pass
        number += 1


def as_function(body: str) -> str:
    """A body with `return` parses only inside a function."""
    return "def f():\n" + "\n".join("    " + line for line in body.splitlines())


def all_mutants(number: int) -> Iterator[tuple[str, dict]]:
    """(in words, {file: {name: body}})"""
    for file, names in cut_of(number).items():
        for name, body in bodies_of((ROOT / file).read_text(encoding="utf-8"), names).items():
            if name.startswith("STAGES."):
                for about, text in mutants(body):
                    if len(text.splitlines()) == 2:
                        yield f"{name} {about}", {file: {name: text}}
                continue
            for about, text in mutants(as_function(body)):
                lines = text.splitlines()[1:]
                yield f"{name} {about}", {file: {name: "\n".join(line[4:] for line in lines)}}


def survivors(number: int, seed: int = 0, tell=lambda line: None) -> tuple[int, list[str]]:
    """-> (how many mutants there are, those that no claim rejects)"""
    count, passed = 0, []
    for about, files in all_mutants(number):
        count += 1
        try:
            own = version_with(files, "mutant")
            rejected = not passes(number, own, seed)
        except RecursionError:
            rejected = True
        if not rejected:
            passed.append(about)
            tell(about)
    return count, passed


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or range(1, 10)):
        start = time.time()
        count, passed = survivors(number)
        print(f"{number}: {count - len(passed)} of {count} rejected, {time.time() - start:.0f} s")
        for about in passed:
            print("   passes:", about, "–", SAME.get(number, {}).get(about, "WHY?"))
