"""The compiled part of lstm_ext; importing it registers ``torch.ops.lstm_ext``."""

from typing import Any

from torch import Tensor

def lstm_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def lstm_cell_module(
    module_dict: dict[str, Any], input: Tensor, hx: tuple[Tensor, Tensor] | None, /
) -> tuple[Tensor, Tensor] | None: ...

# Of the same arguments.
frozen_lstm_cell_module = lstm_cell_module
lstm_cell_module_with_steps = lstm_cell_module

def lstm_module(
    module_dict: dict[str, Any],
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    batch_sizes: Tensor | None,
    /,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None: ...

frozen_lstm_module = lstm_module
lstm_module_with_steps = lstm_module

def set_gpu_cells_by_torch(by_torch: bool, /) -> None: ...
def build_info() -> dict[str, str | bool]: ...
