"""Speed and error of frozen layers in fewer bits against onnxruntime's and torch's int8.

    python benchmarks/bench_frozen.py                    the whole grid, 1 and all threads
    python benchmarks/bench_frozen.py --shapes 100x1x64x64 --threads 1
    python benchmarks/report.py benchmarks/results/frozen.json   table of a result file

A shape is time x batch x input size x hidden size. A mode is what we compute in, and decides who is
compared with it: ``float32`` with onnxruntime's float32 and nn.LSTM; ``bfloat16``, ``int8`` and
``int8, int16 activations`` with onnxruntime's DynamicQuantizeLSTM and torch.ao's quantize_dynamic
(bfloat16 has no rival of its own kind). Every row has the error of each, that of the output against
nn.LSTM in float64, in percent. onnxruntime runs in processes of its own.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import protocol
import report
import sequence_peers as peers
import torch
from bench_sequence import parse_shape
from torch import nn
from tqdm import tqdm

import lstm_ext

GRID = [
    "100x1x64x64",
    "100x1x256x256",
    "100x1x512x512",
    "37x5x30x100",
    "60x2x40x80",
    "50x16x128x128",
    "50x32x256x256",
    "50x64x512x512",
    "100x256x64x64",
    "200x4x80x320",
    "1x1x256x256",
]
QUICK = ["20x1x3x2", "10x9x20x33"]
KINDS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int8, int16 activations": {"weights": "int8", "activations": "int16"},
}
ORT_INT8, AO = "onnxruntime int8", "torch.ao int8"
RIVALS = {kind: [peers.TORCH, peers.ORT] if kind == "float32" else [ORT_INT8, AO] for kind in KINDS}
PEERS = [peers.TORCH, peers.ORT, ORT_INT8, AO]


def torch_ao(module: nn.LSTM) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will go
        model = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(copy.deepcopy(module)), {nn.LSTM}, dtype=torch.qint8
        )
    layer: nn.Module = model[0]
    return layer


def bench_shape(shape: Any, kinds: list[str], names: list[str], rounds: int) -> list[Any]:
    """Time all that computes this shape in turns; return a row for each kind."""
    L, N, I, H = shape
    plain = nn.LSTM(I, H).eval()
    ours = lstm_ext.LSTM(I, H).eval()
    ours.load_state_dict(plain.state_dict())
    x, states = torch.randn(L, N, I), (torch.zeros(1, N, H), torch.zeros(1, N, H))
    calls: dict[str, Any] = {}
    outputs: dict[str, torch.Tensor] = {}
    workers = []
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())[0]

        def add(name: str, module: nn.Module) -> None:
            calls[name] = lambda: module(x, states)
            outputs[name] = module(x, states)[0]

        for kind in kinds:
            add(kind, lstm_ext.freeze(copy.deepcopy(ours), **KINDS[kind]))
        if peers.TORCH in names:
            add(peers.TORCH, plain)
        if AO in names:
            add(AO, torch_ao(plain))
        for name in (peers.ORT, ORT_INT8):
            if name in names:
                worker = peers.Onnxruntime(ours, x, states, quantized=name == ORT_INT8)
                workers.append(worker)
                calls[name], outputs[name] = worker, worker.output
        errors = {
            name: float(100 * (output - exact).norm() / exact.norm())
            for name, output in outputs.items()
        }
        assert all(error < 10 for error in errors.values()), errors
        times = protocol.interleaved(calls, rounds)
    for worker in workers:
        worker.close()
    rows = []
    for kind in kinds:
        rivals = [name for name in RIVALS[kind] if name in times]
        row = {
            "shape": list(shape),
            "mode": kind,
            "threads": torch.get_num_threads(),
            "microseconds": {"lstm_ext": times[kind], **{n: times[n] for n in names}},
            "error_percent": {"lstm_ext": errors[kind], **{n: errors[n] for n in names}},
        }
        if kind != "float32" and "float32" in times:
            row["times_float32"] = times["float32"] / times[kind]
        if rivals:
            row["ratio"] = min(times[name] for name in rivals) / times[kind]
        rows.append(row)
    return rows


def main() -> None:
    kinds = list(KINDS)
    parser = protocol.options(__doc__, parse_shape, kinds, PEERS, PEERS, "frozen.json")
    options = parser.parse_args()
    threads = options.threads or sorted({1, torch.get_num_threads()})
    rounds = options.rounds or (3 if options.quick else 7)
    torch.manual_seed(0)
    shapes = options.shapes or [parse_shape(s) for s in (QUICK if options.quick else GRID)]
    protocol.environment()
    rows: list[Any] = []
    for count, shape in tqdm([(t, s) for t in threads for s in shapes], desc="shapes"):
        torch.set_num_threads(count)
        rows += bench_shape(shape, options.modes, options.peers, rounds)
        protocol.save(options.out, rows, title="Frozen LSTM layer", rivals="the rivals named")
    report.print_table(options.out)


if __name__ == "__main__":
    main()
