"""How products over an axis are said: linear, matmul, bmm, einsum → contract(eq); grouped products → grouped."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.ir.graph import Arg, Dim, Instr, Ref, Type
from moec.passes.raising.raise_graph import Builder, fake, type_of_fake
from moec.passes.raising.word_views import reshape
from moec.passes.raising.words import named


def equation_of(contraction: Instr) -> tuple[list[str], str]:
    """The letters of each operand's axes, and of the result's."""
    inputs, out = str(contraction.attr("eq")).split("->")
    return inputs.split(","), out


def normal_equation(eq: str) -> str:
    """The einsum equation with letters renamed in order of appearance: `tk,nk->tn` → `ab,cb->ac`."""
    names: dict[str, str] = {}
    letters = iter(string.ascii_letters)
    return "".join(
        names.setdefault(c, next(letters)) if c.isalpha() and c not in names else names.get(c, c) for c in eq
    )


def contract(build: Builder, eq: str, x: Arg, y: Arg, to: Type) -> Ref:
    """einsum(eq, x, y)."""
    return build.emit("contract", (x, y), to, eq=normal_equation(eq))


def raise_linear(build: Builder, node: fx.Node) -> Arg | None:
    """linear(x, w, b) → add(contract(x, w), b)."""
    args = named(node, "input weight bias")
    x, w = build.value(args["input"]), build.value(args["weight"])
    if build.type_of(w).rank != 2:
        return None
    lead = string.ascii_lowercase[: build.type_of(x).rank - 1]
    to = type_of_fake(fake(node))
    out = contract(build, f"{lead}y,zy->{lead}z", x, w, to)
    return out if args.get("bias") is None else build.emit("add", (out, build.value(args["bias"])), to)


def raise_matmul(build: Builder, node: fx.Node) -> Arg | None:
    """x @ y, mm, bmm, matmul; an axis that one of the two is spread over is no axis of its."""
    x, y = (build.value(a) for a in (*node.args, *node.kwargs.values())[:2])
    to = type_of_fake(fake(node))
    a, b = build.type_of(x), build.type_of(y)
    if not isinstance(x, Ref) or not isinstance(y, Ref) or 0 in (a.rank, b.rank):
        return None
    lead = string.ascii_lowercase[: max(a.rank, b.rank) - 2] if max(a.rank, b.rank) > 2 else ""
    left = lead[len(lead) - max(a.rank - 2, 0) :] + ("x" if a.rank > 1 else "") + "y"
    right = lead[len(lead) - max(b.rank - 2, 0) :] + "y" + ("z" if b.rank > 1 else "")
    whole = dict(zip(lead, to.shape, strict=False))
    x, left = _without_spread(build, x, left, whole)
    y, right = _without_spread(build, y, right, whole)
    out = lead + ("x" if a.rank > 1 else "") + ("z" if b.rank > 1 else "")
    absent = [c for c in lead if c not in left + right]  # of size 1 in both
    made = contract(build, f"{left},{right}->{_without(out, absent)}", x, y, _kind(to, out, absent))
    return reshape(build, made, to)


def _without(letters: str, gone: Collection[str]) -> str:
    return "".join(c for c in letters if c not in gone)


def _kind(to: Type, letters: str, gone: Collection[str]) -> Type:
    return Type(to.dtype, tuple(d for c, d in zip(letters, to.shape, strict=True) if c not in gone))


def _without_spread(build: Builder, value: Ref, letters: str, whole: Mapping[str, Dim]) -> tuple[Arg, str]:
    """An operand without the axes of size 1 along which the product repeats it."""
    kind = build.type_of(value)
    sizes = dict(zip(letters, kind.shape, strict=True))
    gone = [c for c in letters if c in whole and sizes[c] == 1 and whole[c] != 1]
    if not gone:
        return value, letters
    to = _kind(kind, letters, gone)
    return reshape(build, _behind(build, value, to), to), _without(letters, gone)


def _behind(build: Builder, value: Ref, to: Type) -> Ref:
    """The value of type `to` that `value` is a view of, else `value`: an axis that was added for a product and goes."""
    held = value
    while (made := build.defs.get(held.name)) is not None:
        source = made.args[0] if made.word == "reshape" else None
        if not isinstance(source, Ref):
            break
        if build.type_of(source) == to:
            return source
        held = source
    return value


def raise_baddbmm(build: Builder, node: fx.Node) -> Arg | None:
    """baddbmm(b, x, y) and addmm → add(contract(x, y), b)."""
    args = named(node, "input batch1 batch2")
    if args.get("beta", 1) != 1 or args.get("alpha", 1) != 1:
        return None
    x = build.value(args.get("batch1", args.get("mat1")))
    y = build.value(args.get("batch2", args.get("mat2")))
    to = type_of_fake(fake(node))
    eq = "axy,ayz->axz" if build.type_of(x).rank == 3 else "xy,yz->xz"
    return build.emit("add", (contract(build, eq, x, y, to), build.value(args["input"])), to)


def raise_einsum(build: Builder, node: fx.Node) -> Arg | None:
    """einsum without repeated letters in one operand; of several operands, two at a time from the left."""
    eq, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(eq, str) or len(operands) < 2:
        return None
    values = [build.value(o) for o in operands]
    spelled = _spelled(eq.replace(" ", ""), [build.type_of(v).rank for v in values])
    if spelled is None:
        return None
    letters, out = spelled
    if any(len(set(part)) != len(part) for part in (*letters, out)):
        return None
    to = type_of_fake(fake(node))
    sizes: dict[str, Dim] = {}
    for part, v in zip(letters, values, strict=True):
        for c, d in zip(part, build.type_of(v).shape, strict=True):
            if sizes.setdefault(c, d) != d and 1 in (d, sizes[c]):  # one of size 1 is spread
                return None
    acc, have = values[0], letters[0]
    for i, (part, value) in enumerate(zip(letters[1:], values[1:], strict=True), start=2):
        later = set(out).union(*letters[i:])
        keep = out if i == len(letters) else "".join(c for c in dict.fromkeys(have + part) if c in later)
        kind = Type(to.dtype, tuple(sizes[c] for c in keep)) if i < len(letters) else to
        acc, have = contract(build, f"{have},{part}->{keep}", acc, value, kind), keep
    return acc


def _spelled(eq: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result, those that `…` and a missing result stand for written out."""
    inputs, arrow, out = eq.partition("->")
    parts = inputs.split(",")
    if len(parts) != len(ranks) or ("..." in inputs and any(len(p) - 3 > r for p, r in zip(parts, ranks, strict=True))):
        return None
    free = [c for c in reversed(string.ascii_letters) if c not in eq]
    wide = max((r - len(p) + 3 for p, r in zip(parts, ranks, strict=True) if "..." in p), default=0)
    more = "".join(free[:wide])
    if not arrow:
        once = sorted(c for c in set(inputs) - set(".,") if inputs.count(c) == 1)
        out = ("..." if "..." in inputs else "") + "".join(once)
    written = [
        p.replace("...", more[len(more) - (r - len(p) + 3) :]) if "..." in p else p
        for p, r in zip(parts, ranks, strict=True)
    ]
    if any(len(p) != r for p, r in zip(written, ranks, strict=True)):
        return None
    return written, out.replace("...", more)


def raise_tensordot(build: Builder, node: fx.Node) -> Arg | None:
    """tensordot(x, y, dims) → contract: the axes that are left, x's first."""
    args = named(node, "a b dims")
    x, y = build.value(args["a"]), build.value(args["b"])
    a, b = build.type_of(x), build.type_of(y)
    dims = args.get("dims", 2)
    if isinstance(dims, int):
        dims = (list(range(a.rank - dims, a.rank)), list(range(dims)))
    if len(dims) != 2 or not all(isinstance(d, int) for each in dims for d in each):
        return None
    left, right = string.ascii_lowercase[: a.rank], list(string.ascii_uppercase[: b.rank])
    over = [left[i % a.rank] for i in dims[0]]
    for letter, j in zip(over, dims[1], strict=True):
        right[j % b.rank] = letter
    out = _without(left + "".join(right), over)
    return contract(build, f"{left},{''.join(right)}->{out}", x, y, type_of_fake(fake(node)))


def raise_grouped(build: Builder, node: fx.Node) -> Arg | None:
    """grouped_mm(x[S, K], w[E, K, N], offs[E]) → grouped."""
    args = named(node, "mat_a mat_b offs bias")
    operands = [args.get("mat_a", args.get("input")), args.get("mat_b", args.get("weight")), args.get("offs")]
    if args.get("bias") is not None or not all(isinstance(o, fx.Node) for o in operands):
        return None
    x, w, offs = (build.value(o) for o in operands)
    if build.type_of(x).rank != 2 or build.type_of(w).rank != 3:
        return None
    return build.emit("grouped", (x, w, offs), type_of_fake(fake(node)))


def raise_custom_grouped(build: Builder, node: fx.Node) -> Arg | None:
    """A custom operator that has a grouped product's signature and, tried on numbers, behaves as one."""
    given = [*node.args, *node.kwargs.values()]
    tensors = [a for a in given if isinstance(a, fx.Node)]
    if len(tensors) != len(given):  # an option may change what the operator does
        return None
    fakes = [fake(a) for a in tensors]
    if len(fakes) != 3 or not all(isinstance(f, torch.Tensor) for f in fakes):
        return None
    if [f.dim() for f in fakes] != [2, 3, 1] or fakes[2].dtype not in (torch.int32, torch.int64):
        return None
    overload = overload_of(node)
    if (
        overload is None
        or overload._schema.is_mutable
        or not behaves_as_grouped(overload, fakes[0].dtype, fakes[2].dtype)
    ):
        return None
    x, w, offs = (build.value(a) for a in tensors)
    return build.emit("grouped", (x, w, offs), type_of_fake(fake(node)))


def overload_of(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator overload that a node calls; a packet's first when none is named."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return getattr(target, target.overloads()[0])
    return target if isinstance(target, torch._ops.OpOverload) else None


def behaves_as_grouped(op: torch._ops.OpOverload, dtype: torch.dtype, offs_dtype: torch.dtype) -> bool:
    """Whether op(x, w, offs) is rows [offs[e−1], offs[e]) of x times w[e], on two small random cases."""
    generator = torch.Generator().manual_seed(0)
    for ends in ([2, 2, 5, 7], [0, 4, 4, 7]):
        x = torch.randn(7, 8, generator=generator).to(dtype)
        w = torch.randn(4, 8, 16, generator=generator).to(dtype)
        starts = [0, *ends[:-1]]
        want = torch.cat([x[a:b].float() @ w[e].float() for e, (a, b) in enumerate(zip(starts, ends, strict=True))])
        try:
            with torch.no_grad():
                got = op(x, w, torch.tensor(ends, dtype=offs_dtype))
        except Exception:  # whatever it is, this operator is something else
            return False
        close = 1e-4 if dtype == torch.float32 else 5e-2
        if got.shape != want.shape or got.dtype != dtype or not torch.allclose(got.float(), want, close, close):
            return False
    return True
