"""The cost model behaves as its equations say, and its table of tuned tiles can be read, joined and written."""

import numpy as np
import pytest
import sympy

from moec.codegen import cost_model as cm
from moec.codegen import tile_prior as tp
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.gpu.target import gpu_target, gpu_targets

H100 = gpu_target("h100")
MIXTRAL = Sizes(4096, 4096, 14336, 8, 2)
SPACE = tuple(
    GpuConfig(m, n, k, 16, w, s)
    for m in (16, 32, 64, 128)
    for n in (32, 64, 128, 256)
    for k in (64, 128)
    for w in (4, 8)
    for s in (2, 3, 4)
)


def quantity(name, config, product=cm.Product(1024, 4096), histogram=(100, 0, 28), target=H100, **constants):  # noqa: B008
    values = cm.quantities((config,), product, histogram, target, "bf16", cm.Constants(**constants), (name,))
    return float(values[name][0])


def test_whole_tiles_are_multiplied():
    config = GpuConfig(64, 256, 64)
    assert quantity("all_blocks", config) == (2 + 1) * 4  # ⌈100/64⌉ + ⌈28/64⌉ rows of tiles, 1024/256 columns
    assert quantity("all_blocks", config, histogram=(1,) * 8) == 8 * 4
    assert quantity("steps", config, cm.Product(1024, 100)) == 2


def test_bytes_are_those_of_experts_that_are_hit():
    config = GpuConfig(64, 256, 64, group_m=64)
    weights, rows = 1024 * 4096 * 2, (4096 + 1024) * 2
    assert quantity("bytes", config, histogram=(1, 0, 0, 0)) == weights + rows
    assert quantity("bytes", config, histogram=(1, 1, 0, 0)) == 2 * (weights + rows)


def test_weights_that_outgrow_l2_are_read_again_for_each_group_of_rows():
    big = cm.Product(28672, 4096)
    once, often = (quantity("bytes", GpuConfig(64, 256, 64, g), big, (4096,)) for g in (64, 1))
    rows = 4096 * (4096 + 28672) * 2
    assert often - rows == 64 * (once - rows)


def test_a_block_more_than_a_wave_costs_a_wave():
    config = GpuConfig(128, 256, 64, num_warps=8)
    assert quantity("resident", config) == 1
    times = [quantity("seconds", config, cm.Product(256, 4096), (128 * blocks,)) for blocks in (131, 132, 133, 264)]
    assert times[2] - times[1] > 5 * (times[1] - times[0])
    assert times[3] < 1.1 * times[2]


def test_deeper_pipelines_wait_less():
    waits = [quantity("wait", GpuConfig(64, 64, 64, num_stages=s)) for s in (2, 3, 5)]
    assert waits[0] == 2 * waits[1] == 4 * waits[2]


def test_fewer_launch_seconds_are_just_that():
    config = GpuConfig(64, 64, 64)
    assert quantity("seconds", config, launch=5e-6) - quantity("seconds", config, launch=0.0) == pytest.approx(5e-6)


def test_equations_print_and_have_no_unknown_symbol():
    known = set(cm._NAMES.split())
    for name, equation in cm.equations().items():
        assert {symbol.name for symbol in equation.free_symbols} <= known, name
        symbols = {symbol.name: symbol for symbol in equation.free_symbols}
        assert sympy.sympify(str(equation), locals=symbols) == equation, name
    assert str(cm.equations()["steps"]) == "ceiling(depth/block_k)"


@pytest.mark.parametrize("target", gpu_targets(), ids=lambda t: t.name)
@pytest.mark.parametrize("T", [1, 7, 4096])
def test_every_target_and_size_ranks_what_fits(target, T):
    sizes = Sizes(T, 2048, 768, 128, 8)
    ranked = cm.rank(SPACE, sizes, cm.uniform_histogram(sizes), target)
    times = [time for _, time in ranked]
    assert times == sorted(times)
    assert {config for config, _ in ranked} == {c for c in SPACE if cm.fits(c, target)}
    assert all(0 < time < 1 for time in times)


def test_many_rows_want_large_tiles_and_few_rows_small_ones():
    best, _ = cm.rank(SPACE, MIXTRAL, cm.uniform_histogram(MIXTRAL), H100)[0]
    assert (best.block_m, best.block_n) == (128, 256)
    few = Sizes(1, 4096, 14336, 8, 2)
    best, _ = cm.rank(SPACE, few, cm.uniform_histogram(few), H100)[0]
    assert best.block_m == 16


def test_no_time_is_below_what_memory_and_arithmetic_need():
    for T in (1, 64, 4096):
        sizes = Sizes(T, 4096, 14336, 8, 2)
        histogram = cm.uniform_histogram(sizes)
        least = sum(cm.least_bytes(sizes, histogram).values()) / H100.memory
        least = max(least, 6 * sum(histogram) * 4096 * 14336 / H100.flops["bf16"])
        assert cm.rank(SPACE, sizes, histogram, H100)[0][1] > least


def test_what_exceeds_the_target_does_not_fit():
    assert cm.fits(GpuConfig(128, 256, 64, num_warps=8, num_stages=4), H100)
    assert not cm.fits(GpuConfig(128, 256, 64, num_warps=8, num_stages=5), H100)
    assert not cm.fits(GpuConfig(128, 256, 64, num_warps=4, num_stages=2), H100)  # its sums alone are 256 registers
    assert not cm.fits(GpuConfig(128, 256, 64, num_warps=8, num_stages=4), gpu_target("sm_86"))


@pytest.mark.parametrize("sizes", [Sizes(1, 1, 1, 1, 1), Sizes(13, 1, 1, 8, 8), Sizes(200, 1, 1, 64, 6)])
def test_histograms_have_a_row_for_each_pair(sizes):
    histogram = cm.uniform_histogram(sizes)
    assert len(histogram) == sizes.E
    assert sum(histogram) == sizes.T * sizes.k
    assert max(histogram) <= sizes.T
    assert histogram == cm.uniform_histogram(sizes)


def test_shares_follow_the_wins_nearby():
    tiles = [(16, 64, 64), (128, 256, 64)]
    counts = {"h100": {0: {tiles[0]: 9}, 8: {tiles[1]: 9}}, "mi300x": {0: {tiles[1]: 100}}}
    backends = {"h100": "cuda", "h200": "cuda", "mi300x": "hip"}
    few = tp.shares(counts, "h100", backends, 1.0, tiles, tp.Mix())
    many = tp.shares(counts, "h100", backends, 256.0, tiles, tp.Mix())
    assert few.sum() == pytest.approx(1.0)
    assert few[0] > 0.95  # another backend's wins do not count
    assert many[1] > 0.95
    other = tp.shares(counts, "h200", backends, 1.0, tiles, tp.Mix(others=0.1))
    assert 0.5 < other[0] < few[0]


def test_table_round_trips(tmp_path, monkeypatch):
    counts, mixes = tp.shipped()
    assert {"h100", "h200", "a100", "b200", "mi300x"} <= set(counts)
    assert set(mixes) == set(counts)
    assert sum(n for own in counts.values() for won in own.values() for n in won.values()) > 4000
    text = tp.as_json(counts, mixes, "anywhere")
    (tmp_path / "tile_prior.json").write_text(text)
    monkeypatch.setattr(tp, "__file__", str(tmp_path / "tile_prior.py"))
    tp.shipped.cache_clear()
    assert tp.shipped() == (counts, mixes)
    tp.shipped.cache_clear()


@pytest.mark.parametrize("target", gpu_targets(), ids=lambda t: t.name)
def test_joined_ranking_holds_what_runs(target):
    sizes = Sizes(64, 2048, 768, 128, 8)
    ranked = tp.rank_with_prior(SPACE, sizes, cm.uniform_histogram(sizes), target)
    assert {config for config, _ in ranked} == {c for c in SPACE if cm.fits(c, target)}
    scores = [score for _, score in ranked]
    assert scores == sorted(scores, reverse=True)


def test_without_trust_the_prior_decides_and_with_much_the_model_does():
    histogram = cm.uniform_histogram(MIXTRAL)
    model = cm.rank(SPACE, MIXTRAL, histogram, H100)
    trusting = tp.rank_with_prior(SPACE, MIXTRAL, histogram, H100, mix=tp.Mix(trust=1e6))
    assert trusting[0][0] == model[0][0]
    prior = tp.rank_with_prior(SPACE, MIXTRAL, histogram, H100, mix=tp.Mix(trust=0.0))
    assert cm.tile_of(prior[0][0]) == (128, 256, 64)  # the tile that most tuners chose at 1024 rows an expert
    assert np.isfinite([score for _, score in prior]).all()


def test_no_row_at_all():
    sizes = Sizes(1, 64, 64, 4, 1)
    assert cm.rank(SPACE, sizes, (0, 0, 0, 0), H100)
    assert tp.rank_with_prior(SPACE, sizes, (0, 0, 0, 0), H100)
