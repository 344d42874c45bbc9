"""Speed on a GPU: the cell against nn.LSTMCell, the layer against nn.LSTM (cuDNN).

    python benchmarks/bench_cuda.py                    all cases
    python benchmarks/bench_cuda.py --seconds 120      what can be done in that time, best first
    python benchmarks/bench_cuda.py --grid             layers at many sizes instead: where ours wins
    python benchmarks/bench_cuda.py --device cpu --quick         the script itself, without a GPU
    python benchmarks/report.py benchmarks/results/cuda.json     table and chart of a result file

Ours are lstm_ext.LSTM and lstm_ext.LSTMCell with ``set_cuda_backend("fused")``. Two times are taken
of each call: ``graph``, replayed from a CUDA graph, so that the host does not matter; and
``eager``, as a user calls it. A shape is batch x input x hidden for the cell, time x batch x input
x hidden for the layer. Modes: ``inference`` under no_grad; ``training``, a forward and a backward
with the gradients of input, states and parameters. ``tf32`` is float32 with TF32 allowed in every
product, ``float32`` with TF32 forbidden; ``default`` is float32 with torch's own settings, which
allow it to cuDNN's layers alone.

A case that fails is a row with its error, and the next one goes on; the results are written after
every case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import protocol
import report
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

OURS, CELL, LAYER = "lstm_ext", "nn.LSTMCell", "nn.LSTM"
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "default": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Shape = tuple[int, ...]


class Case(NamedTuple):
    """What is timed: a cell or a layer, plain, packed or in both directions, or two layers."""

    kind: str  # "cell", "layer", "packed layer", "bidirectional layer", "two layers"
    shape: Shape
    dtype: str

    @property
    def rival(self) -> str:
        """Torch's own module."""
        return CELL if self.kind == "cell" else LAYER


# What matters most comes first: time may run out.
CASES = [
    Case("layer", (1024, 16, 768, 768), "float16"),
    Case("layer", (50, 64, 512, 512), "bfloat16"),
    Case("layer", (50, 64, 512, 512), "tf32"),
    Case("layer", (100, 1, 256, 256), "float32"),
    Case("layer", (50, 16, 128, 128), "float32"),
    Case("cell", (32, 256, 256), "float32"),
    Case("cell", (64, 512, 512), "bfloat16"),
    Case("packed layer", (50, 32, 256, 256), "bfloat16"),
    Case("layer", (100, 256, 64, 64), "float16"),
    Case("layer", (100, 256, 64, 64), "float32"),
    Case("layer", (50, 64, 512, 512), "float16"),
    Case("layer", (50, 64, 512, 512), "float32"),
    Case("cell", (1, 128, 128), "float32"),
    Case("cell", (256, 1024, 1024), "bfloat16"),
    Case("cell", (4096, 64, 64), "float32"),
    Case("bidirectional layer", (50, 32, 256, 256), "bfloat16"),
    Case("layer", (100, 1, 1024, 1024), "float16"),
    Case("layer", (20, 128, 1024, 1024), "bfloat16"),
    Case("layer", (1024, 16, 768, 768), "bfloat16"),
    Case("packed layer", (50, 32, 256, 256), "float32"),
    Case("layer", (35, 20, 100, 33), "float32"),
    Case("layer", (50, 16, 128, 128), "float16"),
    Case("cell", (1, 1024, 1024), "float16"),
    Case("cell", (7, 100, 33), "float32"),
    Case("cell", (256, 1024, 1024), "tf32"),
    Case("cell", (64, 512, 512), "float32"),
]
GRID = [
    Case("layer", (50, N, H, H), dtype)
    for H in (256, 128, 512, 1024, 64, 192, 384, 768)
    for N in (16, 1, 64, 128, 32)
    for dtype in ("default", "bfloat16", "float16")
] + [
    # Small ones in all dtypes, at sizes that are no multiple of anything, and for many rows; and
    # both directions at once and two layers, which cuDNN overlaps.
    Case(kind, (50, N, H, H), dtype)
    for kind, hidden, rows, dtypes in (
        ("layer", (64, 128, 33, 100), (16, 1, 64, 256), ("float32",)),
        ("layer", (64, 128, 33, 100), (256, 17), ("default", "bfloat16", "float16")),
        ("bidirectional layer", (64, 128, 256, 512), (16, 64), ("default", "bfloat16", "float16")),
        ("two layers", (64, 128, 256, 512), (16, 64), ("default", "bfloat16", "float16")),
    )
    for H in hidden
    for N in rows
    for dtype in dtypes
]
QUICK = [Case("cell", (3, 4, 5), "float32"), Case("layer", (4, 3, 2, 5), "float32"),
         Case("packed layer", (4, 3, 2, 5), "bfloat16"),
         Case("two layers", (4, 3, 2, 5), "float32")]  # fmt: skip


def set_precision(dtype: str) -> None:
    """Allow TF32 or forbid it, to cuBLAS and to cuDNN."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee" if dtype == "float32" else "tf32"


def modules(case: Case, device: str) -> dict[str, nn.Module]:
    """Build ours and theirs with equal weights."""
    options: dict[str, Any] = {"device": device, "dtype": DTYPES[case.dtype]}
    name = "LSTMCell" if case.kind == "cell" else "LSTM"
    kinds: dict[str, dict[str, Any]] = {
        "bidirectional layer": {"bidirectional": True},
        "two layers": {"num_layers": 2},
    }
    of_kind = kinds.get(case.kind, {})
    theirs = getattr(nn, name)(*case.shape[-2:], **of_kind).to(**options)
    ours = getattr(lstm_ext, name)(*case.shape[-2:], **of_kind).to(**options)
    ours.load_state_dict(theirs.state_dict())
    return {OURS: ours, case.rival: theirs}


def inputs(case: Case, device: str) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Return the input, packed where the kind says so, and the states: all leaves.

    Drawn on the CPU: a capture that fails leaves the GPU's generator of no use.
    """
    N, H = case.shape[-3], case.shape[-1]
    ahead = {"cell": (), "bidirectional layer": (2,), "two layers": (2,)}.get(case.kind, (1,))

    def leaf(values: Tensor) -> Tensor:
        return values.to(device, DTYPES[case.dtype]).requires_grad_()

    states = leaf(torch.randn(*ahead, N, H)), leaf(torch.randn(*ahead, N, H))
    x = torch.randn(*case.shape[:-1])
    if case.kind != "packed layer":
        return leaf(x), states
    lengths = torch.linspace(case.shape[0], max(1, case.shape[0] // 4), N).long()
    packed = pack_padded_sequence(x, lengths)
    return packed._replace(data=leaf(packed.data)), states


def output_of(module: nn.Module, x: Any, states: Any) -> Tensor:
    found: Any = module(x, states)[0]
    return found.data if isinstance(found, PackedSequence) else found


def closure(module: nn.Module, x: Any, states: Any, training: bool) -> Callable[[], Any]:
    """Return one call, ready to be timed."""
    if not training:

        def infer() -> Tensor:
            with torch.no_grad():
                return output_of(module, x, states)

        return infer
    output = output_of(module, x, states)
    # The same gradient for both sides.
    grad = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    grad = grad.to(output.dtype)
    leaves = [x.data if isinstance(x, PackedSequence) else x, *states, *module.parameters()]
    return lambda: torch.autograd.grad(output_of(module, x, states), leaves, grad)


def check_correct(calls: dict[str, Callable[[], Any]], dtype: str) -> None:
    """Fail before a row is timed unless both compute the same, outputs or gradients."""
    eps = 2**-10 if dtype in ("tf32", "default") else torch.finfo(DTYPES[dtype]).eps
    results = []
    for call in calls.values():
        found = call()
        results.append(found if isinstance(found, tuple) else (found,))
    for k, pair in enumerate(zip(*results, strict=True)):
        ours, theirs = (t.detach().double() for t in pair)
        error = float((ours - theirs).norm() / theirs.norm())
        # Not "error > ...": NaN is no small error.
        if not error < 64 * eps:
            raise AssertionError(f"result {k} differs from torch's by {error:.2g}")


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """Capture the call in a CUDA graph; return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def event_microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Return a call's mean time between two events on the stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / repeats


def by_events(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time the calls in turn, A B A B, on the GPU's own clock; return medians."""
    repeats = {}
    for name, call in calls.items():
        event_microseconds(call, 2)
        repeats[name] = max(1, int(10_000 / max(event_microseconds(call, 1), 1.0)))
        repeats[name] = min(repeats[name], 200)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(event_microseconds(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def times(
    calls: dict[str, Callable[[], Any]], rounds: int, on_gpu: bool
) -> Iterator[tuple[str, dict[str, float], dict[str, str]]]:
    """Yield each way of timing, microseconds by name, and what could not be timed and why."""
    if not on_gpu:
        yield "eager", protocol.interleaved(calls, rounds), {}
        return
    graphs, failed = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = graphed(call)
        except RuntimeError as error:  # cuDNN's packed sequences cannot be captured, for one
            failed[name] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    yield "graph", by_events(graphs, rounds), failed
    yield "eager", by_events(calls, rounds), {}


def bench_mode(case: Case, training: bool, device: str, rounds: int) -> list[dict[str, Any]]:
    """Time one mode of a case: a row for each way of timing."""
    built = modules(case, device)
    x, states = inputs(case, device)
    calls = {name: closure(module, x, states, training) for name, module in built.items()}
    check_correct(calls, case.dtype)
    rows = []
    for way, found, failed in times(calls, rounds, device == "cuda"):
        row = row_of(case, training, way)
        row["microseconds"] = found
        if failed:
            row["failed"] = failed
        if case.rival in found and OURS in found:
            row["ratio"] = found[case.rival] / found[OURS]
        rows.append(row)
    return rows


def row_of(case: Case, training: bool, way: str) -> dict[str, Any]:
    mode = "training" if training else "inference"
    return {
        "model": case.dtype,
        "shape": list(case.shape),
        "mode": f"{case.kind} {mode}, {way}",
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "microseconds": {},
    }


def say(row: dict[str, Any]) -> None:
    """Print a row at once."""
    numbers = ", ".join(f"{name} {t:.1f} us" for name, t in row["microseconds"].items())
    ratio = f", ratio {row['ratio']:.2f}" if "ratio" in row else ""
    trouble = row.get("error") or ", ".join(f"{n}: {e}" for n, e in row.get("failed", {}).items())
    print(f"{row['mode']:32} {report.name(row):36} {numbers}{ratio}  {trouble}", flush=True)


def bench_case(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Time both modes of a case; what fails is a row that says so."""
    rows = []
    set_precision(case.dtype)
    for training in (False, True):
        try:
            found = bench_mode(case, training, device, rounds)
        except Exception as error:  # whatever it is, the next case goes on
            found = [row_of(case, training, "failed")]
            found[0]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        for row in found:
            say(row)
        rows += found
        if device == "cuda":
            torch.cuda.synchronize()  # a broken device ends the run here, with its own error
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--kinds", nargs="+", default=None, help="cell, layer, 'packed layer', ..")
    parser.add_argument("--grid", action="store_true", help="layers at many sizes")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time to be done in")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each call")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cuda.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the script")
    begin = time.monotonic()
    protocol.environment()
    lstm_ext.set_cuda_backend("fused")
    torch.manual_seed(0)
    cases = [
        case
        for case in (QUICK if options.quick else GRID if options.grid else CASES)
        if case.dtype in options.dtypes and (options.kinds is None or case.kind in options.kinds)
    ]
    rows: list[dict[str, Any]] = []
    left = len(cases)
    for case in cases:
        if rows and time.monotonic() - begin > options.seconds:
            break
        rows += bench_case(case, options.device, options.rounds)
        left -= 1
        protocol.save(
            options.out,
            rows,
            title="LSTM on a GPU" if options.device == "cuda" else "LSTM, a try on the CPU",
            rivals="nn.LSTMCell or nn.LSTM (cuDNN)",
            cases_left_out=left,
        )
    if not rows:
        print("no case was timed")
        return 1
    print()
    report.print_table(options.out)
    if left:
        print(f"\n{left} of {len(cases)} cases left out: {options.seconds:.0f} seconds were over")
    return 0 if any("ratio" in row for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
