"""What the raise says is true: every value of the raised graph, run word by word, is what torch computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from update_cases import IDS, IDX, INTS, JDX, M2, MUTATIONS, B, C, D, M, S, W, X, Y, inplace_functional

for f in (F.relu, F.silu, F.elu, F.selu, F.celu, F.hardtanh, F.hardswish, F.hardsigmoid, F.mish, F.relu6, F.leaky_relu):
    MUTATIONS.append((inplace_functional(lambda x, f=f: f(x, inplace=True)), X))
MUTATIONS += [
    (inplace_functional(lambda x: F.leaky_relu(x, 0.1, True)), X),
    (inplace_functional(lambda x: F.elu(x, 1.0, True)), X),
    (inplace_functional(lambda x: F.silu(x, True)), X),
    (inplace_functional(lambda x: F.hardtanh(x, -0.5, 0.5, True)), X),
    (inplace_functional(lambda x: F.relu(input=x, inplace=True)), X),
    (inplace_functional(lambda x: torch.relu_(input=x)), X),
    (inplace_functional(lambda x: F.threshold(x, 0.1, 20.0, True)), X),
    (inplace_functional(lambda x: torch.nn.LeakyReLU(0.2, inplace=True)(x)), X),
    (inplace_functional(lambda x: x.sigmoid_()), X),
    (inplace_functional(lambda x: torch.ops.aten.relu_.default(x)), X),
]

POINTWISE = [
    (lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"), X),
    (lambda x: F.softplus(x) + F.softplus(x, 2.0) + F.softplus(x, beta=3.0, threshold=1.0), X),
    (lambda x: torch.round(x, decimals=1), X),
    (lambda x: torch.round(x), X),
    (lambda x: torch.logical_not(x), INTS),
    (lambda x: torch.bitwise_not(x), INTS),
    (lambda x: ~x, M2),
    (lambda x, y: torch.logical_and(x, y), INTS, INTS + 1),
    (lambda x, y: x & y, INTS, INTS + 1),
    (lambda x, y: (x == y, x != y, x < y, x >= y), X, Y),
    (lambda x: 1 - x, X),
    (lambda x: torch.rsub(x, 1, alpha=2), X),
    (lambda x: 2 / x, X),
    (lambda x: 2**x, X),
    (lambda x, y: torch.add(x, y, alpha=2), X, Y),
    (lambda x: torch.add(x, 3, alpha=2), X),
    (lambda x, y: torch.div(x, y, rounding_mode="floor"), X, Y),
    (lambda x, y: torch.div(x, y, rounding_mode="trunc"), X, Y),
    (lambda x: x // 2, INTS),
    (lambda x: x % 3, INTS),
    (lambda x: torch.fmod(x, 3), INTS),
    (lambda x: x / 2, INTS),
    (lambda x: torch.clamp(x, -0.5, 0.5) + x.clamp(max=0.1) + x.clip(min=0.2), X),
    (lambda x, y: torch.clamp(x, min=y), X, Y),
    (lambda x: F.hardswish(x) + F.relu6(x) + F.mish(x) + torch.square(x), X),
    (lambda x: F.leaky_relu(x) + F.leaky_relu(x, 0.3) + F.leaky_relu(x, negative_slope=1.5), X),
    (lambda x: F.elu(x) + F.logsigmoid(x) + torch.expm1(x) + torch.sign(x), X),
    (lambda x: x.to(torch.bfloat16).float() + x.double().to(torch.float32), X),
    (lambda x: x.type(torch.float64).type_as(x) + x.half().to(x), X),
    (lambda x: x.long().bool().int(), X),
    (lambda x: torch.sigmoid(x.real) + x.data, X),
    (lambda z: z.real + 2 * z.imag, torch.randn(3, 4, dtype=torch.complex64)),
    (lambda x: torch.softmax(input=x, dim=-1), X),
    (lambda x: F.softmax(x, -1, 3, torch.float64), X),
    (lambda x: F.softmax(x, dim=0, dtype=torch.float64), X),
    (lambda x: x.softmax(0) + torch.softmax(x, 1), X),
    (lambda x: torch.softmax(x, axis=0), X),
    (lambda x: F.log_softmax(x, -1).exp(), X),
    (lambda x: x.sum(-1, True) + x.sum(dim=(0, 1)) + x.sum(), X),
    (lambda x: x.sum(axis=0, keepdims=True), X),
    (lambda x: x.sum(0, dtype=torch.float64), X),
    (lambda x: x.mean(0) + x.amax(0) + x.amin(dim=0, keepdim=True)[0], X),
    (lambda x: (x.any(-1), x.all(0), x.any()), M2),
    (lambda x: x.prod(1), X),
    (lambda x: x.max(1).values + x.max(dim=1)[1] + x.max(), X),
    (lambda x, y: torch.max(x, y) + torch.max(x, other=y), X, Y),
    (lambda x: x.max(0, True)[0], X),
    (lambda x: torch.topk(x, k=2)[0] + x.topk(2, 1, False)[0], X),
    (lambda x: torch.topk(x, 2, dim=0)[1], X),
    (lambda x: torch.topk(x, 2, axis=0)[0], X),
    (lambda x: torch.sort(x)[0] + torch.sort(x, 0, True)[1], X),
    (lambda x: torch.sort(x, axis=0)[0], X),
    (lambda x: x.argsort(stable=True) + torch.argsort(x, 0, True), X),
    (lambda x: torch.sort(x, stable=True, descending=True, dim=0)[0], X),
    (lambda x: torch.zeros_like(x) + torch.full((6, 4), 1.5) + x.new_full((6, 4), 2) + torch.ones(6, 4), X),
    (lambda x, s: torch.full((6, 4), s.item()) + x, X, S),
    (lambda x, s: torch.full((6, 4), fill_value=s.item()) + x, X, S),
    (lambda x: torch.full((6, 4), 7, dtype=torch.float32) + torch.full_like(x, 3.0), X),
    (lambda x: x + torch.arange(4) + torch.arange(0, 4) + torch.arange(1, 5) + torch.arange(0, 8, 2), X),
    (lambda x: x + torch.arange(0, 8, step=2) + torch.arange(end=4), X),
    (lambda x: x.cumsum(0) + torch.cumsum(x, dim=-1) + torch.cumsum(x, axis=1), X),
    (lambda i: torch.bincount(i, minlength=8), IDX),
    (lambda i: torch.histc(i.float(), bins=6, min=0, max=5), IDX),
    (lambda i: torch.histc(i.float(), 6, 0, 6), IDX),
    (lambda x, m: x.masked_fill(m, -1e9) + torch.masked_fill(x, mask=m, value=2.0), X, M2),
    (lambda x, m, s: x.masked_fill(m, s), X, M2, S),
    (lambda x: F.dropout(x, 0.5, training=False) + 1, X),
]

VIEWS = [
    (lambda x: x.view(-1).reshape(4, 6).flatten().unflatten(0, (6, 4)).unsqueeze(1).squeeze(), X),
    (lambda x: x.view(torch.int32) + 1, X),
    (lambda x: x.t() @ x + x.T @ x + x.transpose(0, 1) @ x + x.permute(1, 0) @ x + x.mT @ x, X),
    (lambda c: c.permute((2, 0, 1)) + torch.permute(c, dims=(2, 0, 1)), C),
    (lambda c: c.mT + c.transpose(-1, 1) + c.swapaxes(1, 2) + c.movedim(1, 2), C),
    (lambda x: torch.cat(x.chunk(2, dim=-1), 0) + torch.cat(torch.split(x, 2, 1)), X),
    (lambda x: x.split([1, 3], dim=1)[1] + x.tensor_split(2)[0].sum() + torch.stack(x.unbind(1), 1)[:, 1:], X),
    (lambda x: torch.cat(x.split(4)) + 1, X),
    (lambda x: x.narrow(0, 1, 3) + x.select(0, -1) + x.select(1, 2)[:3, None], X),
    (lambda x: x[1:3] + x[-2:] + x[0] + x[-1] + x[..., 0:4][2], X),
    (lambda x: x[:, ::2] + x[:, 1::2], X),
    (lambda c: c[0, 1:] + c[:, 2][0] + c[..., 0].sum() + c[1, ..., 2].mean(), C),
    (lambda x: x[None, :, None].expand(2, 6, 3, 4) + 1, X),
    (lambda x: x.expand_as(x) + x.unsqueeze(0).expand(3, -1, -1), X),
    (lambda x: x.repeat(2, 1) + x.tile((2, 1)), X),
    (lambda x: torch.tile(x, dims=(2, 1)) + x.repeat(repeats=(2, 1)), X),
    (lambda x: x.tile(2), X),
    (lambda x: x.repeat_interleave(2, dim=0) + x.repeat_interleave(2, 0), X),
    (lambda x: x.repeat_interleave(3), X),
    (lambda x, y: torch.cat([x, y]) + torch.cat((x, y), dim=0) + torch.concat([x, y], 0), X, Y),
    (lambda x, y: torch.cat([x, y], axis=1) + torch.cat([x, y], -1), X, Y),
    (lambda x, y: torch.stack([x, y], dim=1) + torch.stack([x, y], axis=1), X, Y),
    (lambda x, i: x[i] + x.index_select(0, i) + torch.index_select(x, dim=0, index=i), X, IDX),
    (lambda x, i: x[:, i] + x[..., i], X, JDX),
    (lambda x, i, j: x[i, j] + x[(i, j)], X, IDX, JDX),
    (lambda x, i, j: x[i, j, None] + x[i, j][:, None], X, IDX, JDX),
    (lambda x, i: x[i, 0] + x[0, i] + x[i, None][:, 0, 1], X, JDX),
    (lambda x, i: x[None, i], X, IDX),
    (lambda x, i, j: x[i[:, None], j[None]], X, IDX, JDX),
    (lambda x, i, j: x[i[:, None], j], X, IDX, JDX),
    (lambda c, i: c[0, :, i] + c[:, :, i][0], C, JDX),
    (lambda c, i: c[i, 0:2], C, torch.tensor([2, 0])),
    (lambda c, i, j: c[i, :, j], C, torch.tensor([2, 0]), torch.tensor([1, 3])),
    (lambda c, i: c[:, i, 1], C, IDX),
    (lambda c, i: c[1, i], C, IDX),
    (lambda c, i, j: c[:, i, j] + c[:, 0, j], C, IDX, JDX),
    (lambda x, i: x[i], X, IDS[:4]),
    (lambda x, m: x[m] + 1, X, M),
    (lambda x, m: x[m], X, M2),
    (lambda c, m: c[:, m], C, M),
    (lambda c, m: c[:, m], C, M2),
    (lambda c, m: c[0, m], C, M),
    (lambda x, m: x[m, 1], X, M),
    (lambda x, m: x[m, None], X, M),
    (lambda x, m: x[m][:, 1:3] + x[m][:, :2], X, M),
    (lambda m: torch.where(m)[0] + torch.where(m)[1], M2),
    (lambda m: m.nonzero() + torch.nonzero(m), M2),
    (lambda m: torch.unique(m.long() * 3) + m.long().unique().sum(), M2),
    (lambda m: m.nonzero(as_tuple=True)[1], M2),
    (lambda x: torch.where(x)[0], INTS),
    (lambda m, x: torch.masked_select(x, m) + x.masked_select(m), M2, X),
    (lambda m, x, y: torch.where(m, x, y) + torch.where(m, x, 0.0) + torch.where(m, 0.5, y), M2, X, Y),
    (lambda x, i: x.gather(1, i) + torch.gather(x, dim=-1, index=i) + torch.take_along_dim(x, i, dim=1), X, IDS),
    (lambda x, i: torch.take_along_dim(x, i), X, IDX),
    (lambda x, i, y: x.scatter(1, i[:, :1], y) + x.scatter(1, i[:, :1], 2.0), X, IDS, Y),
    (lambda x, i, y: x.scatter_add(1, i, y), X, IDS, Y),
    (lambda x, i, y: x.scatter(1, i[:, :1], y, reduce="add"), X, IDS, Y),
    (lambda x, i, y: torch.index_add(x, 0, i, y[:4]) + x.index_add(dim=0, index=i, source=y[:4]), X, IDX, Y),
    (lambda x, i, y: x.index_put((i,), y[:4], accumulate=True), X, IDX, Y),
    (lambda x, i: torch.ops.aten.index_put(x, [None, i], torch.ones(4)), X, JDX),
    (lambda x, i, j: torch.index_put(x, (i, j), torch.ones(4), True), X, IDX, JDX),
    (lambda i: F.one_hot(i, 6) + F.one_hot(i, num_classes=6), IDX),
    (lambda x: x.diagonal().clone() + x.as_strided((4,), (1,)), X),
    (lambda x: x.roll(1, 0) + x.flip(0), X),
]

PRODUCTS = [
    (lambda x, w, b: F.linear(x, w) + F.linear(x, w, b) + F.linear(x, weight=w, bias=b), X, W, B),
    (lambda c, w, b: F.linear(c, w, b), C, W, B),
    (lambda x, w: F.linear(x[0], w), X, W),
    (lambda x, w: x @ w.T + torch.mm(x, w.t()) + torch.matmul(x, w.transpose(0, 1)) + x.matmul(w.mT), X, W),
    (lambda c, d: torch.bmm(c, d) + c @ d + torch.matmul(c, other=d), C, D),
    (lambda x, d: x @ d, X, D),
    (lambda c, w: c @ w.t(), C, W),
    (lambda x, w: x @ w[0] + torch.mv(x, w[0]), X, W),
    (lambda c, d: c @ d[:1], C, D),
    (lambda c, d: torch.baddbmm(torch.ones(3, 6, 5), c, d), C, D),
    (lambda c, d: torch.baddbmm(torch.ones(5), c, d, beta=2.0, alpha=0.5), C, D),
    (lambda c, d: torch.addbmm(torch.ones(6, 5), c, d), C, D),
    (lambda x, w, b: torch.addmm(b, x, w.t()) + torch.addmm(b, mat1=x, mat2=w.t(), alpha=2), X, W, B),
    (lambda x, w: torch.einsum("td,ed->te", x, w) + torch.einsum("t d, e d -> t e", [x, w]), X, W),
    (lambda x, w: torch.einsum("td,ed", x, w), X, W),
    (lambda x, w: torch.einsum("...d,ed->...e", x, w), X, W),
    (lambda x, w: torch.einsum("td,ed->e", x, w), X, W),
    (lambda x: torch.einsum("td,td->t", x, x) + torch.einsum("tt->t", x[:4]).sum(), X),
    (lambda c, d: torch.einsum("eth,ehf->etf", c, d) + torch.einsum("ath,ahf->fta", c, d).permute(2, 1, 0), C, D),
    (lambda x, d: torch.einsum("th,ehf->etf", x, d), X, D),
    (lambda c: torch.tensordot(c, c, 1) if False else torch.inner(c, c), C),
]

LATER = [
    (lambda x, d: torch.zeros_like(x).index_add_(0, IDX, x[IDX]) + d.sum(), X, D),
    (lambda x, i: x[i.view(-1)].view(6, 2, 4).sum(1), X, IDS),
    (lambda i: torch.argsort(torch.argsort(i.view(-1))), IDS),
    (lambda i: torch.zeros(12, dtype=torch.long).scatter_(0, i.view(-1).argsort(), torch.arange(12)), IDS),
]


@pytest.mark.parametrize("case", MUTATIONS, ids=range(len(MUTATIONS)))
def test_updates(meaning, case):
    meaning.check(*case)


@pytest.mark.parametrize("case", POINTWISE, ids=range(len(POINTWISE)))
def test_pointwise_reductions_and_creation(meaning, case):
    meaning.check(*case)


@pytest.mark.parametrize("case", VIEWS, ids=range(len(VIEWS)))
def test_views_gathers_and_scatters(meaning, case):
    meaning.check(*case)


@pytest.mark.parametrize("case", PRODUCTS + LATER, ids=range(len(PRODUCTS + LATER)))
def test_products_and_dispatch(meaning, case):
    meaning.check(*case)
