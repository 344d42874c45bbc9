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
def build_info() -> dict[str, str | bool]: ...
