"""The character model on several processes: DistributedDataParallel or FSDP2 over lstm_ext.LSTM.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --fsdp

Each process reads its own places of the text; gradients are averaged. The first one also trains the
same model alone on all places together, and the losses, and with DistributedDataParallel the
gradients, are compared: the exit status is 1 if they differ.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from char_model import CharModel, encode, pieces, read_text
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lstm_ext


class Learner:
    """A model and its states on a part of the text's places."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        self.states: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one piece (L, N); return its loss."""
        if self.states is not None:
            self.states = (self.states[0].detach(), self.states[1].detach())
        logits, self.states = self.model(x, self.states)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main() -> int:
    """Train, and compare with one process; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="places of the text, of each process")
    parser.add_argument("--length", type=int, default=32, help="characters of a piece")
    parser.add_argument("--modules", type=int, default=4, help="modules of the library to read")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    options = parser.parse_args()

    # NCCL on GPUs; our kernels are for the CPU as yet.
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def build() -> CharModel:
        torch.manual_seed(0)
        return CharModel(lstm_ext.LSTM, options.hidden, options.layers)

    alone = Learner(build())
    model: nn.Module = build()
    model = fully_shard(model) if options.fsdp else DistributedDataParallel(model)
    learner = Learner(model)
    text = encode(read_text(options.modules))
    mine = slice(rank * options.batch, (rank + 1) * options.batch)
    data = pieces(text, options.batch * world, options.length)
    worst = 0.0
    for step in range(options.steps):
        x, y = next(data)
        loss = learner.step(x[:, mine].contiguous(), y[:, mine].contiguous())
        dist.all_reduce(loss)
        loss /= world
        if rank == 0:
            joined = alone.step(x, y)
            worst = max(worst, float((loss - joined).abs() / joined))
            if not options.fsdp:
                for a, b in zip(model.parameters(), alone.model.parameters(), strict=True):
                    worst = max(worst, float((a.grad - b.grad).norm() / b.grad.norm()))
            if step == 0 or (step + 1) % 10 == 0:
                print(f"step {step + 1:4}: loss {loss:.6f}, in one process {joined:.6f}")
    same = worst < 1e-2
    if rank == 0:
        what = "losses" if options.fsdp else "losses and gradients"
        verdict = "ok   " if same else "WRONG"
        print(f"{verdict} {world} processes and one: {what} differ by {worst:.1e}")
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
