"""From a function to its rewritten code object and back: same signature, closure, file, lines and name mangling."""

from __future__ import annotations
import __future__

import ast
import dis
import inspect
import linecache
import types
from functools import reduce
from operator import or_

_FUTURES = reduce(or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names))


class NoSource(Exception):
    """The function's source is not there, or is not what its code was compiled from."""


def parse(code: types.CodeType) -> ast.FunctionDef:
    """The function definition that `code` was compiled from, with the file's line numbers; raises NoSource."""
    lines = linecache.getlines(code.co_filename)
    if len(lines) < code.co_firstlineno:
        raise NoSource("its source is not available")
    try:
        block = _block(lines[code.co_firstlineno - 1 :])
        # A nested block parses inside an `if` that stands one line above it.
        nested = block[0][:1].isspace()
        tree = ast.parse("".join(["if 1:\n", *block]) if nested else "".join(block))
    except (SyntaxError, IndentationError) as error:
        raise NoSource(f"its source does not parse: {error}") from error
    first = tree.body[0]
    node = first.body[0] if nested and isinstance(first, ast.If) else first
    if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
        raise NoSource("its source is no plain function")
    return ast.increment_lineno(node, code.co_firstlineno - 1 - nested)


def _block(lines: list[str]) -> list[str]:
    """The lines of the definition that begins at the first one."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    body = False
    for i, line in enumerate(lines):
        text = line.strip()
        here = len(line) - len(line.lstrip())
        if body and text and here <= indent and text[0] not in "#)]}":
            try:
                ast.parse("".join(["if 1:\n", *lines[:i]]) if indent else "".join(lines[:i]))
            except SyntaxError:  # a string or a bracket reaches further left than its definition
                return inspect.getblock(lines)
            return lines[:i]
        body = body or (here > indent and bool(text))
    return lines


def compile_like(code: types.CodeType, node: ast.FunctionDef) -> types.CodeType:
    """A code object of `node` that can take the place of `code`; raises NoSource where it could not."""
    owner = _owner(code)
    inner: ast.stmt = node
    if owner:
        inner = ast.ClassDef(owner, [], [], [node], [])
        inner.type_params = []  # type: ignore[attr-defined]  # needed from 3.12 on
    free = [name for name in code.co_freevars if name != "__class__" or not owner]
    binds: list[ast.stmt] = [ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)) for name in free]
    outer = ast.FunctionDef("_moec_factory", _no_arguments(), [*binds, inner], [])
    outer.type_params = []  # type: ignore[attr-defined]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    flags = code.co_flags & _FUTURES
    compiled = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    found = _find(compiled, code.co_name, 3 if owner else 2)
    if found is None or found.co_freevars != code.co_freevars:
        raise NoSource("its closure could not be rebuilt")
    # The wrapper makes it a nested function, which is all that CO_NESTED says.
    flags = found.co_flags & ~inspect.CO_NESTED | code.co_flags & inspect.CO_NESTED
    found = found.replace(co_firstlineno=code.co_firstlineno, co_flags=flags)
    qualname: str | None = getattr(code, "co_qualname", None)
    return found.replace(**{"co_qualname": qualname}) if qualname is not None else found  # type: ignore[arg-type]


def same_code(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two code objects do the same: the check that a source is the one that was compiled."""
    if (a.co_varnames, a.co_freevars, a.co_cellvars) != (b.co_varnames, b.co_freevars, b.co_cellvars):
        return False
    if len(a.co_consts) != len(b.co_consts) or _words(a) != _words(b):
        return False
    return all(
        same_code(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else _equal(x, y)
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


def _words(code: types.CodeType) -> list[tuple[str, object]]:
    """The instructions, without what depends on the file's imports: `torch.f(…)` is compiled as a method or not."""
    return [
        ("LOAD_ATTR" if i.opname == "LOAD_METHOD" else i.opname, i.argval if i.opcode in dis.hasname else None)
        for i in dis.get_instructions(code)
        if i.opname not in ("PUSH_NULL", "EXTENDED_ARG")
    ]


def _equal(x: object, y: object) -> bool:
    return type(x) is type(y) and (x == y or repr(x) == repr(y))


def _owner(code: types.CodeType) -> str | None:
    """The class whose body holds the function; its name mangles `__x`, and `super()` needs its cell."""
    parts = getattr(code, "co_qualname", "").split(".")
    if len(parts) > 1 and parts[-2] != "<locals>":
        return parts[-2]
    return "_MoecOwner" if "__class__" in code.co_freevars else None


def _no_arguments() -> ast.arguments:
    return ast.arguments([], [], None, [], [], None, [])


def _find(code: types.CodeType, name: str, depth: int) -> types.CodeType | None:
    if depth == 0:
        return code if code.co_name == name else None
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found = _find(const, name, depth - 1)
            if found is not None:
                return found
    return None
