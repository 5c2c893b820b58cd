"""Rewriting of expressions in a rolled body: what Dynamo cannot do with a symbolic item goes through `trace`."""

from __future__ import annotations

import ast
import copy

from moec.capture.asks import member_of
from moec.capture.events import loaded
from moec.capture.host import asked_numbers, indexing_lists, strip_listing
from moec.capture.recognise import Candidate, is_alias, is_one

RUNTIME = "_moec_trace"


class Unrollable(Exception):
    """A construct of the body that has no rolled form; the loop stays as written."""


def call(word: str, *args: ast.expr) -> ast.Call:
    """A call of a word of moec.capture.trace."""
    return ast.Call(ast.Attribute(name(RUNTIME), word, ast.Load()), list(args), [])


def name(text: str) -> ast.Name:
    """A name that is read."""
    return ast.Name(text, ast.Load())


def assign(target: str | ast.expr, value: ast.expr) -> ast.Assign:
    """`target = value`."""
    return ast.Assign([ast.Name(target, ast.Store()) if isinstance(target, str) else target], value)


class Words(ast.NodeTransformer):
    """Subscripts, conversions and keys made of the loop's item."""

    def __init__(self, candidate: Candidate, key: ast.Constant) -> None:
        self.aliases = candidate.aliases
        self.rows = candidate.selected
        # An index that may be the item; rows and masks that the item selected index as they are.
        self.items = candidate.tainted - candidate.selected
        self.key = key
        self.lists = indexing_lists(candidate.loop, candidate.tainted)
        self.asked = asked_numbers(candidate.loop)
        self.counters = frozenset(candidate.counters)

    def condition(self, test: ast.expr) -> ast.expr:
        """The test of a skip: `mask.any().item()` and `bool(mask.any())` stay tensors."""
        while isinstance(test, ast.Call):
            if isinstance(test.func, ast.Name) and test.func.id in ("bool", "int") and len(test.args) == 1:
                test = call("item_of", test.args[0])
                return self.visit(ast.Call(test.func, [test.args[0]], []))
            if isinstance(test.func, ast.Attribute) and test.func.attr == "item" and not test.args:
                test = test.func.value
                continue
            break
        return self.visit(test)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if not isinstance(node.ctx, ast.Load) or not self.indexes(node):
            self.generic_visit(node)
            return node
        return call("index", self.key, self.visit(node.value), self.visit(_key(node.slice)))

    def indexes(self, node: ast.Subscript) -> bool:
        if any(isinstance(inner, ast.Subscript) and _slices(inner.slice) for inner in ast.walk(node.slice)):
            return _slices(node.slice)  # rows of rows: `ids[idxs[start:end]]`
        return bool(loaded([node.slice]) & self.items)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        if not loaded([node.test]) & self.items:
            self.generic_visit(node)
            return node
        return call("select", self.key, self.condition(node.test), self.visit(node.body), self.visit(node.orelse))

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        held = member_of(node, self.aliases)
        if held is None:
            self.generic_visit(node)
            return node
        outside = ast.Constant(isinstance(node.ops[0], ast.NotIn))
        return call("member", self.visit(node.left), self.visit(held), outside)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in self.lists:
            return assign(target, self.visit(strip_listing(node.value)))
        if isinstance(target, ast.Name) and target.id in self.asked:
            return assign(target, self.condition(node.value))
        if len(node.targets) != 1 or not isinstance(target, ast.Subscript) or not self.indexes(target):
            self.generic_visit(node)
            return node
        at = self.visit(_key(target.slice))
        return ast.Expr(call("store", self.key, self.visit(target.value), at, self.visit(node.value)))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        if isinstance(node.target, ast.Name) and node.target.id in self.counters:
            return assign(node.target.id, ast.BinOp(name(node.target.id), node.op, self.visit(node.value)))
        if not isinstance(node.target, ast.Subscript) or not self.indexes(node.target):
            self.generic_visit(node)
            return node
        base, at = self.visit(node.target.value), self.visit(_key(node.target.slice))
        old = call("index", self.key, copy.deepcopy(base), copy.deepcopy(at))
        return ast.Expr(call("store", self.key, base, at, ast.BinOp(old, node.op, self.visit(node.value))))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        func, args = node.func, node.args
        if isinstance(func, ast.Name) and len(args) == 1 and not node.keywords and loaded(args) & self.items:
            if func.id == "int" and is_alias(args[0], self.aliases):
                return call("item_of", self.visit(args[0]))
            if func.id == "str" and is_alias(args[0], self.aliases):
                return call("text_key", ast.Constant(""), self.visit(args[0]), ast.Constant(""))
        if isinstance(func, ast.Name) and func.id == "int" and len(args) == 1 and self.number(args[0]):
            return call("item_of", self.visit(args[0]))
        unwraps = isinstance(func, ast.Attribute) and func.attr in ("item", "tolist")
        if (
            isinstance(func, ast.Attribute)
            and unwraps
            and (is_alias(func.value, self.aliases) or self.number(func.value))
        ):
            return call("item_of", self.visit(func.value))
        if unwraps and loaded([func]) & self.items | loaded([func]) & self.rows:
            raise Unrollable(f"the body moves rows to the host: {ast.unparse(node)}")
        self.generic_visit(node)
        return node

    def number(self, expr: ast.expr) -> bool:
        """Whether an expression is a number looked up at the item: `counts[e]`, or `counts[e].item()`."""
        if isinstance(expr, ast.Call) and isinstance(expr.func, ast.Attribute) and expr.func.attr == "item":
            expr = expr.func.value
        return isinstance(expr, ast.Subscript) and not _slices(expr.slice) and self.indexes(expr)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        parts = [part for part in node.values if isinstance(part, ast.FormattedValue)]
        if len(parts) != 1 or not is_alias(parts[0].value, self.aliases):
            self.generic_visit(node)
            return node
        place = node.values.index(parts[0])
        prefix, suffix = (
            "".join(str(part.value) for part in side if isinstance(part, ast.Constant))
            for side in (node.values[:place], node.values[place + 1 :])
        )
        return call("text_key", ast.Constant(prefix), self.visit(parts[0].value), ast.Constant(suffix))


def _slices(at: ast.expr) -> bool:
    return any(isinstance(part, ast.Slice) for part in (at.elts if isinstance(at, ast.Tuple) else [at]))


def _key(at: ast.expr) -> ast.expr:
    """An index as an expression of its own: `a:b` is `slice(a, b, None)`."""
    if isinstance(at, ast.Slice):
        if at.lower is not None and is_one(at, loaded([at.lower])):
            return call("one", at.lower)
        bounds = [bound if bound is not None else ast.Constant(None) for bound in (at.lower, at.upper, at.step)]
        return call("span", *bounds)
    if isinstance(at, ast.Tuple):
        return ast.Tuple([_key(part) for part in at.elts], ast.Load())
    return at
