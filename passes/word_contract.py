"""How products over an axis are said: linear, matmul, bmm, einsum → contract(eq); grouped products → grouped."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import fx

from moec.graph import Arg, Ref, Type
from moec.passes.raise_graph import Builder, fake, type_of_fake
from moec.passes.words import named


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
    """x @ y, mm, bmm, matmul, without broadcasting of batch axes."""
    x, y = (build.value(a) for a in (*node.args, *node.kwargs.values())[:2])
    a, b = build.type_of(x), build.type_of(y)
    to = type_of_fake(fake(node))
    if a.rank < 2 or b.rank < 2:
        return None
    if b.rank == 2:
        lead = string.ascii_lowercase[: a.rank - 1]
        return contract(build, f"{lead}y,yz->{lead}z", x, y, to)
    if a.rank != b.rank or a.shape[:-2] != b.shape[:-2]:
        return None
    lead = string.ascii_lowercase[: a.rank - 2]
    return contract(build, f"{lead}xy,{lead}yz->{lead}xz", x, y, to)


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
    """einsum without ellipsis or repeated letters in one operand; of several operands, two at a time from the left."""
    eq, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(eq, str) or "." in eq or "->" not in eq or len(operands) < 2:
        return None
    inputs, out = eq.replace(" ", "").split("->")
    letters = inputs.split(",")
    if any(len(set(part)) != len(part) for part in letters):
        return None
    to = type_of_fake(fake(node))
    values = [build.value(o) for o in operands]
    sizes = {
        c: d
        for part, v in zip(letters, values, strict=True)
        for c, d in zip(part, build.type_of(v).shape, strict=False)
    }
    acc, have = values[0], letters[0]
    for i, (part, value) in enumerate(zip(letters[1:], values[1:], strict=True), start=2):
        later = set(out).union(*letters[i:])
        keep = out if i == len(letters) else "".join(c for c in dict.fromkeys(have + part) if c in later)
        kind = Type(to.dtype, tuple(sizes[c] for c in keep)) if i < len(letters) else to
        acc, have = contract(build, f"{have},{part}->{keep}", acc, value, kind), keep
    return acc


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
