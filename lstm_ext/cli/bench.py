"""``python -m lstm_ext bench``: ours against torch's own modules, at sizes that you choose.

The whole grids, more rivals and the protocol are in the repository's benchmarks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import benchmark

from lstm_ext.cell import LSTMCell
from lstm_ext.layer import LSTM

CELLS = [(1, 3, 2), (16, 128, 128), (64, 512, 512)]
LAYERS = [(100, 1, 64, 64), (50, 16, 128, 128)]
MODES = ("inference", "training step")
ROUNDS = 3


def parse_shape(text: str) -> tuple[int, ...]:
    """Read batch x input x hidden, or time x batch x input x hidden.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        shape = tuple(int(size) for size in text.split("x"))
    except ValueError:
        shape = ()
    if len(shape) not in (3, 4) or min(shape, default=0) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither batch x input x hidden nor time x batch x input x hidden, "
            "such as 32x256x256"
        )
    return shape


def name(shape: tuple[int, ...]) -> str:
    """Write a shape as a row's name: 32 x 256 -> 256."""
    return f"{' x '.join(map(str, shape[:-1]))} -> {shape[-1]}"


def measure(
    shapes: Iterable[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[Any], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """Time our modules and torch's in turn; microseconds a call, medians.

    Args:
        shapes: (N, I, H) for a cell, (L, N, I, H) for a layer.
        dtype: of everything.
        device: of everything.
        progress: wraps the list of what is to be timed; a progress bar will do.

    Returns:
        A dict a row: module, mode, shape, ours, torchs, and ratio, torch's time over ours.
    """
    rows = []
    cases = [(shape, mode) for shape in shapes for mode in MODES]
    for shape, mode in progress(cases):
        training = mode == "training step"
        *ahead, I, H = shape
        kinds: tuple[Any, Any] = (LSTMCell, nn.LSTMCell) if len(shape) == 3 else (LSTM, nn.LSTM)
        modules = [kind(I, H, device=device, dtype=dtype) for kind in kinds]
        x = torch.randn(*ahead, I, device=device, dtype=dtype)
        calls = [_training(module, x) if training else _inference(module, x) for module in modules]
        with torch.set_grad_enabled(training):
            times: list[list[float]] = [[], []]
            for _ in range(ROUNDS):
                for call, taken in zip(calls, times, strict=True):
                    timer = benchmark.Timer(
                        "call()", globals={"call": call}, num_threads=torch.get_num_threads()
                    )
                    taken.append(timer.blocked_autorange(min_run_time=0.1).median * 1e6)
        ours, torchs = (sorted(taken)[ROUNDS // 2] for taken in times)
        rows.append(
            {
                "module": kinds[1].__name__,
                "mode": mode,
                "shape": list(shape),
                "ours": ours,
                "torchs": torchs,
                "ratio": torchs / ours,
            }
        )
    return rows


def _inference(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    return lambda: module(x)


def _training(module: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    grad = torch.randn_like(module(x)[0])
    return lambda: module(x)[0].backward(grad)


def line(row: dict[str, Any]) -> str:
    """Write a row for the terminal."""
    return (
        f"  {row['module']:8} {row['mode']:13} {name(tuple(row['shape'])):24} "
        f"{row['ours']:10.1f} {row['torchs']:10.1f}   {row['ratio']:.2f} times as fast"
    )
