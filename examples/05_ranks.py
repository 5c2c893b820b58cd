"""One layer's experts over two processes: the same results and gradients as on one rank.

Run as it is, it starts both; `torchrun --nproc-per-node 2 examples/05_ranks.py` would do as well.
"""

import os
import socket

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class MoE(nn.Module):
    def __init__(self, hidden=64, width=48, experts=8, k=2):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.1)

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(self.k, -1)
        y = torch.zeros_like(x)
        for e in range(len(self.up)):
            rows, slots = torch.where(chosen == e)
            y.index_add_(
                0, rows, F.linear(F.gelu(F.linear(x[rows], self.up[e])), self.down[e]) * weights[rows, slots, None]
            )
        return y


def make():
    """For `moec inspect examples/05_ranks.py:make`."""
    torch.manual_seed(0)
    return MoE(), (torch.randn(256, 64),)


def step(model, run, x):
    """Output and gradients of one step."""
    model.zero_grad(set_to_none=True)
    y = run(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, _ = make()
    x = torch.randn(100 + 20 * rank, 64)  # each rank has its own tokens, and its own number of them
    # What is not MoE in this model is too little to compile.
    compiled = torch.compile(model, backend="moec", options={"experts_over": "world", "rest": "eager"})
    (y, found), (want, wanted) = step(model, compiled, x), step(model, model, x)
    mine = [e for e in range(8) if found["up"][e].any()]
    for gradients in (found, wanted):
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    equal = torch.allclose(y, want, atol=1e-4) and all(
        torch.allclose(found[name], wanted[name], atol=1e-3, rtol=1e-3) for name in found
    )
    said = [None, None]
    dist.all_gather_object(said, f"rank {rank}: {len(x)} tokens, gradients of experts {mine}, equal to eager: {equal}")
    if rank == 0:
        print(*said, sep="\n")
    dist.destroy_process_group()


def started(rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torch.multiprocessing.start_processes(started, (port,), nprocs=2, start_method="fork")
