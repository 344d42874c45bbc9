"""lstm_ext: the LSTM as fused operations, drop-ins for ``torch.nn.LSTMCell`` and ``torch.nn.LSTM``.

- ``LSTMCell`` and ``LSTM`` are the modules, ``lstm_cell`` and ``lstm`` their functional forms.
- ``LayerNormLSTM`` and ``LayerNormLSTMCell`` normalise their layers.
- ``run_sequences`` runs an LSTM over a list of sequences of different lengths.
- ``convert`` makes the LSTMs of a model ours, ``revert`` makes them torch's again. ``replacing``
  does it for models that other code constructs.
- ``init`` writes initial weights.
- ``freeze`` packs weights once, for inference; ``frozen_error`` measures what rounding them costs.
- ``trace_gates`` records gates and states, ``plot`` draws them.
- ``reference`` is the LSTM in plain torch operations; ``LSTMCellFunction`` is an autograd Function.
- ``build_info`` describes the build; ``set_cuda_backend`` chooses the kernels on a GPU.
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
from lstm_ext.layer_norm import LayerNormLSTM, LayerNormLSTMCell
from lstm_ext.replacing import replacing

__all__ = [
    "LSTM",
    "FrozenError",
    "GateTrace",
    "LSTMCell",
    "LSTMCellFunction",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
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
