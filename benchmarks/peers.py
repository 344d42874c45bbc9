"""What the cell is measured against: each peer computes the same from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lstm_ext

Cell = Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]

OURS = "lstm_ext"
TORCH = "nn.LSTMCell"
COMPILED = "torch.compile"
REFERENCE = "reference"
FUNCTION = "LSTMCellFunction"


@dataclass
class Peer:
    """A cell to call, and the module whose parameters collect its gradients."""

    call: Cell
    module: nn.Module


def cells(
    input_size: int, hidden_size: int, dtype: torch.dtype, names: list[str]
) -> dict[str, Peer]:
    """Build the named peers with equal weights, each with parameters of its own."""
    torch._dynamo.reset()
    weights = nn.LSTMCell(input_size, hidden_size, dtype=dtype).state_dict()
    peers = {}
    for name in names:
        kind = lstm_ext.LSTMCell if name in (OURS, FUNCTION) else nn.LSTMCell
        module = kind(input_size, hidden_size, dtype=dtype)
        module.load_state_dict(weights)
        peers[name] = Peer(_call(name, module), module)
    return peers


def _call(name: str, module: nn.Module) -> Cell:
    parameters = tuple(module.parameters())
    if name == COMPILED:
        return torch.compile(module, dynamic=False)
    if name == REFERENCE:
        return lambda x, hx: lstm_ext.reference.lstm_cell(x, hx, *parameters)
    if name == FUNCTION:
        return lambda x, hx: lstm_ext.LSTMCellFunction.apply(x, *hx, *parameters)
    return module
