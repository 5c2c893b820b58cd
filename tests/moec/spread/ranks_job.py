"""What four ranks do in `test_ranks.py`: started once, each check by name, results as JSON lines of rank 0.

A check makes all its calls first and asserts after them, so that a failure on one rank leaves no other waiting.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch._inductor.compile_fx  # before there are four processes
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks_models import WIDTH, Deep, H, Layer, Own
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moec.backend import explain_call
from moec.errors import OptionError
from moec.exchange.cost import RowBytes, recorded_reach, rows_of
from moec.exchange.placement import Placement, Placements, write_placements
from moec.exchange.travel import Exchange
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.options import Options

RANKS = 4
QUICK = {"rest": "eager", "kernels": "eager", "proof": "off"}
FP32, SHORT = torch.float32, {"atol": 2e-5, "rtol": 1e-4}


def seeded(make, *args):
    torch.manual_seed(0)
    return make(*args)


def same(got, want, **tolerance):
    torch.testing.assert_close(got, want, **(tolerance or SHORT))


def summed(values):
    """The sum over ranks, of gradients that may be missing."""
    found = [v.clone() for v in values]
    for value in found:
        dist.all_reduce(value)
    return found


def drawn(kind, tokens, experts, k, seed):
    """weights f32[T, k], choices i64[T, k]."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, k, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]
    if kind == "one":
        ids = torch.full_like(ids, experts - 1)  # also: one expert several times in a token
    if kind == "none":
        ids = torch.where(torch.rand(tokens, k, generator=generator) < 0.4, -1, ids)
        ids = torch.where(torch.rand(tokens, k, generator=generator) < 0.2, experts + 3, ids)
    return weights, ids


def spread_op(x, weights, ids, params, spec, engine, owners, size=0):
    exchange = Exchange("layer", "world", Placement(tuple(owners), RANKS), size)
    return torch.ops.moec.spread_experts(x, weights, ids, params, str(spec), engine, str(exchange))


def one_rank(x, weights, ids, params, spec):
    return torch.ops.moec.experts(x, weights, ids, params, str(spec), "eager")


def stacks(experts, dtype=FP32, biased=False):
    generator = torch.Generator().manual_seed(experts)
    shapes = [(experts, 2 * WIDTH, H), (experts, H, WIDTH), *([(experts, 2 * WIDTH), (experts, H)] if biased else [])]
    return [(torch.randn(*shape, generator=generator) * 0.3).to(dtype) for shape in shapes]


SPEC = KernelSpec(ExpertsSpec())
CASES = [  # tokens of the ranks, kind of choice, E, k, owners, ranks a node, kernels
    ((7, 1, 13, 5), "mixed", 6, 2, None, 0, "auto"),
    ((7, 1, 13, 5), "mixed", 6, 2, None, 2, "eager"),
    ((0, 200, 0, 1), "mixed", 8, 8, None, 0, "eager"),
    ((0, 200, 0, 1), "mixed", 8, 8, None, 2, "auto"),
    ((0, 0, 0, 0), "mixed", 6, 2, None, 0, "eager"),
    ((0, 0, 0, 0), "mixed", 6, 2, None, 2, "auto"),
    ((13, 7, 1, 2), "one", 6, 2, None, 2, "eager"),
    ((13, 7, 1, 2), "one", 6, 3, (3, 3, 3, 0, 0, 0), 0, "auto"),
    ((13, 7, 0, 2), "none", 6, 4, (1, 1, 1, 1, 1, 1), 2, "eager"),
    ((13, 7, 0, 2), "none", 7, 4, (0, 3, 1, 3, 0, 2, 2), 2, "eager"),
    ((5, 5, 5, 5), "mixed", 3, 1, None, 0, "eager"),
    ((5, 5, 5, 5), "mixed", 1, 1, None, 2, "eager"),
]


def check_forward_and_gradients(rank):
    failures = []
    for number, (tokens, kind, experts, k, owners, size, engine) in enumerate(CASES):
        owners = owners or Placement.blocks(experts, RANKS).owners
        params = [p.requires_grad_() for p in stacks(experts)]
        x = torch.randn(H, tokens[rank], generator=torch.Generator().manual_seed(rank)).t().requires_grad_()
        weights, ids = drawn(kind, tokens[rank], experts, k, 10 * number + rank)
        weights.requires_grad_()
        leaves = [x, weights, *params]
        y = spread_op(x, weights, ids, params, SPEC, engine, owners, size)
        want = one_rank(x, weights, ids, params, SPEC)
        up = torch.randn(want.shape, generator=torch.Generator().manual_seed(rank))
        got, wanted = torch.autograd.grad(y, leaves, up), torch.autograd.grad(want, leaves, up)
        totals, all_wanted = summed(got[2:]), summed(wanted[2:])
        mine = torch.tensor([owner == rank for owner in owners])
        try:
            same(y, want)
            for one, other in zip((*got[:2], *totals), (*wanted[:2], *all_wanted), strict=True):
                same(one, other)
            for one, total in zip(got[2:], all_wanted, strict=True):
                same(one[mine], total[mine])  # everyone's tokens
                assert not one[~mine].any(), "gradients of an expert of another rank"
        except AssertionError as error:
            failures.append(f"case {number}: {error}")
    assert not failures, failures


def check_dtypes_biases_and_weights_on_input(rank):
    """Half precision, doubles, biases, and weights that the experts' inputs are multiplied by."""
    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float64)):
        for on in ("output", "input"):
            spec = KernelSpec(ExpertsSpec(dtype=name, bias_in=True, bias_out=True, weight_on=on), None, name)
            params = stacks(6, dtype, biased=True)
            x = torch.randn(9, H, generator=torch.Generator().manual_seed(rank)).to(dtype)
            weights, ids = drawn("mixed", 9, 6, 3, rank)
            operands = (x, weights.to(dtype), ids, params, spec)
            found.append((spread_op(*operands, "eager", (0, 1, 2, 3, 0, 1), 2), one_rank(*operands)))
    for got, want in found:
        loose = {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 6e-2}[got.dtype]
        assert got.dtype == want.dtype
        same(got, want, atol=loose, rtol=loose)


def check_the_same_bits_every_time(rank):
    weights, ids = drawn("mixed", 50, 6, 4, rank)
    x = torch.randn(50, H, generator=torch.Generator().manual_seed(rank))
    runs = [spread_op(x, weights, ids, stacks(6), SPEC, "eager", (0, 1, 2, 3, 0, 1), 2) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def check_bytes_are_those_of_the_model(rank):
    """Every rank has the same tokens, so that a token is on all ranks alike; bytes that leave a rank are counted."""
    tokens, experts, k = 30, 8, 3
    weights, ids = drawn("mixed", tokens, experts, k, 0)
    x, owners = torch.randn(tokens, H), (0, 3, 1, 3, 0, 2, 2, 1)
    params = [p.requires_grad_() for p in stacks(experts)]
    real, counted = dist.all_to_all_single, {}

    def counting(out, given, received=None, sent=None, group=None):
        for there, rows in enumerate(sent or []):
            for kind in ("ranks",) * (there != rank) + ("nodes",) * (there // 2 != rank // 2):
                counted[kind] = counted.get(kind, 0) + rows * given.shape[1]
        real(out, given, received, sent, group=group)

    found = {}
    dist.all_to_all_single = counting
    try:
        for name, size in (("per rank", 0), ("per node", 2)):
            leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
            y = spread_op(*leaves, ids, params, SPEC, "eager", owners, size)
            forward, counted = counted, {}
            y.sum().backward()
            found[name] = summed([torch.tensor([d[n] for d in (forward, counted) for n in ("ranks", "nodes")])])[0]
            counted = {}
    finally:
        dist.all_to_all_single = real
    reach = recorded_reach(ids.tolist(), Placement(owners, RANKS), 2)
    size = RowBytes.of(H, 4, 4, 4, k)
    for name, rows in rows_of(reach, k, RANKS, 2).items():
        if name in found:
            each = [
                bytes_ * way for bytes_ in (size.forward, size.step - size.forward) for way in (rows.ranks, rows.nodes)
            ]
            assert found[name].tolist() == [round(tokens * RANKS * n) for n in each], name
    assert len(found) == 2


def check_a_rank_at_another_layer_is_an_error(rank):
    weights, ids = drawn("mixed", 5, 6, 2, rank)
    owners = Placement.blocks(6, RANKS).owners
    said = ""
    try:
        spread_op(torch.randn(5, H), weights, ids, stacks(6), SPEC, "eager", owners[::-1] if rank == 2 else owners)
    except RuntimeError as error:
        said = str(error)
    strangers = "[0, 1, 3]" if rank == 2 else "[2]"
    assert f"rows of 'layer' cannot be exchanged: ranks {strangers}" in said


def check_compiled_inference(rank):
    model, found = seeded(Layer), []
    compiled = torch.compile(model, backend="moec", options={**QUICK, "experts_over": "world", "ranks_per_node": 2})
    with torch.no_grad():
        for tokens in (rank, 13, 0 if rank == 1 else 7):
            x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(rank))
            found.append((compiled(x), model(x)))
    for got, want in found:
        same(got, want)


def gradients(model, run, x):
    """y, the gradient of x and those of the parameters; run stands for the model."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def check_compiled_training_with_a_checkpoint(rank):
    """One of two layers is computed again in backward."""
    model = seeded(Deep)
    compiled = torch.compile(model, backend="moec", options={**QUICK, "rest": "aot_eager", "experts_over": "world"})
    x = torch.randn(5 + rank, H, generator=torch.Generator().manual_seed(rank))
    got, want = gradients(model, compiled, x), gradients(model, model, x)
    totals, wanted = summed(got[2:]), summed(want[2:])
    for one, other in zip((*got[:2], *totals), (*want[:2], *wanted), strict=True):
        same(one, other, atol=2e-4, rtol=1e-3)


def check_data_parallel_mean_is_that_of_the_whole_batch(rank):
    """DDP's mean over ranks, with the option, is the gradient of the mean loss without it."""
    model, plain = seeded(Layer), seeded(Layer)
    with torch._dynamo.config.patch(optimize_ddp=False):
        compiled = torch.compile(model, backend="moec", options={**QUICK, "experts_over": "world"})
        parallel = nn.parallel.DistributedDataParallel(compiled)
        xs = [torch.randn(3 + r, H, generator=torch.Generator().manual_seed(r)) for r in range(RANKS)]
        parallel(xs[rank]).square().sum().backward()
    (sum(plain(x).square().sum() for x in xs) / RANKS).backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        same(got.grad, want.grad, atol=2e-4, rtol=1e-3)


def report_of(model, tokens=4, **options):
    with torch.no_grad():
        return explain_call(model, (torch.randn(tokens, H),), {}, Options.make({**QUICK, **options}))


def check_the_report_names_ranks(rank):
    report = report_of(seeded(Layer), experts_over="world", ranks_per_node=2)
    if rank:
        return
    own = report_of(seeded(Own), experts_over="world")  # sends nothing
    (site,) = report.sites
    assert site.ranks == (
        "over 'world': 6 experts on 4 ranks, 1 to 2 a rank, in blocks; rows cross nodes of 2 ranks once"
    )
    assert site.ranks in str(report).replace("\n", " ")
    assert own.sites[0].status == "fused"
    assert "not spread: its experts run code of their own" in own.sites[0].ranks
    assert report_of(seeded(Layer)).sites[0].ranks == ""


def check_placements_of_a_file(rank):
    folder, model, said = Path(sys.argv[1]), seeded(Layer), ""
    path, other = folder / "placed.json", folder / "other.json"
    if rank == 0:
        (site,) = report_of(model).sites
        write_placements(Placements(RANKS, {site.name: Placement((3, 2, 1, 0, 3, 3), RANKS)}), path)
        write_placements(Placements(RANKS, {site.name: Placement((0, 1, 2, 3), RANKS)}), other)
    dist.barrier()
    compiled = torch.compile(model, backend="moec", options={**QUICK, "experts_over": "world", "placement": str(path)})
    got = gradients(model, compiled, torch.randn(20, H, generator=torch.Generator().manual_seed(rank)))
    if rank == 0:
        try:
            report_of(model, experts_over="world", placement=str(other))
        except Exception as error:
            said = str(error)
    assert [e for e in range(6) if got[3][e].any()] == {0: [3], 1: [2], 2: [1], 3: [0, 4, 5]}[rank]
    assert rank or "has 4 experts, the layer 6" in said


def refusal(options):
    try:
        Options.make(options)
    except OptionError as error:
        return str(error)
    return ""


def check_groups_by_name(rank):
    """Two ranks of four, by the group's description and, with Inductor and C++, by its name; and the rows of a mesh."""
    pair = dist.new_group([1, 3], group_desc="pair")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = seeded(Layer)
    x, found = torch.randn(9, H, generator=torch.Generator().manual_seed(rank)), []
    if rank in (1, 3):
        for options in ({**QUICK, "experts_over": "pair"}, {"proof": "off", "experts_over": pair.group_name}):
            torch._dynamo.reset()
            found.append(gradients(model, torch.compile(model, backend="moec", options=options), x))
    torch._dynamo.reset()
    named = {**QUICK, "experts_over": mesh["ep"].get_group().group_name}
    meshed = gradients(model, torch.compile(model, backend="moec", options=named), x)
    want = gradients(model, model, x)
    refused = [
        refusal({"experts_over": "pairs"}),
        refusal({"experts_over": "world", "ranks_per_node": 3}),
        refusal({"experts_over": "world", "proof": "strict"}),
        refusal({"experts_over": "world", "placement": "/nowhere/x.json"}),
    ]
    same(meshed[0], want[0])
    assert [e for e in range(6) if meshed[3][e].any()] == ([3, 4, 5] if rank % 2 else [0, 1, 2])
    for got in found:
        same(got[0], want[0])
        same(got[1], want[1], atol=2e-4, rtol=1e-3)
        assert [e for e in range(6) if got[3][e].any()] == ([0, 1, 2] if rank == 1 else [3, 4, 5])
    parts = ("no such process group; groups of this rank: world", "no nodes of 3", "differently", "No such file")
    assert all(part in said for part, said in zip(parts, refused, strict=True)), refused


def check_one_node_a_layer_for_any_ranks(rank):
    from moec.spread.lower import Spreading, spread

    sizes = {}
    for ranks in (2, 1024):
        graph = torch.fx.Graph()
        operands = [graph.placeholder(name) for name in ("x", "w", "ids", "up", "down")]
        for node, value in zip(operands, (None, None, None, *stacks(6)), strict=True):
            node.meta["example_value"] = value
        args = (*operands[:3], operands[3:], str(SPEC), "auto")
        graph.output(graph.call_function(torch.ops.moec.experts.default, args))
        gm = torch.fx.GraphModule(nn.Module(), graph)
        said = spread(gm, Spreading("world", Placements(ranks), 0), ["mlp"])
        sizes[ranks] = len(gm.graph.nodes)
        assert said == (f"over 'world': {Placement.blocks(6, ranks)}",)
    assert sizes[2] == sizes[1024] == 7


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def run(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for name, check in CHECKS.items():
        said, start = "", time.process_time()
        torch._dynamo.reset()
        try:
            check(rank)
        except Exception:
            said = traceback.format_exc()[-3000:]
        everyone = [None] * RANKS
        dist.all_gather_object(everyone, said)
        if rank == 0:
            failed = {r: text for r, text in enumerate(everyone) if text}
            print(
                json.dumps({"check": name, "failed": failed, "cpu": round(time.process_time() - start, 2)}), flush=True
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    import socket

    torch.set_num_threads(1)
    report_of(seeded(Layer))  # what a compile imports is imported once, before there are four processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(run, (port,), nprocs=RANKS, start_method="fork")
