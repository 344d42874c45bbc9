"""AWD-LSTM, the language model that fastai has, on three layers with options of lstm_ext.LSTM.

    model = AWDLSTM(words=len(vocabulary))
    scores, states = model(words)              # (N, L) to (N, L, words)
    scores, states = model(more, states)       # goes on

Merity, Keskar & Socher 2018. What its classes are for fastai are options here:

- ``WeightDropout`` around each torch.nn.LSTM: ``weight_dropout``, one mask on weight_hh a call.
- ``RNNDropout`` on the embedded words: ``input_dropout`` of the first layer, one mask for all
  steps.
- ``RNNDropout`` between the layers: the same option of each later layer. Layers of one width could
  be a single LSTM with ``dropout`` and ``variational_dropout``. Here the last one is narrower, for
  its output is multiplied with the embedding, which is also the weight of the classifier.

Dropout of whole words in the embedding is left out: a line of fastai's to put before the first
layer. The rates are fastai's for a language model, times ``scale``.

    python examples/awd_lstm.py                # trains a small one on the text of this file
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

import lstm_ext

States = list[tuple[Tensor, Tensor]]


class AWDLSTM(nn.Module):
    """A language model: embedding, LSTMs with dropout in every place but one, tied classifier.

    Args:
        words: size of the vocabulary.
        embedding: number of features of a word.
        hidden: of all layers but the last, which has those of a word.
        layers: number of layers.
        scale: what the rates of dropout are multiplied with.
    """

    def __init__(
        self,
        words: int,
        embedding: int = 400,
        hidden: int = 1152,
        layers: int = 3,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        sizes = [embedding] + [hidden] * (layers - 1) + [embedding]
        self.layers = nn.ModuleList(
            lstm_ext.LSTM(
                inputs, outputs, batch_first=True, weight_dropout=0.2 * scale,
                input_dropout=(0.25 if k == 0 else 0.15) * scale,
            )
            for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes))
        )  # fmt: skip
        self.output_dropout = 0.1 * scale
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, words: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Map words (N, L), and the states of the layers, to scores (N, L, words) and states."""
        x, after = self.embedding(words), []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, last = layer(x, state)
            after.append(last)
        if self.training:
            x = x * torch.dropout(torch.ones_like(x[:, :1]), self.output_dropout, True)
        return nn.functional.linear(x, self.embedding.weight, self.bias), after


def main(arguments: list[str] | None = None) -> None:
    """Train a small model on the characters of this file."""
    parser = argparse.ArgumentParser(description="train a small AWD-LSTM on the text of this file")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=96)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    text = Path(__file__).read_text()
    characters = sorted(set(text))
    data = torch.tensor([characters.index(character) for character in text])
    N, L = 8, 32
    rows = data[: len(data) // N * N].view(N, -1)
    model = AWDLSTM(len(characters), 32, options.hidden, scale=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    states, first, loss = None, 0.0, torch.tensor(0.0)
    for step in range(options.steps):
        start = step % ((rows.shape[1] - 1) // L) * L
        piece = rows[:, start : start + L + 1]
        states = None if start == 0 else [(h.detach(), c.detach()) for h, c in states or []]
        scores, states = model(piece[:, :-1], states)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        first = loss.item() if step == 0 else first
    print(f"loss {first:.3f} to {loss.item():.3f} in {options.steps} steps")


if __name__ == "__main__":
    main()
