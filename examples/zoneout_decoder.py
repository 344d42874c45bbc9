"""A speech decoder with zoneout, stepped: two lstm_ext.LSTMCell take the place of ESPnet's cells.

    decoder = Decoder(memory=512, mels=80)
    frames = decoder(memory, targets)          # training: (N, T, mels), fed the targets
    frames = decoder.generate(memory, 200)     # fed its own frames

After Tacotron 2 (Shen et al. 2018): a frame goes through a small network with dropout, and with
what attention has read into two LSTM cells; a linear layer makes the next frame. Their zoneout
(Krueger et al. 2017) is an option of the cell. ESPnet has it in a class around torch.nn.LSTMCell:
in training each unit keeps its old h, and c, with probability 0.1, by a mask of its own for each;
in evaluation both are the mean. This is what ``zoneout_h`` and ``zoneout_c`` do.

Attention is the plain one, by the content alone, to keep this short.

    python examples/zoneout_decoder.py         # trains on a made-up task, then times both cells
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import lstm_ext

States = list[tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """Maps what an encoder has made of a text, (N, L, memory), to frames of a spectrogram.

    Args:
        memory: number of features of the encoder's output.
        mels: number of features of a frame.
        hidden: of the states of both cells.
        prenet: of the network that a frame goes through.
        zoneout: probability that a unit keeps its state.
        dropout: of the network that frames go through, also in evaluation, as Tacotron 2 has it.
    """

    def __init__(
        self,
        memory: int = 512,
        mels: int = 80,
        hidden: int = 1024,
        prenet: int = 256,
        zoneout: float = 0.1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.mels, self.dropout = mels, dropout
        self.prenet = nn.ModuleList([nn.Linear(mels, prenet), nn.Linear(prenet, prenet)])
        self.query = nn.Linear(hidden, memory, bias=False)
        self.cells = nn.ModuleList(
            lstm_ext.LSTMCell(inputs, hidden, zoneout_h=zoneout, zoneout_c=zoneout)
            for inputs in (prenet + memory, hidden)
        )
        self.frame = nn.Linear(hidden + memory, mels)

    def forward(self, memory: Tensor, targets: Tensor) -> Tensor:
        """Map memory (N, L, memory) and frames (N, T, mels) to (N, T, mels): each from the last."""
        states, frames = self.begin(memory), []
        previous = nn.functional.pad(targets, (0, 0, 1, -1))
        for frame in previous.unbind(1):
            out, states = self.step(memory, frame, states)
            frames.append(out)
        return torch.stack(frames, 1)

    @torch.no_grad()
    def generate(self, memory: Tensor, steps: int) -> Tensor:
        """Map memory (N, L, memory) to frames (N, steps, mels)."""
        states, frames = self.begin(memory), [memory.new_zeros(len(memory), self.mels)]
        for _ in range(steps):
            out, states = self.step(memory, frames[-1], states)
            frames.append(out)
        return torch.stack(frames[1:], 1)

    def begin(self, memory: Tensor) -> States:
        """Return the states before the first step."""
        zeros = memory.new_zeros(len(memory), self.query.in_features)
        return [(zeros, zeros) for _ in self.cells]

    def step(self, memory: Tensor, frame: Tensor, states: States) -> tuple[Tensor, States]:
        """Map the last frame (N, mels) to the next one."""
        for linear in self.prenet:
            frame = torch.dropout(torch.relu(linear(frame)), self.dropout, True)
        scores = memory @ self.query(states[0][0]).unsqueeze(-1)
        read = (scores.softmax(1) * memory).sum(1)
        x, after = torch.cat([frame, read], 1), []
        for cell, state in zip(self.cells, states, strict=True):
            h, c = cell(x, state)
            after.append((h, c))
            x = h
        return self.frame(torch.cat([x, read], 1)), after


class TorchsZoneout(nn.Module):
    """torch.nn.LSTMCell with the same zoneout in tensor operations, to compare with."""

    def __init__(self, cell: lstm_ext.LSTMCell) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(cell.input_size, cell.hidden_size)
        self.cell.load_state_dict(cell.state_dict())
        self.rates = cell.zoneout_h, cell.zoneout_c

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute (h', c')."""
        mixed = []
        for p, old, new in zip(self.rates, states, self.cell(x, states), strict=True):
            if self.training:
                kept = self.draw(old, p)
                mixed.append(kept * old + (1 - kept) * new)
            else:
                mixed.append(p * old + (1 - p) * new)
        return mixed[0], mixed[1]

    def draw(self, like: Tensor, p: float) -> Tensor:
        """Draw which units keep their state."""
        return torch.empty_like(like).bernoulli_(p)


def with_torchs_cells(decoder: Decoder) -> Decoder:
    """Return a decoder of the same weights on torch's cells."""
    plain = Decoder(
        decoder.query.out_features, decoder.mels, decoder.query.in_features,
        decoder.prenet[1].out_features, dropout=decoder.dropout,
    )  # fmt: skip
    plain.load_state_dict(decoder.state_dict())
    plain.cells = nn.ModuleList(TorchsZoneout(cell) for cell in decoder.cells)
    return plain.train(decoder.training)


def example(N: int, T: int, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Draw a memory, and frames that follow from it."""
    memory = torch.randn(N, 12, decoder.query.out_features)
    tones = memory.mean(1)[:, : decoder.mels].unsqueeze(1)
    return memory, torch.sin(torch.arange(T)[:, None] / 4 + 3 * tones)


def main(arguments: list[str] | None = None) -> None:
    """Train, generate, and time the decoder on both kinds of cells."""
    parser = argparse.ArgumentParser(description="train a small decoder with zoneout, and time it")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--frames", type=int, default=30)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    decoder = Decoder(64, 16, options.hidden, 32)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    first = loss = torch.tensor(0.0)
    for step in range(options.steps):
        memory, frames = example(8, options.frames, decoder)
        loss = nn.functional.mse_loss(decoder(memory, frames), frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = loss.detach() if step == 0 else first
    print(f"loss {first:.3f} to {loss.item():.3f} in {options.steps} steps")
    decoder.eval()
    print(f"generated {tuple(decoder.generate(memory, options.frames).shape)}")
    plain = with_torchs_cells(decoder)
    for training in (True, False):
        seconds = [float("inf")] * 2
        for _ in range(7):  # by turns, and the fastest of each
            for k, model in enumerate((plain, decoder)):
                model.train(training)
                start = time.perf_counter()
                if training:
                    model(memory, frames).square().mean().backward()
                else:
                    model.generate(memory, options.frames)
                seconds[k] = min(seconds[k], time.perf_counter() - start)
        what = "training" if training else "generating"
        print(f"{what}: {seconds[0] / seconds[1]:.2f} times as fast as with torch's cells")


if __name__ == "__main__":
    main()
