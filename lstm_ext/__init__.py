"""lstm_ext: the LSTM as fused operations, drop-ins for ``torch.nn.LSTMCell`` and ``torch.nn.LSTM``.

``LSTMCell`` and ``LSTM`` are the modules, ``lstm_cell`` and ``lstm`` their functional forms,
``run_sequences`` runs a list of sequences of different lengths;
``convert`` puts them in the place of torch's modules, ``replacing`` in that of modules which others
build, ``init`` writes initial weights, ``freeze`` packs their weights for inference,
``frozen_error`` says what that costs in accuracy;
``trace_gates`` looks inside, ``plot`` draws what it finds; ``LSTMCellFunction`` is the autograd
Function, ``reference`` the same in plain torch operations, ``build_info`` what was compiled.
"""

from __future__ import annotations

from lstm_ext import _check_load as _check_load
from lstm_ext import _flops as _flops
from lstm_ext import _vmap as _vmap
from lstm_ext import init, reference
from lstm_ext._backend import cuda_backend, set_cuda_backend
from lstm_ext._info import __version__, build_info
from lstm_ext._onnx import onnx_translations
from lstm_ext._ragged import run_sequences
from lstm_ext.autograd import LSTMCellFunction
from lstm_ext.cell import LSTMCell
from lstm_ext.convert import convert, revert
from lstm_ext.frozen import freeze, unfreeze
from lstm_ext.functional import LayerWeights, lstm, lstm_cell
from lstm_ext.inspect import plot
from lstm_ext.inspect.frozen import FrozenError, frozen_error
from lstm_ext.inspect.gates import GateTrace, trace_gates
from lstm_ext.layer import LSTM
from lstm_ext.replacing import replacing

__all__ = [
    "LSTM",
    "FrozenError",
    "GateTrace",
    "LSTMCell",
    "LSTMCellFunction",
    "LayerWeights",
    "__version__",
    "build_info",
    "convert",
    "cuda_backend",
    "freeze",
    "frozen_error",
    "init",
    "lstm",
    "lstm_cell",
    "onnx_translations",
    "plot",
    "reference",
    "replacing",
    "revert",
    "run_sequences",
    "set_cuda_backend",
    "trace_gates",
    "unfreeze",
]
