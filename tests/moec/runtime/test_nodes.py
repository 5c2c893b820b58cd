"""Memory nodes: as Linux tells them, experts told apart by where they lie, results that do not depend on it."""

from array import array

import pytest
import torch

from moec.codegen.tuning import Tuning
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime import nodes
from moec.runtime.cpu import load_kernel
from moec.runtime.nodes import MOST, Nodes, node_of_each, read_nodes, where, words_of
from moec.runtime.packed import _load
from moec.target import Target

TWO = Nodes(2, array("i", [0, 0, 1, 1]), (0, 2))


def folder_of(tmp_path, lists):
    for number, text in lists.items():
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(text)
    return tmp_path


def test_nodes_as_linux_lists_them(tmp_path):
    found = read_nodes(folder_of(tmp_path, {0: "0-2,6\n", 3: "3-5\n", 1: "\n"}))
    assert found.count == 2, "a node without processors computes nothing"
    assert list(found.of_cpu) == [0, 0, 0, 1, 1, 1, 0]
    assert found.numbers == (0, 3)


def test_one_node_or_none_described(tmp_path):
    assert read_nodes(tmp_path / "nowhere").count == 1
    assert read_nodes(folder_of(tmp_path, {0: "0-63\n"})).count == 1


def test_more_nodes_than_a_kernel_tells_apart_share_queues(tmp_path):
    found = read_nodes(folder_of(tmp_path, {i: f"{i}\n" for i in range(MOST + 3)}))
    assert found.count == MOST
    assert list(found.of_cpu) == [*range(MOST), 0, 1, 2]


def test_an_expert_belongs_to_the_node_of_most_of_its_weights(monkeypatch):
    monkeypatch.setattr(nodes, "where", lambda addresses: [a // 100 if a < 900 else -2 for a in addresses])
    experts = [(5, 7, 210), (200, 205, 0), (990, 995, 950), (991, 100, 999)]
    assert node_of_each(experts, TWO) == [0, 1, 0, 1], "unknown ones in turn: 100 is of a node without processors"


def test_memory_of_this_process_is_somewhere():
    written = torch.ones(1 << 16)
    assert len(where([written.data_ptr()])) == 1
    assert where([]) == []


@pytest.mark.parametrize("stacked", [True, False])
def test_addresses_of_stacked_and_single_experts(monkeypatch, stacked):
    monkeypatch.setattr(nodes, "nodes", lambda: TWO)
    stack = torch.zeros(4, 8, 16)
    asked = []
    monkeypatch.setattr(nodes, "where", lambda addresses: asked.extend(addresses) or [2] * len(addresses))
    alive = []
    count, cpus, _, table = words_of([[stack] if stacked else list(stack)] * 2, alive)
    assert (count, cpus, list(alive[1])) == (2, 4, [1, 1, 1, 1])
    assert table == alive[1].buffer_info()[0]
    assert asked == [at for e in stack for _ in range(2) for at in (e.data_ptr(), e.data_ptr() + 8 * 16 * 4 // 2)]


@pytest.mark.parametrize("weights", ["stored", "packed"])
def test_results_do_not_depend_on_where_weights_lie(monkeypatch, weights):
    spec = str(KernelSpec(ExpertsSpec()))
    params = [torch.randn(6, 2 * 40, 64), torch.randn(6, 64, 40)]

    def outputs():
        stored = weights == "stored"  # a kernel that has seen no parameters yet:
        kernel = (
            load_kernel(spec, None).tuned(None) if stored else _load.__wrapped__(spec, weights, None, Target.host())
        )
        assert kernel._bound(params).nodes[0] == nodes.nodes().count
        small = Tuning((2, 2), (16, 16), (32, 32), 7, 64, (64, 64), 50)
        for T in (0, 1, 7, 13, 200):
            generator = torch.Generator().manual_seed(T)
            x = torch.randn(T, 64, generator=generator)
            experts = torch.rand(T, 6, generator=generator).topk(3).indices
            experts[: T // 3] = torch.tensor([5, 5, -1])
            scores = torch.rand(T, 3, generator=generator)
            yield kernel.experts(x, scores, experts, params)
            yield kernel.tuned(small).experts(x, scores, experts, params)

    want = list(outputs())
    monkeypatch.setattr(nodes, "nodes", lambda: Nodes(3, array("i", [0, 1, 2, 0]), (0, 1, 5)))
    for lie in ([0, 1, 5], [5], [1, -2, 1, 0]):
        monkeypatch.setattr(
            nodes, "where", lambda addresses, lie=lie: [lie[i % len(lie)] for i in range(len(addresses))]
        )
        assert all(torch.equal(a, b) for a, b in zip(outputs(), want, strict=True))
