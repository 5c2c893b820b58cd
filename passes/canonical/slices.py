"""Half of an expert's matrix, taken before the product, is half of the product: slices move behind contractions.

%g = index(%w, %e); %a = slice(%g) dim=2; contract(%x, %a)  →  %g = index(%w, %e); slice(contract(%x, %g)) dim=2
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from moec.ir.graph import Arg, Instr, Ref
from moec.passes.raising.word_contract import equation_of

_OF_EXPERTS = frozenset({"index", "take", "pick"})
"""What makes an expert's own matrix of the parameters."""


def behind_products(instrs: Iterable[Instr]) -> Iterator[Instr]:
    """The instructions, with each product of a sliced matrix as a slice of the product of the whole one."""
    defs: dict[str, Instr] = {}
    for instr in instrs:
        said = _sunk(defs, instr) if instr.word == "contract" else (instr,)
        for each in said:
            defs.update(dict.fromkeys(each.results, each))
            yield each


def _sunk(defs: dict[str, Instr], instr: Instr) -> tuple[Instr, ...]:
    parts, out = equation_of(instr)
    for place, (arg, letters) in enumerate(zip(instr.args, parts, strict=True)):
        cut = _made(defs, arg, {"slice"})
        whole = None if cut is None else _made(defs, cut.args[0], _OF_EXPERTS)
        if cut is None or whole is None:
            continue
        dim = cut.attr("dim")
        assert isinstance(dim, int)
        letter = letters[dim]
        if letter not in out or "".join(parts).count(letter) != 1:
            continue
        axis, kind = out.index(letter), instr.types[0]
        shape = (*kind.shape[:axis], whole.types[0].shape[dim], *kind.shape[axis + 1 :])
        name = f"{instr.results[0]}.whole"
        args = (*instr.args[:place], cut.args[0], *instr.args[place + 1 :])
        product = replace(instr, results=(name,), args=args, types=(replace(kind, shape=shape),))
        attrs = tuple((key, axis if key == "dim" else value) for key, value in cut.attrs)
        return (
            *_sunk(defs, product),
            replace(cut, results=instr.results, args=(Ref(name),), types=(kind,), attrs=attrs),
        )
    return (instr,)


def _made(defs: dict[str, Instr], arg: Arg, words: Collection[str]) -> Instr | None:
    made = defs.get(arg.name) if isinstance(arg, Ref) else None
    return made if made is not None and made.word in words else None
