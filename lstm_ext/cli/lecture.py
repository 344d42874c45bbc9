"""The lecture's toy text and model: the main job of the demo, and a test bed small enough to print.

The text is the characters ``abaB`` over and over. After an ``a`` comes ``b`` or ``B``, depending on
what came two steps before: a next-character model needs memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

TEXT = "abaB" * 100
VOCABULARY = "abB"
SEED = 43052
LEARNING_RATE = 0.1
HIDDEN_SIZE = 2


def one_hot(text: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Encode a text as one-hot rows, (L, 3), in the vocabulary's order."""
    index = torch.tensor([VOCABULARY.index(character) for character in text])
    return nn.functional.one_hot(index, len(VOCABULARY)).to(dtype)


def data() -> tuple[Tensor, Tensor]:
    """Return inputs and targets, each (399, 3): all characters but the last, all but the first."""
    x = one_hot(TEXT)
    return x[:-1], x[1:]


class CellModel(nn.Module):
    """An LSTM cell stepped over the text, then a linear layer: logits of the next character.

    Args:
        cell_type: ``lstm_ext.LSTMCell``, or ``torch.nn.LSTMCell``, which starts from the same
            weights when the seed is the same.
    """

    def __init__(self, cell_type: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.cell = cell_type(len(VOCABULARY), HIDDEN_SIZE)
        self.linear = nn.Linear(HIDDEN_SIZE, len(VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        """Map (L, 3) to logits (L, 3), the state carried from step to step."""
        h = x.new_zeros(1, HIDDEN_SIZE)
        c = x.new_zeros(1, HIDDEN_SIZE)
        outputs = []
        for step in x.unsqueeze(1).unbind():
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        logits: Tensor = self.linear(torch.cat(outputs))
        return logits


class LayerModel(nn.Module):
    """The same with a layer, which takes the whole text at once.

    Args:
        layer_type: ``lstm_ext.LSTM`` or ``torch.nn.LSTM``.
    """

    def __init__(self, layer_type: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.lstm = layer_type(len(VOCABULARY), HIDDEN_SIZE)
        self.linear = nn.Linear(HIDDEN_SIZE, len(VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        """Map (L, 3) to logits (L, 3)."""
        output, _ = self.lstm(x)
        logits: Tensor = self.linear(output)
        return logits


def seeded_model(cell_type: Callable[[int, int], nn.Module]) -> CellModel:
    """Build the model from the lecture's seed: the cell's weights are drawn first."""
    torch.manual_seed(SEED)
    return CellModel(cell_type)


def seeded_layer_model(layer_type: Callable[[int, int], nn.Module]) -> LayerModel:
    """Build the layer's model from the lecture's seed, which gives it the cell's weights."""
    torch.manual_seed(SEED)
    return LayerModel(layer_type)


def train(model: nn.Module, epochs: Iterable[int]) -> list[float]:
    """Train as the lecture does (Adam, cross-entropy over the whole text) and return the losses.

    Args:
        model: maps (L, 3) to logits (L, 3).
        epochs: one pass over the text for each of its items; a progress bar will do.
    """
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in epochs:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def next_characters(model: nn.Module, text: str) -> str:
    """Return the model's guess at the character after each one of the text."""
    with torch.no_grad():
        best = model(one_hot(text)).argmax(1)
    return "".join(VOCABULARY[k] for k in best.tolist())
