"""`moec kernels` compiles without a GPU, shows tables and texts, compares; wrong input is one line."""

import json

import pytest

from moec.cli import commands as cli
from moec.codegen.plan import Sizes
from moec.errors import OptionError
from moec.gpu.offline import Pointer, Refused
from moec.gpu.target import gpu_target
from moec.kernels.compiled import Kernel, Layer
from moec.kernels.jobs import Request, kernel_jobs, parse_config, parse_spec, tensor_bytes
from moec.kernels.view import diff_view, layer_view
from moec.tools.typed import parse_sizes

SPEC = "experts{dtype=bf16} -> bf16"
SIZES = "T=64,H=2048,F=128,E=8,k=2"


def moec(*words):
    return cli.run(["kernels", *words])


def test_table_of_one_kernel(capsys):
    assert moec(SPEC, "--sizes", SIZES, "--target", "sm_80", "--kernel", "gate_up") == cli.OK
    out = capsys.readouterr().out
    assert "spec on sm_80 (A100 SXM)" in out
    assert "HMMA.16816×" in out
    assert "not run times" in out


def test_json_holds_every_figure(capsys):
    assert moec(SPEC, "--sizes", SIZES, "--target", "sm_80", "--kernel", "gate_up", "--json") == cli.OK
    (layer,) = json.loads(capsys.readouterr().out)
    (kernel,) = layer["kernels"]
    assert layer["clean"] is True
    assert layer["sizes"] == {"T": 64, "H": 2048, "F": 128, "E": 8, "k": 2, "O": 2048}
    assert kernel["figures"]["spill_stores"] == 0
    assert kernel["figures"]["loop"]["per_step"] > 0


def test_machine_code(capsys):
    assert moec(SPEC, "--sizes", SIZES, "--target", "sm_80", "--kernel", "gate_up", "--asm", "--ptx") == cli.OK
    out = capsys.readouterr().out
    assert "HMMA.16816" in out
    assert "mma.sync" in out


def test_diff_of_configurations(capsys):
    words = (SPEC, "--sizes", SIZES, "--target", "sm_80", "--kernel", "gate_up")
    assert moec(*words, "--diff", "num_stages=4", "num_stages=2") == cli.OK
    out = capsys.readouterr().out
    assert "shared KB" in out
    assert "num_stages=4" in out
    assert moec(*words, "--diff", "num_stages=4", "num_stages=4") == cli.OK
    assert "no figure differs" in capsys.readouterr().out
    assert moec(*words, "--diff", "num_stages=4", "num_stages=2", "--asm") == cli.OK
    out = capsys.readouterr().out
    assert out.startswith("--- old/gate_up.asm")
    assert "/*0000*/" not in out


def test_source_needs_no_figures(capsys):
    assert moec(SPEC, "--sizes", SIZES, "--target", "sm_80", "--kernel", "gate_up", "--source") == cli.OK
    compile(capsys.readouterr().out, "source", "exec")


def test_too_much_shared_memory_is_a_broken_promise(capsys):
    big = "block_m=128,block_n=256,block_k=64,num_warps=8,num_stages=4"
    words = (SPEC, "--sizes", "T=4096,H=4096,F=1024,E=8,k=2", "--target", "sm_86", "--kernel", "gate_up")
    assert moec(*words, "--config", big) == cli.BROKEN_PROMISE
    assert "over the limit" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((SPEC,), "--sizes lacks T, H, F, E, k"),
        ((SPEC, "--sizes", "T=64,H=256,F=128,E=8,k=9"), "k=9 is more than E=8"),
        ((SPEC, "--sizes", "T=x"), "--sizes 'T=x'"),
        ((SPEC, "--sizes", SIZES, "--target", "sm_91"), "did you mean 'sm_90'"),
        ((SPEC, "--sizes", SIZES, "--config", "blockm=64"), "did you mean 'block_m'"),
        ((SPEC, "--sizes", SIZES, "--config", "block_m=many"), "expected a number"),
        ((SPEC, "--sizes", SIZES, "--config", "block_m=48"), "expected a power of two"),
        ((SPEC, "--sizes", SIZES, "--kernel", "gateup"), "this call launches dispatch, gate_up, down"),
        ((SPEC, "--sizes", SIZES, "--diff", "sm_80,sm_90", "sm_80"), "--diff 'sm_80,sm_90'"),
        ((SPEC, "--sizes", SIZES, "--timeout", "0"), "--timeout 0"),
        (("experts{dtype=f8} -> bf16", "--sizes", SIZES), "f8"),
        (("experts{size=3} -> bf16", "--sizes", SIZES), "unknown field 'size'"),
        (("experts{dtype=bf16}", "--sizes", SIZES), "expected it to end in ' -> f32|bf16|f16'"),
        ((SPEC, "--sizes", SIZES, "--timeout", "nan"), "--timeout nan"),
        (("absent.py:make",), "does not exist"),
    ],
)
def test_bad_input_is_one_line(words, says, capsys):
    assert moec(*words) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def request(**changes):
    values = {"T": 64, "H": 256, "F": 128, "E": 8, "k": 2, **changes}
    return Request(parse_spec(SPEC), Sizes(**values), gpu_target("sm_90"))


def test_jobs_carry_the_sizes_of_tensors():
    jobs = {one.launch.kernel: one.job for one in kernel_jobs(request(F=1 << 20, E=64))}
    assert jobs["gate_up"].arguments["ab"] == Pointer("bf16", 64 * 2 * (1 << 20) * 256 * 2)
    assert jobs["gate_up"].arguments["h"] == Pointer("bf16", 64 * 2 * (1 << 20) * 2)
    separate = parse_spec("experts{dtype=bf16; gate=separate; stacked=False} -> bf16")
    assert tensor_bytes(separate, request().sizes)["a"] == 8 * 8


def test_varied_requests():
    base = request()
    assert base.varied("gfx942,num_stages=2").target.name == "gfx942"
    assert base.varied("gfx942,num_stages=2").full_config.num_stages == 2
    assert base.varied("experts{dtype=f16} -> f16").spec.experts.dtype == "f16"
    assert base.varied("block_m=32").varied("block_n=64").config == (("block_m", 32), ("block_n", 64))
    with pytest.raises(OptionError, match="expected a spec"):
        base.varied("")


def test_parse_config():
    assert parse_config(["block_m=64, num_warps=8", "combine=separate"]) == (
        ("block_m", 64),
        ("num_warps", 8),
        ("combine", "separate"),
    )


def test_sizes_of_a_layer():
    known = {"T": 1, "H": 2, "F": 3, "E": 4, "k": 1}
    two, one = parse_spec("experts{} -> f32"), parse_spec("experts{gate=none; activation=relu(a); out=False} -> f32")
    assert parse_sizes(two, "T=5", known) == Sizes(5, 2, 3, 4, 1)
    assert parse_sizes(two, "O=7", known) == Sizes(1, 2, 3, 4, 1, 7)
    assert parse_sizes(one, "F=6", {**known, "O": 3}) == parse_sizes(one, "F=6,O=6", known) == Sizes(1, 2, 6, 4, 1, 6)
    assert parse_sizes(two, "H=6", {**known, "O": 2}) == Sizes(1, 6, 3, 4, 1)  # as wide as what it reads
    assert parse_sizes(two, "H=6", {**known, "O": 5}) == Sizes(1, 6, 3, 4, 1, 5)
    with pytest.raises(OptionError, match="--sizes O=7: without an output matrix it is F=3"):
        parse_sizes(one, "O=7", known)


def test_refused_kernels_are_shown():
    from rich.console import Console

    layers = [Layer("spec", request(), (Kernel("gate_up", (1,), Refused(why, why)),)) for why in ("crashed", "hung")]
    console = Console(width=200, record=True)
    console.print(layer_view(layers[0]), diff_view(*layers))
    text = console.export_text()
    assert "refused: crashed" in text
    assert "refused: hung" in text
    assert not layers[0].clean
    assert layers[0].to_dict()["kernels"][0]["refused"] == "crashed"
