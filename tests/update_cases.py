"""Tensors, and functions that update them in place, for the meaning of raised graphs."""

from __future__ import annotations

import torch

X = torch.randn(6, 4)
Y = torch.randn(6, 4)
P = torch.rand(6, 4) + 0.1
W = torch.randn(5, 4)
B = torch.randn(5)
C = torch.randn(3, 6, 4)
D = torch.randn(3, 4, 5)
IDX = torch.tensor([0, 2, 2, 5])
JDX = torch.tensor([1, 3, 0, 2])
IDS = torch.tensor([[0, 3], [1, 2], [3, 0], [2, 2], [1, 0], [3, 1]])
INTS = torch.tensor([[0, 5, -3, 7], [2, 0, 9, -1]])
M = torch.tensor([True, False, True, True, False, False])
M2 = X > 0
S = torch.tensor(0.5)


def div_(x, y):
    x = x * 1
    x /= y
    return x + 1


def floordiv_(x, y):
    x = x * 1
    x //= 2
    return x + y


def mod_(x, y):
    x = x * 1
    x %= 2
    return x + y


def pow_(x):
    x = x * 1
    x **= 2
    return x + 1


def iand(m, n):
    m = m.clone()
    m &= n
    return m, ~m


def ior(m, n):
    m = m.clone()
    m |= n
    return m, ~m


def ixor(m, n):
    m = m.clone()
    m ^= n
    return m, ~m


def imatmul(x, y):
    x = x * 1
    x @= y
    return x + 1


def ishift(x):
    x = x + 0
    x <<= 1
    return x + 1


def matmul_out(x, y):
    z = torch.zeros(6, 6)
    torch.matmul(x, y.t(), out=z)
    return z + 1


def exp_out(x):
    z = torch.zeros(6, 4)
    torch.exp(x, out=z)
    return z + 1


def setitem(x, i, y):
    x = x * 1
    x[i] = y[:4]
    return x + 1


def setitem_slice(x, y):
    x = x * 1
    x[1:3] = y[1:3]
    return x + 1


def setitem_new_axis(x, i):
    x = x * 1
    x[i, None] = torch.ones(4, 1, 4)
    return x + 1


def setitem_add(x, i, y):
    x = x * 1
    x[i] += y[:4]
    return x + 1


def setitem_mask(x, m):
    x = x * 1
    x[m] = 0.5
    return x + 1


def mutated_view(x):
    x = x * 1
    v = x.view(-1)
    v.add_(1)
    return x + 1, v + 2


def mutated_late_chunk(x):
    x = x * 1
    parts = x.chunk(2, dim=1)
    x.add_(1)
    return parts[0] * parts[1]


def mutated_clone(x):
    y = x.clone()
    y.mul_(3)
    x = x + y
    return x, y


def foreach(x, y):
    x, y = x * 1, y * 1
    torch._foreach_add_([x, y], 1.0)
    return x * 2, y * 3


def inplace_functional(fn):
    def run(x):
        x = x * 1
        y = fn(x)
        return x * 2, y * 3

    return run


def squeeze_(x):
    x = (x * 1).unsqueeze(0)
    x.squeeze_(0)
    return x + 1


def t_(x):
    x = x * 1
    y = x.view(6, 4)
    x.t_()
    return x + 1, y + 1


MUTATIONS = [
    (div_, X, Y),
    (floordiv_, X, Y),
    (mod_, X, Y),
    (pow_, X),
    (iand, M2, Y > 0),
    (ior, M2, Y > 0),
    (ixor, M2, Y > 0),
    (imatmul, torch.randn(4, 4), torch.randn(4, 4)),
    (ishift, INTS),
    (matmul_out, X, Y),
    (exp_out, X),
    (setitem, X, torch.tensor([0, 1, 3, 5]), Y),
    (setitem_slice, X, Y),
    (setitem_new_axis, X, torch.tensor([0, 1, 3, 5])),
    (setitem_add, X, torch.tensor([0, 1, 3, 5]), Y),
    (setitem_mask, X, M),
    (mutated_view, X),
    (mutated_late_chunk, X),
    (mutated_clone, X),
    (foreach, X, Y),
    (lambda x: x.add_(1), X),
    (lambda x: (x.mul_(2), x.view(-1).sum()), X),
    (lambda x, y: (x.copy_(y), x + 1), X, Y),
    (lambda x: x.clone().zero_() + x, X),
    (lambda x: x.clone().fill_(2.0) + x, X),
    (lambda x, m: x.clone().masked_fill_(m, -1.0), X, M2),
    (lambda x, i, y: x.clone().index_add_(0, i, y[:4]), X, IDX, Y),
    (lambda x, i, y: x.clone().index_add_(0, i, y[:4], alpha=2.0), X, IDX, Y),
    (lambda x, i, y: x.clone().index_copy_(0, i, y[:4]), X, torch.tensor([0, 1, 3, 5]), Y),
    (lambda x, y: x.clone().add_(y, alpha=3), X, Y),
    (lambda x, y: x.clone().sub_(y, alpha=3), X, Y),
    (lambda x: x.clone().clamp_(min=-0.5, max=0.5), X),
    (lambda x: torch.add(x.clone(), 1, out=x), X),
]
