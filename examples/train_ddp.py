"""The character model on several processes: DistributedDataParallel or FSDP2 over lstm_ext.LSTM.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --fsdp --checkpoint /tmp/checkpoint

Each process reads its own places of the text; gradients are averaged. The first one also trains the
same model alone on all places together, and the losses, and with DistributedDataParallel the
gradients, are compared: the exit status is 1 if they differ. With ``--checkpoint``, model and
optimizer are then written to a folder (torch.distributed.checkpoint), read into a new model, and
both go on for a step: it has to be the same one.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from char_model import Trainer, encode, pieces, read_text, seeded_model
from torch import Tensor, nn
from torch.distributed import get_world_size, init_device_mesh
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lstm_ext


def build(options: argparse.Namespace) -> Trainer:
    """Return the model, spread over the processes, and its optimizer."""
    model: nn.Module = seeded_model(lstm_ext.LSTM, options.hidden, options.layers)
    if not options.fsdp:
        return Trainer(DistributedDataParallel(model))
    # By name: where there is a GPU, it would be taken.
    mesh = init_device_mesh("cpu", (get_world_size(),))
    return Trainer(fully_shard(model, mesh=mesh))


def resumed(options: argparse.Namespace, trainer: Trainer, x: Tensor, y: Tensor) -> bool:
    """Save, load into a new model whose weights differ, and let both learn from (x, y)."""
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=options.checkpoint)
    other = build(options)
    with torch.no_grad():
        for p in other.model.parameters():
            p.zero_()
    model, optimizer = get_state_dict(other.model, other.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=options.checkpoint)
    set_state_dict(other.model, other.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    other.states = trainer.states
    for one in (trainer, other):
        one.step(x, y)
    same = trainer.losses[-1] == other.losses[-1]
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        same &= torch.equal(*(p.to_local() if options.fsdp else p for p in (a, b)))
    return same


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
    parser.add_argument("--checkpoint", help="folder to save to and go on from")
    options = parser.parse_args()

    # NCCL on GPUs; not tried.
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    alone = Trainer(seeded_model(lstm_ext.LSTM, options.hidden, options.layers))
    trainer = build(options)
    text = encode(read_text(options.modules))
    mine = slice(rank * options.batch, (rank + 1) * options.batch)
    data = pieces(text, options.batch * world, options.length)
    worst = 0.0
    for step in range(options.steps):
        x, y = next(data)
        trainer.step(x[:, mine].contiguous(), y[:, mine].contiguous())
        loss = torch.tensor(trainer.losses[-1])
        dist.all_reduce(loss)
        loss /= world
        if rank == 0:
            alone.step(x, y)
            joined = alone.losses[-1]
            worst = max(worst, abs(float(loss) - joined) / joined)
            if not options.fsdp:
                for a, b in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
                    worst = max(worst, float((a.grad - b.grad).norm() / b.grad.norm()))
            if step == 0 or (step + 1) % 10 == 0:
                print(f"step {step + 1:4}: loss {loss:.6f}, in one process {joined:.6f}")
    same = worst < 1e-3
    if rank == 0:
        what = "losses" if options.fsdp else "losses and gradients"
        verdict = "ok   " if same else "WRONG"
        print(f"{verdict} {world} processes and one: {what} differ by {worst:.1e}")
    if options.checkpoint:
        x, y = next(data)
        goes_on = resumed(options, trainer, x[:, mine].contiguous(), y[:, mine].contiguous())
        verdict = "ok   " if goes_on else "WRONG"
        print(f"{verdict} process {rank}: goes on from the checkpoint as without it")
        same &= goes_on
    # Gloo's threads still let go of the last tensors, and need the interpreter for it: to end the
    # group at once, from Python, could wait for them forever.
    dist.barrier()
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
