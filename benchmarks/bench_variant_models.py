"""Whole models with options of a step, beside the modules that they stand for.

    python benchmarks/bench_variant_models.py [--models NAME ..] [--modes inference training]

- awd_lstm: examples/awd_lstm.py, beside torch.nn.LSTM with fastai's WeightDropout and RNNDropout.
- zoneout_decoder: examples/zoneout_decoder.py, beside torch.nn.LSTMCell with zoneout by hand.
- rnnt_predictor: torchaudio's predictor of an RNN-T, as lstm_ext.convert makes it, beside
  torchaudio's own; for a batch of sequences, and for one symbol of ten hypotheses (inference only).

Microseconds a call, medians taken in turn, one thread: inference, and forward with backward. The
numbers of each pair are compared first, in evaluation mode. The rows are written to
benchmarks/results/variant_models.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol
import torch
from torch import Tensor, nn

import lstm_ext

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import awd_lstm
import zoneout_decoder

Run = Callable[[nn.Module], Tensor]
Pair = tuple[nn.Module, nn.Module, Run]  # ours, theirs, a call of either


class WeightDropped(nn.LSTM):
    """fastai's WeightDropout and RNNDropout, of one layer."""

    def __init__(self, layer: lstm_ext.LSTM) -> None:
        super().__init__(layer.input_size, layer.hidden_size, batch_first=True)
        self.load_state_dict(layer.state_dict())
        self.rates = layer.input_dropout, layer.weight_dropout

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """Drop features, the same at each step, and weights of h."""
        of_input, of_weights = self.rates
        if self.training:
            x = x * nn.functional.dropout(torch.ones_like(x[:, :1]), of_input)
        weights = dict(self.named_parameters())
        w_hh = weights["weight_hh_l0"]
        dropped = nn.functional.dropout(w_hh, of_weights, training=self.training)
        order = [
            weights["weight_ih_l0"], dropped, weights["bias_ih_l0"], weights["bias_hh_l0"],
        ]  # fmt: skip
        if hx is None:
            zeros = x.new_zeros(1, x.shape[0], self.hidden_size)
            hx = zeros, zeros
        output, h, c = torch._VF.lstm(x, hx, order, True, 1, 0.0, self.training, False, True)
        return output, (h, c)


def awd() -> Pair:
    ours = awd_lstm.AWDLSTM(1000, 128, 256)
    theirs = copy.deepcopy(ours)
    theirs.layers = nn.ModuleList(WeightDropped(layer) for layer in ours.layers)
    words = torch.randint(1000, (16, 70))
    return ours, theirs, lambda model: model(words)[0]


def zoneout() -> Pair:
    ours = zoneout_decoder.Decoder(128, 80, 256, 64, dropout=0.0)
    memory, frames = zoneout_decoder.example(8, 50, ours)
    return ours, zoneout_decoder.with_torchs_cells(ours), lambda model: model(memory, frames)


def predictor(N: int, U: int) -> Pair:
    # None of its binary is needed, and that of PyPI asks for torch with CUDA.
    stub: Any = types.ModuleType("torchaudio._extension")
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
    stub.fail_if_no_align = lambda function: function
    sys.modules.setdefault(stub.__name__, stub)
    rnnt: Any = importlib.import_module("torchaudio.models.rnnt")
    theirs = rnnt._Predictor(
        128, 256, symbol_embedding_dim=256, num_lstm_layers=3, lstm_hidden_dim=512,
        lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3,
    )  # fmt: skip
    words, lengths = torch.randint(128, (N, U)), torch.full((N,), U, dtype=torch.int32)
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    return ours, theirs, lambda model: model(words, lengths, None)[0]


MODELS: dict[str, tuple[str, Callable[[], Pair]]] = {
    "awd_lstm": ("16 x 70 words, 128 -> 256", awd),
    "zoneout_decoder": ("8 x 50 frames, H 256", zoneout),
    "rnnt_predictor": ("8 x 30 symbols, H 512", lambda: predictor(8, 30)),
    "rnnt_predictor, a symbol": ("10 x 1 symbol, H 512", lambda: predictor(10, 1)),
}


def compare(ours: nn.Module, theirs: nn.Module, run: Run) -> None:
    """Raise an error unless both compute the same in evaluation mode."""
    with torch.no_grad():
        found, expected = run(ours.eval()), run(theirs.eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def call_of(model: nn.Module, run: Run, mode: str) -> Callable[[], object]:
    model.train(mode == "training")
    if mode == "training":
        return lambda: run(model).square().mean().backward()

    def infer() -> Tensor:
        with torch.no_grad():
            return run(model)

    return infer


def measure(name: str, mode: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    size, make = MODELS[name]
    ours, theirs, run = make()
    compare(ours, theirs, run)
    calls = {"lstm_ext": call_of(ours, run, mode), "theirs": call_of(theirs, run, mode)}
    times = protocol.interleaved(calls, rounds)
    ratio = times["theirs"] / times["lstm_ext"]
    print(f"{name:26} {mode:9} ours {times['lstm_ext']:.0f}; theirs / ours {ratio:.2f}", flush=True)
    return {"model": name, "size": size, "mode": mode, "us": times, "over_ours": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    modes = ["inference", "training"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--rounds", type=int, default=9)
    results = Path(__file__).parent / "results" / "variant_models.json"
    parser.add_argument("--out", type=Path, default=results)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(name, mode, options.rounds)
        for name in options.models
        for mode in options.modes
        if not (name.endswith("a symbol") and mode == "training")
    ]
    protocol.save(options.out, rows)


if __name__ == "__main__":
    main()
