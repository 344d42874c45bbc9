"""lstm_ext: the LSTM cell as one fused operation, a drop-in for ``torch.nn.LSTMCell``.

``LSTMCell`` is the module, ``lstm_cell`` its functional form, ``LSTMCellFunction`` the autograd
Function, ``reference`` the same in plain torch operations, ``build_info`` what was compiled.
"""

from __future__ import annotations

from lstm_ext import reference
from lstm_ext._info import __version__, build_info
from lstm_ext.autograd import LSTMCellFunction
from lstm_ext.cell import LSTMCell
from lstm_ext.functional import lstm_cell

__all__ = [
    "LSTMCell",
    "LSTMCellFunction",
    "__version__",
    "build_info",
    "lstm_cell",
    "reference",
]
