"""Train one model on two processes with DistributedDataParallel: the gradients of one process with all the tokens.

Run as it is, it starts both; `torchrun --nproc-per-node 2 examples/09_data_parallel.py` would do as well.
"""

import copy
import os
import socket

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

TOKENS = (13, 20)  # of each rank


class Block(nn.Module):
    """A norm and a loop over stacked experts, beside what comes in."""

    def __init__(self, hidden=64, width=48, experts=8, top_k=2):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(hidden), nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.1)
        self.top_k = top_k

    def forward(self, x):
        rows = self.norm(x)
        weights, chosen = self.gate(rows).softmax(-1).topk(self.top_k, -1)
        y = torch.zeros_like(x)
        for e in range(len(self.up)):
            token, slot = torch.where(chosen == e)
            out = F.linear(F.gelu(F.linear(rows[token], self.up[e])), self.down[e])
            y.index_add_(0, token, out * weights[token, slot, None])
        return x + y


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def make():
    """The target of `moec explain examples/09_data_parallel.py:make`."""
    torch.manual_seed(0)
    return Model(), (torch.randn(13, 64),)


def train(model, call, batches, steps=3):
    """The last step's gradients by name: each step takes the mean over `batches` and moves the model's parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for x in batches:
            (call(x).square().mean() / len(batches)).backward()
        optimizer.step()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, _ = make()
    alone = copy.deepcopy(model)
    batches = [torch.randn(tokens, 64) for tokens in TOKENS]
    # What is not MoE in this model is too little to compile.
    compiled = torch.compile(DistributedDataParallel(model), backend="moec", options={"rest": "eager"})
    got, want = train(model, compiled, [batches[rank]]), train(alone, alone, batches)
    equal = all(torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-6) for name in want)
    said = [None, None]
    dist.all_gather_object(said, f"rank {rank}: {TOKENS[rank]} tokens, gradients as of all tokens on one rank: {equal}")
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
