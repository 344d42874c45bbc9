"""The compiled part of lstm_ext; importing it registers ``torch.ops.lstm_ext``."""

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
def lstm(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: tuple[Tensor | None, ...],
    input_size: int,
    hidden_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    /,
) -> tuple[Tensor, Tensor, Tensor] | None: ...

lstm_packed = lstm  # of the same arguments

def lstm_cell_packed(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    packed: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    input_size: int,
    hidden_size: int,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def set_gpu_cells_by_torch(by_torch: bool, /) -> None: ...
def build_info() -> dict[str, str | bool]: ...
