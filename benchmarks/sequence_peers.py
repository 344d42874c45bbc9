"""What the layer is measured against, each computing the same from the same weights."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext

OURS = "lstm_ext"
FROZEN = "lstm_ext, frozen"
TORCH = "nn.LSTM"
NO_ONEDNN = "nn.LSTM without oneDNN"
CELLS = "loop of nn.LSTMCell"
ORT = "onnxruntime"
VNNI = ("AVX2_VNNI", "AVX512_VNNI", "AVX512_BF16")  # instruction sets that have it

Layer = Callable[..., Any]


@dataclass
class Peer:
    """An LSTM to call, and the module whose parameters collect its gradients."""

    call: Layer
    module: nn.Module


def layers(I: int, H: int, dtype: torch.dtype, names: list[str], **options: Any) -> dict[str, Peer]:
    """Build the named peers with equal weights, each with parameters of its own."""
    weights = nn.LSTM(I, H, dtype=dtype, **options).state_dict()
    peers = {}
    for name in names:
        module: nn.Module
        if name == CELLS:
            module = nn.LSTMCell(I, H, dtype=dtype)
            module.load_state_dict({k.removesuffix("_l0"): v for k, v in weights.items()})
            peers[name] = Peer(_loop(module), module)
            continue
        kind = lstm_ext.LSTM if name in (OURS, FROZEN) else nn.LSTM
        module = kind(I, H, dtype=dtype, **options)
        module.load_state_dict(weights)
        if name == FROZEN:
            module = lstm_ext.freeze(module.eval())
        peers[name] = Peer(_without_onednn(module) if name == NO_ONEDNN else module, module)
    return peers


def _loop(cell: nn.Module) -> Layer:
    def run(x: Tensor, states: tuple[Tensor, Tensor]) -> Any:
        h, c = states[0][0], states[1][0]
        outputs = []
        for step in x:
            h, c = cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))

    return run


def _without_onednn(module: nn.Module) -> Layer:
    def run(x: Tensor | PackedSequence, states: tuple[Tensor, Tensor]) -> Any:
        with torch.backends.mkldnn.flags(enabled=False):
            return module(x, states)

    return run


class Onnxruntime:
    """A worker process that times onnxruntime when asked to; see ort_worker.py."""

    def __init__(
        self,
        module: lstm_ext.LSTM,
        x: Tensor,
        states: tuple[Tensor, Tensor],
        quantized: bool = False,
    ) -> None:
        directions = 2 if module.bidirectional else 1
        flat = [[w.detach().numpy() for w in weights] for weights in module.all_weights]
        inputs = {"x": x.numpy()}
        for layer in range(module.num_layers):
            part = slice(layer * directions, (layer + 1) * directions)
            inputs |= {f"h{layer}": states[0][part].numpy(), f"c{layer}": states[1][part].numpy()}
        case = {
            "shape": [*x.shape, module.hidden_size],
            "bidirectional": module.bidirectional,
            "weights": [flat[k : k + directions] for k in range(0, len(flat), directions)],
            "inputs": inputs,
            "threads": torch.get_num_threads(),
            "quantized": quantized,
            "vnni": lstm_ext.build_info()["cpu_instruction_set"] in VNNI,
        }
        worker = Path(__file__).with_name("ort_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        pickle.dump(case, self._to)
        self._to.flush()
        self.output = torch.from_numpy(pickle.load(self._from))

    def timeit(self, repeats: int) -> Any:
        """Time some runs, as torch.utils.benchmark.Timer does."""
        self._process.send_signal(signal.SIGCONT)
        self._to.write(f"{repeats}\n".encode())
        self._to.flush()
        result = SimpleNamespace(mean=float(self._from.readline()))
        # Its threads would go on spinning for a while, on the cores of whoever is next.
        self._process.send_signal(signal.SIGSTOP)
        return result

    def close(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGCONT)
        self._to.close()
        self._process.wait()
        self._from.close()
