"""A whole small model: prefill of a prompt and decoding token by token, moec beside eager and Inductor.

    python benchmarks/model.py                                # 4 layers of A with attention, 512 tokens, bf16 and f32
    python benchmarks/model.py --layer tiny --layers 2 --prompt 16 --decode 4 --no-inductor

moec compiles the library's eager form; beside it run every experts implementation of the library, plain and under
Inductor. Logits of every way are compared with eager's in fp32 before anything is timed. Prefill is one call on the
whole prompt; decoding is one token a call on a cache that was filled by it. Ways are timed in turns, one process each.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import (
    LAYERS,
    RESULTS,
    Shape,
    add_ways,
    check_names,
    only,
    panels,
    rows_data,
    save_figure,
    show_rows,
    write_json,
)
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moec.compare.measure import Ceilings, Layer, environment_line, measure_ceilings
from moec.compare.ways import MOEC, Budget, Row, Way, race
from moec.compare.worker import Built
from moec.ir.dtypes import DTYPES

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Of the logits' own size; where a token's choice of experts hangs on rounding, its logits may differ by more."""

MOST_WRONG = 0.02
"""Share of tokens whose logits may be further away, for that reason, in dtypes below fp32."""


@dataclass(frozen=True)
class Model:
    """Sizes of the whole model: its MoE layers, how many, and the vocabulary."""

    shape: Shape
    layers: int
    vocabulary: int
    prompt: int

    def cost(self, dtype: torch.dtype) -> Layer:
        """All layers' experts as one layer, for limits: attention and head are left out of the limit."""
        s = self.shape
        return Layer(s.hidden, s.width * self.layers, s.experts, s.top_k, dtype.itemsize)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="A", help=f"one of {LAYERS}")
    parser.add_argument("--layers", type=int, default=4, help="how many of them")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--decode", type=int, default=8, help="decoding calls timed, at most")
    parser.add_argument("--dtypes", default="bf16,f32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds to prepare one alternative")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds to time prefill, and decoding")
    parser.add_argument("--patience", type=float, default=30.0, help="skip alternatives whose call would be slower")
    parser.add_argument("--no-inductor", action="store_true", help="leave Inductor's compilations out")
    parser.add_argument("--rest", default="inductor", choices=("inductor", "aot_eager", "eager"), help="moec's option")
    add_ways(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "model.json")
    parser.add_argument("--plot", type=Path, help="also write a PNG (needs the bench extra)")
    asked = parser.parse_args(arguments)
    if asked.layer not in LAYERS:
        parser.error(f"--layer {asked.layer!r} is unknown; expected one of {LAYERS}")
    check_names(parser, asked, dtypes=DTYPES)
    for name in ("layers", "vocabulary", "prompt", "decode"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} {getattr(asked, name)} is too small; expected 1 or more")
    return asked


def library_model(model: Model, implementation: str, dtype: torch.dtype) -> nn.Module:
    """The transformers model of these sizes, seeded, with that experts implementation."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    s = model.shape
    heads = max(s.hidden // 128, 2)
    config = Qwen3MoeConfig(
        vocab_size=model.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=s.width,
        moe_intermediate_size=s.width,
        num_hidden_layers=model.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=s.hidden // heads,
        num_experts=s.experts,
        num_experts_per_tok=s.top_k,
        norm_topk_prob=True,
        max_position_embeddings=4 * model.prompt + 64,
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=implementation)
    return made.eval()


def words(model: Model, count: int) -> Tensor:
    """Token ids [1, count], the same in every process."""
    return torch.randint(model.vocabulary, (1, count), generator=torch.Generator().manual_seed(1))


class Step:
    """One call: the prompt, or one token after it on a copy of the cache that the prompt left.

    The copy is part of every way's time alike.
    """

    def __init__(self, call: Callable[..., Any], model: Model, plain: nn.Module) -> None:
        self.call, self.prompt = call, model.prompt
        self.cache = plain(words(model, model.prompt), use_cache=True).past_key_values

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [1, T] → logits [T, V]."""
        if ids.shape[1] == self.prompt and self.prompt > 1:
            return self.call(ids, use_cache=False).logits[0]
        at = torch.arange(self.prompt, self.prompt + ids.shape[1])
        out = self.call(ids, past_key_values=copy.deepcopy(self.cache), use_cache=True, cache_position=at)
        return out.logits[0]


@dataclass(frozen=True)
class Made:
    """What all ways share: the file of the model in its dtype, and eager's logits [T, V] in fp32 by T."""

    file: Path
    logits: Mapping[int, Tensor]


def made(model: Model, dtype: str, folder: Path) -> Made:
    """Make the model once and store it; its weights are cast to fp32 for the logits and dropped again."""
    plain = library_model(model, "eager", DTYPES[dtype])
    torch.save(plain, folder / f"{dtype}.pt")
    exact = plain.float()
    reference = Step(exact, model, exact)
    return Made(folder / f"{dtype}.pt", {tokens: reference(words(model, tokens)) for tokens in (model.prompt, 1)})


def build(model: Model, dtype: str, shared: Made, implementation: str, backend: str, rest: str) -> Built:
    """One way, in its own process; backend '': eager. Inputs by T: the prompt, and 1 for a decoding step.

    Weights are mapped from the file: all processes read the same memory, so that a model fits once.
    """
    plain = torch.load(shared.file, mmap=True, weights_only=False)
    plain.set_experts_implementation(implementation)
    options = {"rest": rest} if backend == "moec" else None
    call = torch.compile(plain, backend=backend, options=options) if backend else plain
    step = Step(call, model, plain)

    def verdict(tokens: int, logits: Tensor) -> str:
        wanted = shared.logits[tokens]
        error = (logits.float() - wanted).abs().amax(-1) / wanted.abs().max()
        wrong = float((error > TOLERANCE[DTYPES[dtype]]).float().mean())
        allowed = 0.0 if DTYPES[dtype] is torch.float32 else MOST_WRONG
        found = f"WRONG: {100 * wrong:.0f} % of tokens, relative error {float(error.max()):.1e}"
        return "" if wrong <= allowed else found

    return Built(step, {model.prompt: words(model, model.prompt), 1: words(model, 1)}, verdict)


def ways(model: Model, dtype: str, shared: Made, inductor: bool, rest: str) -> list[Way]:
    """moec on the library's eager form, then every alternative."""

    def way(name: str, implementation: str, backend: str) -> Way:
        args = (model, dtype, shared, implementation, backend, rest)
        return Way(name, build, args, bool(backend), implementation == "batched_mm")

    found = [way(MOEC, "eager", "moec"), *(way(name, name, "") for name in ("eager", "grouped_mm", "batched_mm"))]
    if inductor:
        found += [way(f"Inductor, {name}", name, "inductor") for name in ("grouped_mm", "batched_mm", "eager")]
    return found


def measure(model: Model, dtype: str, asked: argparse.Namespace, ceilings: Ceilings, say: Console) -> tuple[Row, ...]:
    """Prefill and decode of one dtype."""
    shape = model.shape
    with TemporaryDirectory(prefix="moec-model-") as folder:
        say.log("the model's weights, and its logits in fp32")
        shared = made(model, dtype, Path(folder))
        return race(
            only(asked.ways, ways(model, dtype, shared, not asked.no_inductor, asked.rest)),
            {model.prompt: words(model, model.prompt), 1: words(model, 1)},
            model.cost(DTYPES[dtype]),
            ceilings,
            lambda ids: min(shape.experts, shape.top_k * ids.shape[1]),
            Budget(asked.patience, asked.budget, asked.seconds, repeats=asked.decode),
            step=lambda text: say.log(text),
        )


def rates_table(title: str, rows: Sequence[Row]) -> Table:
    """Tokens a second, with the median's time and spread, and the ratio to the best alternative."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("way")
    for row in rows:
        what = "decode" if row.tokens == 1 else f"prefill of {row.tokens}"
        for name in (f"{what}: tokens/s", "ms (least – most)", f"× {MOEC}"):
            table.add_column(name, justify="right")
    for name in dict.fromkeys(n for row in rows for n in (*row.times, *row.skipped)):
        cells: list[str] = []
        for row in rows:
            time, own = row.times.get(name), row.times.get(MOEC)
            if time is None:
                cells += ["–", "", ""]
                continue
            ratio = f"{time.median / own.median:.2f}" if own is not None else ""
            span = f"{time.median:.1f} ({time.low:.1f} – {time.high:.1f})"
            cells += [f"{1e3 * row.tokens / time.median:.1f}", span, ratio]
        table.add_row(name, *cells)
    limit = [cell for r in rows for cell in (f"{1e3 * r.tokens / r.limit_ms:.1f}", f"{r.limit_ms:.1f}", "")]
    table.add_row("limit of the experts alone", *limit, style="dim")
    return table


def plot(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Tokens a second, prefill and decode, one panel a dtype and phase."""
    phases = [(title, row) for title, rows in tables.items() for row in rows]
    figure, axes = panels(len(phases), 4.6, 3.8)
    for axis, (title, row) in zip(axes, phases, strict=True):
        names = list(row.times)
        colours = ["tab:green" if name == MOEC else "tab:gray" for name in names]
        axis.barh(names, [1e3 * row.tokens / row.times[name].median for name in names], color=colours)
        axis.set(title=f"{title.partition(':')[0]} {'decode' if row.tokens == 1 else 'prefill'}", xlabel="tokens/s")
        axis.invert_yaxis()
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON and the plot."""
    asked = parse(arguments)
    console, say = Console(), Console(stderr=True, highlight=False)
    console.print(environment_line(), highlight=False)
    model = Model(LAYERS[asked.layer], asked.layers, asked.vocabulary, asked.prompt)
    tables: dict[str, tuple[Row, ...]] = {}
    with torch.no_grad():
        for dtype in asked.dtypes.split(","):
            title = f"{dtype}: {asked.layers} × {asked.layer} with attention, vocabulary {asked.vocabulary}"
            rows = tables[title] = measure(model, dtype, asked, measure_ceilings(DTYPES[dtype]), say)
            show_rows(console, rates_table(title, rows), rows)
    say.print(f"wrote {write_json('model', {'model': asdict(model), 'ways': rows_data(tables)}, asked.out)}")
    if asked.plot:
        plot(tables, asked.plot)
        say.print(f"wrote {asked.plot}")


if __name__ == "__main__":
    main()
