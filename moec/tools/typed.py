"""What people type, as values: `--options key=value` pairs, sizes of layers, files to write. Errors are one line."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from moec.errors import OptionError, TargetError

if TYPE_CHECKING:
    from moec.codegen.tuning import Sizes
    from moec.ir.spec import KernelSpec

BOOLS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}
DTYPES = ("bf16", "f32", "f16")


@dataclass(frozen=True)
class DemoSize:
    """The demo's layer and what to measure: token counts T, hidden H, expert width F, experts E, top-k k."""

    tokens: tuple[int, ...]
    dtype: str
    hidden: int
    width: int
    experts: int
    top_k: int
    budget: float


def parse_options(pairs: Sequence[str], option: str = "--options") -> dict[str, Any]:
    """`kernels=eager`, `fuel=3` → typed values, checked as torch.compile's own options are; given by `option`."""
    from moec.options import Options

    hints = get_type_hints(Options)
    values: dict[str, Any] = {}
    for pair in (part for text in pairs for part in text.split(",")):
        name, equals, text = pair.partition("=")
        if not equals:
            raise OptionError(f"{option} {pair!r} is not key=value; for example {option} kernels=eager,fuel=3")
        name, value = name.strip(), _typed(name.strip(), text.strip(), hints.get(name.strip()))
        if values.get(name, value) != value:
            raise OptionError(f"{option} {pair!r}: {name} is {values[name]!r} already; give one of them")
        values[name] = value
    Options.make(values)
    return values


def _typed(name: str, text: str, hint: Any) -> Any:
    if hint is bool:
        if text.lower() not in BOOLS:
            raise OptionError(f"option {name}={text!r} is not a truth value; expected true or false")
        return BOOLS[text.lower()]
    if hint is int or hint is float:
        try:
            return hint(text)
        except ValueError:
            raise OptionError(f"option {name}={text!r} is not a number; expected {hint.__name__}") from None
    return text


def parse_sizes(spec: KernelSpec, text: str, known: Mapping[str, int] | None = None) -> Sizes:
    """`T=64,H=4096,F=14336,E=8,k=2` → Sizes of a layer; `known` ones need not be named.

    Nor need O: it is H, and F where experts have no output matrix, which give rows of no other width.
    """
    from moec.codegen.tuning import Sizes

    names, given = tuple(f.name for f in fields(Sizes)), dict[str, int]()
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in names or not value.isdigit() or int(value) < 1:
            raise OptionError(f"--sizes {part!r}: expected {', '.join(f'{n}=number' for n in names)}, each at least 1")
        given[name] = int(value)
    values = {**(known or {}), **given}
    if "O" not in given and values.get("O") == (known or {}).get("H"):  # it is H by being no other width, as in a spec
        values.pop("O", None)
    missing = [name for name in names if name != "O" and name not in values]
    if missing:
        raise OptionError(f"--sizes lacks {', '.join(missing)}; for example --sizes T=64,H=4096,F=14336,E=8,k=2")
    if values["k"] > values["E"]:
        raise OptionError(f"--sizes k={values['k']} is more than E={values['E']}")
    if not spec.experts.out:
        if given.get("O", values["F"]) != values["F"]:
            raise OptionError(f"--sizes O={given['O']}: without an output matrix it is F={values['F']}; leave it out")
        values["O"] = values["F"]
    return Sizes(**values)


def demo_size(tokens: str, dtype: str, hidden: int, width: int, experts: int, top_k: int, budget: float) -> DemoSize:
    """Checked sizes of the demo."""
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
    named = {"--hidden": hidden, "--width": width, "--experts": experts, "--top-k": top_k}
    for name, value in named.items():
        if value < 1:
            raise OptionError(f"{name} {value} is too small; expected 1 or more")
    if top_k > experts:
        raise OptionError(f"--top-k {top_k} is more than --experts {experts}; choose at most as many as there are")
    return DemoSize(token_counts(tokens), dtype, hidden, width, experts, top_k, seconds_given("--budget", budget))


def seconds_given(option: str, value: float) -> float:
    """A finite number of seconds above 0; raises OptionError."""
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{option} {value:g} is not a positive number of seconds; for example {option} 60")
    return value


def check_writable(option: str, path: Path | None) -> None:
    """Raises TargetError where no file can be written at a path that is given, before anything is computed for it."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise TargetError(f"{option} {path}: the folder {folder} does not exist; create it first")
    if path.is_dir():
        raise TargetError(f"{option} {path}: that is a folder; expected the path of a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise TargetError(f"{option} {path}: cannot be written by this user; choose another place")


def token_counts(text: str) -> tuple[int, ...]:
    """`1,8,64` → (1, 8, 64); raises OptionError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"--tokens {text!r} is not a list of positive numbers; for example --tokens 1,8,64")
    return tuple(map(int, parts))
