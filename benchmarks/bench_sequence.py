"""Speed of a whole LSTM layer against nn.LSTM, a loop of nn.LSTMCell, and onnxruntime.

    python benchmarks/bench_sequence.py                  the whole grid, 1 and all threads
    python benchmarks/bench_sequence.py --shapes 100x1x64x64 --threads 1 --modes inference
    python benchmarks/report.py benchmarks/results/sequence.json   table and chart of a result file

A shape is time x batch x input size x hidden size. Modes: ``inference`` under no_grad (a first step
of length 1 is one call of streaming); ``training``, a forward and a backward that accumulates into
the parameters' .grad; both also ``packed``, with lengths from L down to L / 4, ``bidirectional``,
and with 2 ``layers``. ``input gradient training`` asks for the gradient of the input too, as
a layer above others has to; nn.LSTM with oneDNN computes it in any case. Frozen (lstm_ext.freeze)
and onnxruntime, which runs in a process of its own, are for inference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import limits
import protocol
import report
import sequence_peers as peers
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tqdm import tqdm

GRID = [
    "399x1x3x2",
    "100x1x64x64",
    "100x1x256x256",
    "100x1x512x512",
    "50x16x128x128",
    "50x32x256x256",
    "50x64x512x512",
    "20x128x1024x1024",
    "100x256x64x64",
    "1x1x256x256",
]
VARIED = ["100x1x64x64", "50x16x128x128", "50x32x256x256"]  # packed, bidirectional, layers
RAGGED = ["100x8x64x64", "50x16x128x128", "50x32x256x256"]
QUICK = ["20x1x3x2", "10x9x20x33"]
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "packed ": {},
    "bidirectional ": {"bidirectional": True},
    "layers ": {"num_layers": 2},
}
INPUT_GRADIENT = "input gradient training"
MODES = [kind + mode for kind in OPTIONS for mode in ("inference", "training")] + [INPUT_GRADIENT]
PEERS = [peers.FROZEN, peers.TORCH, peers.NO_ONEDNN, peers.CELLS, peers.ORT]
Shape = tuple[int, int, int, int]


def parse_shape(text: str) -> Shape:
    try:
        L, N, I, H = (int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not time x batch x input x hidden") from None
    return L, N, I, H


def flat(output: Any) -> torch.Tensor:
    value = output[0]
    tensor: torch.Tensor = value.data if isinstance(value, PackedSequence) else value
    return tensor


def check_correct(
    layers: dict[str, peers.Peer], x: Any, states: Any, grad: torch.Tensor | None
) -> None:
    """Fail before a row is timed unless every peer computes what the first one does."""
    results = []
    for peer in layers.values():
        output = flat(peer.call(x, states))
        result = [output]
        if grad is not None:
            leaves = list(peer.module.parameters())
            if isinstance(x, torch.Tensor) and x.requires_grad:
                leaves.append(x)
            result += torch.autograd.grad(output, leaves, grad)
        results.append([t.detach().double() for t in result])
    eps = torch.finfo(results[0][0].dtype if grad is None else grad.dtype).eps
    eps = max(eps, torch.finfo(states[0].dtype).eps)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            error = (a - b).norm() / b.norm().clamp_min(1e-30)
            assert error < 256 * eps, f"a peer's result is off by {error:.2g}"


def bench_row(
    shape: Shape,
    mode: str,
    dtype: torch.dtype,
    names: list[str],
    rounds: int,
    machine: limits.Limits,
) -> dict[str, Any]:
    L, N, I, H = shape
    kind, training = mode.removesuffix("inference").removesuffix("training"), "training" in mode
    input_gradient = mode == INPUT_GRADIENT
    options = OPTIONS.get(kind, {})
    directions, depth = 1 + options.get("bidirectional", False), options.get("num_layers", 1)
    names = [n for n in names if n != peers.CELLS or not kind]
    names = [n for n in names if n != peers.FROZEN or not training]
    local = [peers.OURS, *(n for n in names if n != peers.ORT)]
    layers = peers.layers(I, H, dtype, local, **options)
    padded = torch.randn(L, N, I).to(dtype).requires_grad_(input_gradient)
    states = tuple(torch.randn(directions * depth, N, H).to(dtype) for _ in range(2))
    x: Any = padded
    if kind == "packed ":
        lengths = torch.linspace(L, max(1, L // 4), N).long()
        x = pack_padded_sequence(padded, lengths)
    steps = len(x.data) if kind == "packed " else L * N
    flops = 0
    for layer in range(depth):
        inputs = I if layer == 0 else directions * H
        flops += 2 * steps * directions * 4 * H * (inputs + H)
        if training:  # of weights and states, and of the inputs of all layers but the first
            to_inputs = inputs if layer or input_gradient else 0
            flops += 2 * steps * directions * 4 * H * (inputs + 2 * H + to_inputs)

    ours = layers[peers.OURS]
    with torch.set_grad_enabled(training):
        grad = torch.randn_like(flat(ours.call(x, states))) if training else None
        check_correct(layers, x, states, grad)

        def closure(peer: peers.Peer) -> Callable[[], Any]:
            if grad is None:
                return lambda: peer.call(x, states)

            def train() -> None:
                padded.grad = None
                flat(peer.call(x, states)).backward(grad)

            return train

        calls: dict[str, Any] = {name: closure(peer) for name, peer in layers.items()}
        worker = None
        if peers.ORT in names and not training and kind != "packed " and dtype == torch.float32:
            worker = peers.Onnxruntime(ours.module, padded, states)  # type: ignore[arg-type]
            torch.testing.assert_close(worker.output, flat(ours.call(x, states)))
            calls[peers.ORT] = worker
        times = protocol.interleaved(calls, rounds)
        if worker is not None:
            worker.close()
    row: dict[str, Any] = {
        "shape": list(shape),
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "microseconds": times,
        "gflops": flops / times[peers.OURS] / 1e3,
    }
    rivals = [times[n] for n in (peers.TORCH, peers.ORT) if n in times]
    if rivals:
        row["ratio"] = min(rivals) / times[peers.OURS]
    if dtype == torch.float32:
        # One row at a time, every step reads the weights of the states, forward and backward.
        reads = L * directions * depth * (2 if training else 1) if N == 1 else 1
        least = max(machine.seconds(flops, 0), reads * machine.seconds(0, 4.0 * 4 * H * H))
        row["share_of_limit"] = least * 1e6 / times[peers.OURS]
    if training:
        row["kept_bytes"] = {
            name: protocol.kept_bytes(
                lambda call=peer.call: (flat(call(x, states)),),
                [x.data, *states, *peer.module.parameters()],
            )
            for name, peer in layers.items()
        }
    return row


def main() -> None:
    parser = protocol.options(__doc__, parse_shape, MODES, PEERS, PEERS, "sequence.json")
    options = parser.parse_args()
    threads = options.threads or sorted({1, torch.get_num_threads()})
    rounds = options.rounds or (3 if options.quick else 7)
    torch.manual_seed(0)

    def shapes(mode: str) -> list[Shape]:
        if options.shapes:
            return list(options.shapes)
        names = RAGGED if "packed" in mode else VARIED if " " in mode else GRID
        return [parse_shape(s) for s in (QUICK if options.quick else names)]

    protocol.environment()
    machine = limits.measure(threads)
    plan = [(t, shape, mode) for t in threads for mode in options.modes for shape in shapes(mode)]
    rows = []
    for count, shape, mode in tqdm(plan, desc="rows"):
        torch.set_num_threads(count)
        dtype = getattr(torch, options.dtype)
        rows.append(bench_row(shape, mode, dtype, options.peers, rounds, machine[count]))
        protocol.save(
            options.out,
            rows,
            title=f"LSTM layer, {options.dtype}",
            rivals="nn.LSTM and onnxruntime",
            limits=[asdict(machine[t]) for t in threads],
        )
    report.print_table(options.out)


if __name__ == "__main__":
    main()
