"""The rewrite of a loop over experts: `for e in items: BODY` becomes `e = anchor(items); BODY; end`, traced once."""

from __future__ import annotations

import ast
import copy
import dataclasses
from dataclasses import dataclass, field

from moec.capture.branches import branches, only_adds
from moec.capture.crowded import uncrowded
from moec.capture.empty import unguarded
from moec.capture.events import called, loaded, stored
from moec.capture.host import kept_form, scope_of, strip_listing
from moec.capture.rebinds import recast
from moec.capture.recognise import Candidate, is_alias
from moec.capture.slices import appended_to
from moec.capture.words import Unrollable, Words, assign, call, name

_ITEM = "_moec_item"
_KIND = "_moec_kind"


def rolled(candidate: Candidate, key: str, function: ast.AST) -> list[ast.stmt]:
    """The straight-line body that stands for the loop in `function`; raises Unrollable."""
    scope = scope_of(function)
    out: list[ast.stmt] = []
    loop = uncrowded(candidate.loop, candidate.tainted, ast.Constant(key))
    loop = unguarded(loop, candidate.tainted, ast.Constant(key))
    kinds = not (candidate.counters or candidate.collected) and only_adds(loop.body)
    for part in branches(dataclasses.replace(candidate, loop=loop)):
        again = [ast.Expr(call("enter", ast.Constant(key)))] if out else []
        out += [*again, *_Roller(part, ast.Constant(key), scope.hosts, scope.given, kinds).run()]
    if not kinds:
        return out
    again = ast.If(name(_KIND), [ast.Expr(call("enter", ast.Constant(key)))], [])
    every = call("kinds", ast.Constant(key))
    return [ast.For(ast.Name(_KIND, ast.Store()), every, [again, *out], [])]


@dataclass
class _Roller:
    candidate: Candidate
    key: ast.Constant
    hosts: frozenset[str]
    given: frozenset[str]
    kinds: bool = False  # whether it may be traced once for each kind of expert
    item: str = _ITEM
    words: Words = field(init=False)
    bound: set[str] = field(default_factory=set)  # what the statements so far bind
    handed: set[str] = field(default_factory=set)  # carried values whose next value is settled

    def __post_init__(self) -> None:
        self.words = Words(self.candidate, self.key)

    def run(self) -> list[ast.stmt]:
        loop = copy.deepcopy(self.candidate.loop)
        out = self.bind(loop.target, loop.iter)
        for value in self.candidate.carried:
            out += [
                assign(value, call("carry", self.key, name(value), name(_ITEM))),
                assign(f"_moec_head_{value}", name(value)),
            ]
        for value in self.candidate.in_place:
            out.append(assign(f"_moec_head_{value}", name(value)))
        out += self.block(loop.body)
        early = set(self.handed)
        out += [self.hand_over(value) for value in self.candidate.carried if value not in early]
        out += [assign(value, name(f"_moec_next_{value}")) for value in self.candidate.carried]
        for value in self.candidate.in_place:
            out.append(assign(value, call("in_place", self.key, name(f"_moec_head_{value}"), name(value))))
        out.append(ast.Expr(call("leave", name(_ITEM))))
        for value in self.candidate.collected:
            add = ast.Call(ast.Attribute(name(value), "append", ast.Load()), [name(f"_moec_rows_{value}")], [])
            out.append(ast.Expr(add))
        return out

    def hand_over(self, value: str) -> ast.stmt:
        """What a carried value is at the next iteration, unless an earlier skip ended this one."""
        self.handed.add(value)
        new = call("carried", self.key, name(f"_moec_head_{value}"), name(value), name(_ITEM))
        return assign(f"_moec_next_{value}", new)

    def before_skip(self, rest: list[ast.stmt]) -> list[ast.stmt]:
        """A skip must not undo what was bound before it."""
        done = [v for v in self.candidate.carried if v in self.bound and v not in self.handed]
        torn = set(done) & stored(rest) | {v for v in self.handed if v in stored(rest)}
        if torn:
            raise Unrollable(f"{', '.join(sorted(torn))} changes both before and after a continue")
        return [self.hand_over(value) for value in done]

    def collect(self, stmt: ast.stmt) -> ast.stmt | None:
        """`outs.append(y)` of a list that is joined after the loop."""
        target = appended_to(stmt)
        if target is None or target not in self.candidate.collected or not isinstance(stmt, ast.Expr):
            return None
        assert isinstance(stmt.value, ast.Call)
        rows = self.words.visit(stmt.value.args[0])
        return assign(f"_moec_rows_{target}", call("collect", self.key, rows, name(_ITEM)))

    def bind(self, target: ast.expr, items: ast.expr) -> list[ast.stmt]:
        """The statements that bind the loop's targets to the anchor and to what it indexes."""
        if isinstance(items, ast.Call) and isinstance(items.func, ast.Name) and items.func.id in ("enumerate", "zip"):
            if items.keywords and items.func.id == "zip":
                items = ast.Call(items.func, items.args, [])
            return self.bind_joint(target, items)
        target, held = self.of_items(target, items)
        if held is not items:
            if isinstance(held, ast.Call) and called(held) == "zip":
                return self.bind_joint(target, held)
            return self.bind_joint(ast.Tuple([target], ast.Store()), ast.Call(name("zip"), [held], []))
        like = copy.deepcopy(self.candidate.like)
        if isinstance(items, (ast.Name, ast.Attribute)) and isinstance(target, ast.Name):
            self.item = target.id
            walked = call("walk", self.key, name("_moec_seq0"), name(_ITEM), self.as_key(target))
            begin = call("anchor_of", self.key, name("_moec_seq0"), like)
            return [assign("_moec_seq0", items), *self.begins(begin), assign(target, walked)]
        self.item = target.id if isinstance(target, ast.Name) else _ITEM
        begin = call("anchor", self.key, strip_listing(items), like)
        return [*self.begins(begin), assign(target, name(_ITEM))]

    def begins(self, anchor: ast.expr) -> list[ast.stmt]:
        """The item, before anything is looked up at it."""
        only = [ast.Expr(call("only", self.key, name(_KIND), name(_ITEM)))] if self.kinds else []
        return [assign(_ITEM, anchor), *only]

    def as_key(self, target: ast.expr) -> ast.Constant:
        """Whether the body does nothing with an item but look a dictionary up: `experts[name]`, `g[:, int(name)]`."""
        if not isinstance(target, ast.Name):
            return ast.Constant(False)
        body = ast.Module(self.candidate.loop.body, [])
        return ast.Constant(only_keys(body, target.id, target.id in self.candidate.aliases))

    def of_items(self, target: ast.expr, items: ast.expr) -> tuple[ast.expr, ast.expr]:
        """`experts.items()` as the zip of its keys and values, or as its values when the keys are not read."""
        if not isinstance(items, ast.Call) or not isinstance(items.func, ast.Attribute) or items.func.attr != "items":
            return target, items
        if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
            raise Unrollable("the items of a dictionary are not unpacked into a name and an expert")
        held = items.func.value
        keys, values = (ast.Call(ast.Attribute(copy.deepcopy(held), f, ast.Load()), [], []) for f in ("keys", "values"))
        if not loaded(self.candidate.loop.body) & stored([target.elts[0]]):
            return target.elts[1], values
        return target, ast.Call(name("zip"), [keys, values], [])

    def bind_joint(self, target: ast.expr, items: ast.Call) -> list[ast.stmt]:
        sequences: list[tuple[ast.expr, ast.expr]] = []
        counter: tuple[ast.expr, ast.expr | None] | None = None
        func = items.func
        if isinstance(func, ast.Name) and func.id == "enumerate":
            if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
                raise Unrollable("enumerate is not unpacked into two targets")
            start = items.args[1] if len(items.args) > 1 else next((k.value for k in items.keywords), None)
            counter, (target, inner) = (target.elts[0], start), self.of_items(target.elts[1], items.args[0])
        else:
            inner = items
        if isinstance(inner, ast.Call) and called(inner) == "zip":
            if not isinstance(target, ast.Tuple) or len(target.elts) != len(inner.args):
                raise Unrollable("zip is not unpacked into as many targets")
            sequences = list(zip(target.elts, inner.args, strict=True))
        else:
            sequences = [(target, inner)]
        out: list[ast.stmt] = []
        for i, (_, sequence) in enumerate(sequences):
            kept = kept_form(sequence, self.hosts, self.given)
            plain = _held(strip_listing(sequence)) if kept is None else kept
            out.append(assign(f"_moec_seq{i}", plain))
        sizes: list[ast.expr] = [call("length", name(f"_moec_seq{i}")) for i in range(len(sequences))]
        size = sizes[0] if len(sizes) == 1 else call("shortest", self.key, *sizes)
        out += self.begins(call("anchor_each", self.key, size, copy.deepcopy(self.candidate.like)))
        for i, (part, sequence) in enumerate(sequences):
            at = [name(f"_moec_seq{i}"), name(_ITEM)]
            values = isinstance(sequence, ast.Call) and called(sequence) != "keys"
            out.append(
                assign(part, call("index", self.key, *at) if values else call("each", self.key, *at, self.as_key(part)))
            )
        if counter is not None:
            place, start = counter
            value: ast.expr = name(_ITEM) if start is None else ast.BinOp(name(_ITEM), ast.Add(), start)
            self.item = place.id if isinstance(place, ast.Name) and start is None else _ITEM
            out.append(assign(place, value))
        return out

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The statements of the body; `continue` and a closing `if` become skips."""
        out: list[ast.stmt] = []
        for i, stmt in enumerate(body):
            rest = body[i + 1 :]
            if isinstance(stmt, ast.Continue):
                return out
            if isinstance(stmt, ast.If) and (self.depends(stmt.test) or has_continue(stmt)):
                return out + self.branch(stmt, rest)
            if has_continue(stmt):
                raise Unrollable("a continue stands inside another statement than a plain if")
            if isinstance(stmt, ast.Assign) and is_alias(stmt.value, self.candidate.aliases):
                self.item = next((t.id for t in stmt.targets if isinstance(t, ast.Name)), self.item)
            self.bound |= stored([stmt])
            out.append(self.collect(stmt) or self.plain(stmt))
        return out

    def branch(self, stmt: ast.If, rest: list[ast.stmt]) -> list[ast.stmt]:
        """An `if` that ends the iteration on one side."""
        if _is_continue(stmt.body):
            return self.skips(stmt.test, False, [*stmt.orelse, *rest])
        if _is_continue(stmt.orelse):
            return self.skips(stmt.test, True, [*stmt.body, *rest])
        if not stmt.orelse and not rest:
            return self.skips(stmt.test, True, stmt.body)
        raise Unrollable("an if that depends on the item has an else branch or statements after it")

    def joint(self, test: ast.BoolOp) -> ast.expr:
        """Tests joined by and/or as one condition: a skip is a row of conditions, any of which ends the iteration."""
        sides = [self.words.condition(side) for side in test.values]
        return call("joint", self.key, ast.Constant(isinstance(test.op, ast.And)), *sides)

    def depends(self, test: ast.expr) -> bool:
        return bool(loaded([test]) & self.candidate.tainted)

    def plain(self, stmt: ast.stmt) -> ast.stmt:
        for node in ast.walk(stmt):
            if isinstance(node, (ast.While, ast.ClassDef)):
                raise Unrollable(f"the body holds a {type(node).__name__.lower()} statement")
            if isinstance(node, ast.For) and self.depends(node.iter):
                raise Unrollable("a loop inside the body runs over something that depends on the item")
            if isinstance(node, ast.If) and self.depends(node.test):
                raise Unrollable("an if inside another statement depends on the item")
        for value in (*self.candidate.in_place, *self.candidate.carried):
            if recast(stmt, value) and isinstance(stmt, ast.Assign):
                stmt.value = call("in_place", self.key, name(value), stmt.value)
        return self.words.visit(stmt)

    def skips(self, test: ast.expr, negate: bool, rest: list[ast.stmt]) -> list[ast.stmt]:
        """`if test: continue` (negated: `if not test: continue`) followed by the rest of the body."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.skips(test.operand, not negate, rest)
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) != negate:
            test = self.joint(test)
        if isinstance(test, ast.BoolOp):
            first, *others = test.values
            then = ast.BoolOp(test.op, others) if len(others) > 1 else others[0]
            nested = ast.If(ast.UnaryOp(ast.Not(), then) if negate else then, [ast.Continue()], [])
            return self.skips(first, negate, [nested, *rest])
        item, negated = name(self.item), ast.Constant(negate)
        first_out = self.before_skip(rest)
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARISONS:
            left, right = (self.words.condition(side) for side in (test.left, test.comparators[0]))
            word = call(
                "skip_compare", self.key, item, left, ast.Constant(_COMPARISONS[type(test.ops[0])]), right, negated
            )
            return [*first_out, assign(self.item, word), *self.block(rest)]
        cond = assign("_moec_cond", test if is_joint(test) else self.words.condition(test))
        step = assign(self.item, call("skip", self.key, item, name("_moec_cond"), negated))
        guard = ast.UnaryOp(ast.Not(), call("always", name("_moec_cond"), negated))
        return [*first_out, cond, ast.If(guard, [step, *self.block(rest)], [])]


def is_joint(test: ast.expr) -> bool:
    """Whether a condition is already written in words."""
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and test.func.attr == "joint"


def only_keys(body: ast.AST, key: str, item: bool) -> bool:
    """Whether a name is read as an index alone; `item`: or as a number or a text, which words exist for."""
    fine: set[int] = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Subscript):
            fine |= {id(part) for part in (node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])}
        if item and isinstance(node, ast.Call) and called(node) == "int" and len(node.args) == 1:
            fine.add(id(node.args[0]))
        if item and isinstance(node, ast.FormattedValue):
            fine.add(id(node.value))
    return all(id(n) in fine for n in ast.walk(body) if isinstance(n, ast.Name) and n.id == key)


def _held(sequence: ast.expr) -> ast.expr:
    """`self.experts.values()` as `self.experts`: the words look a dictionary up by place."""
    if isinstance(sequence, ast.Call) and isinstance(sequence.func, ast.Attribute) and sequence.func.attr in _VIEWED:
        return sequence.func.value
    return sequence


_VIEWED = ("keys", "values")
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}


def _is_continue(block: list[ast.stmt]) -> bool:
    return len(block) == 1 and isinstance(block[0], ast.Continue)


def has_continue(stmt: ast.stmt) -> bool:
    """Whether a `continue` of the loop itself stands inside the statement."""
    if isinstance(stmt, ast.Continue):
        return True
    if isinstance(stmt, (ast.For, ast.While, ast.FunctionDef, ast.ClassDef)):
        return False
    return any(has_continue(child) for child in ast.iter_child_nodes(stmt) if isinstance(child, (ast.stmt)))
