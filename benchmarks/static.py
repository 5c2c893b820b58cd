"""What the compiled kernels look like, beside public Triton kernels; and which variants compile for which GPU. No GPU.

    python benchmarks/static.py                      # figures at the dimensions of three models, on three targets
    python benchmarks/static.py --variants           # every variant × every target: compiles, or refused and why
    python benchmarks/static.py --variants --write   # and put it into docs/kernels.md

Static figures are not run times: they show spills, narrow loads, missing matrix instructions and crowded inner loops.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from moec.codegen.plan import Sizes
from moec.errors import OptionError
from moec.gpu.offline import Compiled, Refused
from moec.gpu.target import gpu_target, gpu_targets
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.kernels.compiled import compile_layers
from moec.kernels.jobs import Request
from moec.options import Environment

DOC = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
ROUTER = RouterSpec(compute="bf16", renormalize=True, weight_dtype="bf16")
LAYER = KernelSpec(ExpertsSpec(dtype="bf16"), ROUTER, "bf16")
MODELS = {
    "Mixtral-8x7B": {"H": 4096, "F": 14336, "E": 8, "k": 2},
    "Qwen3-30B-A3B": {"H": 2048, "F": 768, "E": 128, "k": 8},
    "DeepSeek-V3": {"H": 7168, "F": 2048, "E": 256, "k": 8},
}
TOKENS = (1, 64, 4096)
TARGETS = ("sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Public:
    """A public kernel's hot loop: instructions a step of the source's loop, registers, spill instructions."""

    target: str
    tile: str
    kernel: str
    per_step: float
    registers: int
    spills: int


# Compiled with Triton 3.9.0 from the sources in the wheels of vLLM 0.33.0 (with its vendored triton_kernels), SGLang
# 0.5.23 and liger-kernel 0.8.5: gate/up product at Mixtral's dimensions in bf16 (SGLang's at Qwen3-30B-A3B's), read off
# the same way.
PUBLIC = (
    Public("sm_90", "16x64x128", "vLLM fused_moe, default", 113, 64, 0),
    Public("sm_90", "16x256x64", "triton_kernels", 131, 126, 0),
    Public("sm_90", "32x128x128", "vLLM fused_moe, tuned", 215, 129, 0),
    Public("sm_90", "128x128x64", "vLLM fused_moe, default", 118, 116, 0),
    Public("sm_90", "128x256x64", "vLLM fused_moe, tuned", 146, 210, 0),
    Public("sm_90", "128x256x64", "SGLang fused_moe, tuned", 138, 208, 0),
    Public("sm_90", "128x256x64", "triton_kernels, persistent", 135, 172, 0),
    Public("sm_90", "64x2x128x64", "Liger, SwiGLU fused", 140, 128, 0),
    Public("sm_100", "128x256x64", "vLLM fused_moe, tuned", 159, 184, 0),
    Public("sm_100", "64x2x128x64", "Liger, SwiGLU fused", 183, 110, 0),
    Public("gfx942", "128x128x64", "vLLM fused_moe, default", 116, 160, 0),
)

COLUMNS = (
    "target", "layer", "T", "kernel", "tile, warps, stages", "registers", "spills", "shared KB", "matrix unit",
    "instr/step", "narrow loads",
)  # fmt: skip

DESCRIPTORS = {"weights": "descriptors"}
SPECIALIZED = {"weights": "descriptors", "programs": 132, "specialized": True, "combine": "separate"}
# What the inner loops are held to: (target, tile, warps, stages, how it runs, instructions a step).
AIMS = (
    ("sm_90", (128, 256, 64), 8, 4, "pointers", {}, 100),
    ("sm_90", (128, 256, 64), 8, 4, "persistent", {"programs": 132}, 100),
    ("sm_90", (128, 256, 64), 8, 4, "descriptors", DESCRIPTORS, 105),
    ("sm_90", (128, 256, 64), 4, 4, "specialised, rows in order", SPECIALIZED, 55),
    ("sm_90", (16, 128, 128), 4, 4, "pointers", {}, 115),
    ("sm_90", (16, 128, 128), 4, 4, "descriptors", DESCRIPTORS, 115),
    ("gfx942", (128, 128, 64), 4, 2, "pointers", {}, 100),
)

# What the first product is called: with pairs sorted by expert, and at decode. Variants differ there.
FIRST = ("gate_up", "decode_route_gate_up")
VARIANTS = {
    "router, bf16": (LAYER, {}, ("router", "route")),
    "gate/up, bf16": (LAYER, {}, FIRST),
    "gate/up, f16": (KernelSpec(ExpertsSpec(dtype="f16"), None, "f16"), {}, FIRST),
    "gate/up, f32": (KernelSpec(ExpertsSpec(), None, "f32"), {}, FIRST),
    "gate/up, separate experts": (
        KernelSpec(ExpertsSpec(dtype="bf16", gate="separate", stacked=False), None, "bf16"), {}, FIRST,
    ),
    "decode, bf16": (LAYER, {"T": 1}, FIRST),
}  # fmt: skip
# How the grouped products of one layer run: (config, kernels). A target without the hardware for it refuses.
TILE = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 2}
SCHEDULES = {
    "persistent, pointers": ({"programs": 128}, ("gate_up", "down")),
    "descriptors": ({**TILE, "num_warps": 8, **DESCRIPTORS}, ("gate_up", "down")),
    "descriptors, persistent": ({**TILE, "num_warps": 8, **DESCRIPTORS, "programs": 128}, ("gate_up", "down")),
    "specialised": ({**TILE, **SPECIALIZED}, ("permute", "gate_up", "down")),
}
VARIANT_SIZES = {"T": 4096, "H": 2048, "F": 768, "E": 8, "k": 2}


def compiled(named, only, seconds):
    """The layers, in order, with a line of progress on stderr."""

    def told(done, of):
        print(f"\r{done} of {of} kernels", end="" if done < of else "\n", file=sys.stderr, flush=True)

    return compile_layers(named, Environment.read().cache_dir, seconds, only, told)


def variant_cell(layer):
    """One cell: `ok` and what is lacking, or why it was refused."""
    notes = []
    for kernel in layer.kernels:
        made = kernel.result
        if isinstance(made, Refused):
            return f"refused ({kernel.name}): {made.reason[:90]}"
        notes += [f"{kernel.name}: {problem}" for problem in made.figures.problems]
    return "ok" if not notes else "compiles; " + "; ".join(dict.fromkeys(map(_short, notes)))


def _short(note):
    return re.sub(r"spills: (\d+) stores, (\d+) loads.*", r"spills \1 + \2", note)


def schedules_table(schedules, targets, seconds):
    """Markdown: a row a target, a column a way to run the grouped products."""
    lines = ["| target | " + " | ".join(schedules) + " |", "|---" * (len(schedules) + 1) + "|"]
    cells = {(name, t): schedule_cell(name, t, seconds) for name in schedules for t in targets}
    return lines + [f"| {t} | " + " | ".join(cells[name, t] for name in schedules) + " |" for t in targets]


def schedule_cell(name, target, seconds):
    """As `variant_cell`, or what the target lacks; and whether warps are specialised where that was asked for."""
    config, only = SCHEDULES[name]
    request = Request(LAYER, Sizes(**VARIANT_SIZES), gpu_target(target), tuple(config.items()))
    try:
        (layer,) = compiled([(name, request)], only, seconds)
    except OptionError as error:
        return re.search(r"has no (.+?), which", str(error))[1].join(("not there: no ", ""))
    asked = config.get("specialized", False)
    ignored = [k.name for k in layer.kernels if asked and k.name != "permute" and not _specialized(k)]
    return f"ignored by the compiler: {', '.join(ignored)}" if ignored else variant_cell(layer)


def _specialized(kernel):
    return isinstance(kernel.result, Refused) or kernel.result.figures.specialized


def variants_table(variants, targets, seconds):
    """Markdown: a row a target, a column a variant."""
    lines = ["| target | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    cells = {}
    for name in variants:
        spec, changed, only = VARIANTS[name]
        sizes = Sizes(**{**VARIANT_SIZES, **changed})
        layers = compiled([(t, Request(spec, sizes, gpu_target(t))) for t in targets], only, seconds)
        cells |= {(name, t): variant_cell(layer) for t, layer in zip(targets, layers, strict=True)}
    return lines + [f"| {t} | " + " | ".join(cells[name, t] for name in variants) + " |" for t in targets]


def figures_table(models, tokens, targets, seconds):
    """Markdown: the first product of each model, T and target in the default configuration; and public kernels."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for target in targets:
        named = [
            (f"{model} | {t}", Request(LAYER, Sizes(T=t, **MODELS[model]), gpu_target(target)))
            for model in models
            for t in tokens
        ]
        for layer in compiled(named, FIRST, seconds):
            lines += [_row(target, layer, kernel) for kernel in layer.kernels]
    lines += [
        f"| {p.target} | public: {p.kernel} | | gate_up | {p.tile} | {p.registers} | {p.spills} | | | {steps:g} | |"
        for p, steps in ((p, p.per_step) for p in PUBLIC)
        if p.target in targets
    ]
    return lines


def _row(target, layer, kernel):
    c = layer.request.full_config
    tile = f"{c.block_m}x{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages}"
    start = f"| {target} | {layer.name} | {kernel.name} | {tile} |"
    if isinstance(kernel.result, Refused):
        return f"{start} refused: {kernel.result.reason} | | | | | |"
    f = kernel.result.figures
    loop = f.loop
    units = " ".join(sorted((loop.mma if loop else f.mma) or ("none",)))
    step = f"{loop.per_step:g}" if loop else ""
    narrow = loop.narrow if loop else ""
    spills, shared = f.spill_stores + f.spill_loads, f"{f.shared / 1024:.4g}"
    return f"{start} {f.registers} | {spills} | {shared} | {units} | {step} | {narrow} |"


def aims_table(targets, seconds):
    """Markdown: the tiles that inner loops are held to, at Mixtral's dimensions."""
    lines = ["| target | tile | how | aim, instr/step | gate_up | down |", "|---|---|---|---|---|---|"]
    for target, tile, warps, stages, how, schedule, aim in AIMS:
        if target not in targets:
            continue
        values = (
            *zip(("block_m", "block_n", "block_k"), tile, strict=True),
            ("num_warps", warps),
            ("num_stages", stages),
            *schedule.items(),
        )
        request = Request(LAYER, Sizes(T=4096, **MODELS["Mixtral-8x7B"]), gpu_target(target), values)
        (layer,) = compiled([("aim", request)], ("gate_up", "down"), seconds)
        found = {kernel.name: _per_step(kernel) for kernel in layer.kernels}
        shape = f"{'x'.join(map(str, tile))} w{warps} s{stages}"
        lines.append(f"| {target} | {shape} | {how} | {aim} | {found['gate_up']} | {found['down']} |")
    return lines


def _per_step(kernel):
    made = kernel.result
    if not isinstance(made, Compiled) or not made.figures.loop:
        return "none"
    return "; ".join((f"{made.figures.loop.per_step:g}", *made.figures.problems))


def write(name, lines):
    """Put the lines between the page's markers of this name."""
    text = DOC.read_text(encoding="utf-8")
    start, end = f"<!-- {name}: made by a command -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        raise SystemExit(f"{DOC} has no section between {start.strip()!r} and {end!r}")
    DOC.write_text(before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2], encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true", help="the table of variants and targets instead")
    parser.add_argument("--only", default="", help="models or variants, separated by semicolons")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--targets", default="", help="separated by commas")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one kernel may compile")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    args = parser.parse_args()
    chosen = [name.strip() for name in args.only.split(";") if name.strip()]
    if args.variants:
        targets = args.targets.split(",") if args.targets else [t.name for t in gpu_targets()]
        variants = [name for name in VARIANTS if not chosen or name in chosen]
        schedules = [name for name in SCHEDULES if not chosen or name in chosen]
        sections = {
            **({"variants": variants_table(variants, targets, args.timeout)} if variants else {}),
            **({"schedules": schedules_table(schedules, targets, args.timeout)} if schedules else {}),
        }
    else:
        targets = args.targets.split(",") if args.targets else TARGETS
        tokens = [int(t) for t in args.tokens.split(",")]
        figures = figures_table(chosen or list(MODELS), tokens, targets, args.timeout)
        sections = {"figures": figures, "aims": aims_table(targets, args.timeout)}
    for name, lines in sections.items():
        print("\n".join(lines))
        if args.write:
            write(name, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
