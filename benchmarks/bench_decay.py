"""Inputs that decay to nothing: is the cell or the layer slower on numbers next to zero?

    python benchmarks/bench_decay.py

Denormal numbers (below 1e-38 in float32) take a processor many times as long as others, unless it
is told to take them for zero. Times ours and torch's modules, without biases, on inputs and states
of ordinary size and on the same times 1e-40; prints microseconds and their ratio.
"""

from __future__ import annotations

import functools

import protocol
import torch
from torch import nn

import lstm_ext

SHAPES = [(1, 64, 64), (16, 128, 128), (32, 256, 256)]
L = 20


def step(module: nn.Module, inputs: list[torch.Tensor], size: float) -> None:
    output = module(inputs[0], (inputs[1], inputs[2]))[0]
    output.backward(torch.full_like(output, size))


def main() -> None:
    torch.manual_seed(0)
    print(f"{'':36} ordinary   tiny    tiny / ordinary")
    for N, I, H in SHAPES:
        for name, kinds in (
            ("cell", (lstm_ext.LSTMCell, nn.LSTMCell)),
            ("layer", (lstm_ext.LSTM, nn.LSTM)),
        ):
            for package, kind in zip(("lstm_ext", "torch.nn"), kinds, strict=True):
                module = kind(I, H, bias=False)
                ahead = (N,) if name == "cell" else (L, N)
                states = (N, H) if name == "cell" else (1, N, H)
                x, h, c = torch.randn(*ahead, I), torch.randn(states), torch.randn(states)
                calls = {}
                for size in (1.0, 1e-40):
                    inputs = [(t * size).requires_grad_() for t in (x, h, c)]

                    calls[f"{size}"] = functools.partial(step, module, inputs, size)
                ordinary, tiny = protocol.interleaved(calls, rounds=7).values()
                shape = f"{N} x {I} -> {H}"
                print(
                    f"{name:6} {package:9} {shape:18} {ordinary:10.1f} {tiny:9.1f} "
                    f"{tiny / ordinary:8.2f}"
                )


if __name__ == "__main__":
    main()
