"""Speed on a GPU: the cell against nn.LSTMCell, a layer against nn.LSTM (cuDNN).

    python benchmarks/bench_cuda.py                    the whole grid
    python benchmarks/bench_cuda.py --seconds 120      what can be done in that time, best first
    python benchmarks/bench_cuda.py --device cpu --quick         the script itself, without a GPU
    python benchmarks/report.py benchmarks/results/cuda.json     table and chart of a result file

Three times are taken of each call: ``eager``, as a user calls it; ``graph``, replayed from a CUDA
graph, so that the host does not matter; ``kernels``, the sum of its kernels alone, by torch's
profiler. A shape is batch x input x hidden for the cell, time x batch x input x hidden for the
layer. Modes: ``inference`` under no_grad; ``training``, a forward and a backward with gradients of
input, states and parameters. ``tf32`` is float32 with TF32 allowed to both sides. nn.LSTMCell is
also compiled, at one shape of each dtype.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import protocol
import report
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tqdm import tqdm

import lstm_ext

OURS, CELL, COMPILED, LAYER = "lstm_ext", "nn.LSTMCell", "torch.compile", "nn.LSTM"
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CELLS = [(32, 256, 256), (1, 128, 128), (64, 512, 512), (7, 100, 33), (512, 64, 64),
         (256, 1024, 1024), (1, 1024, 1024), (4096, 64, 64)]  # fmt: skip
LAYERS = [(50, 32, 256, 256), (100, 1, 256, 256), (1024, 16, 768, 768), (100, 256, 64, 64),
          (50, 64, 512, 512), (35, 20, 100, 33), (100, 1, 1024, 1024),
          (20, 128, 1024, 1024)]  # fmt: skip
Shape = tuple[int, ...]


class OurLayer(nn.LSTM):
    """One layer by our own kernels, where lstm_ext.LSTM may leave it to cuDNN."""

    def forward(self, x: Any, hx: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        """As nn.LSTM, of a padded (L, N, I) or packed sequence."""
        packed = isinstance(x, PackedSequence)
        data, sizes = (x.data, x.batch_sizes) if packed else (x, None)
        weights = (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)
        output, h, c = torch.ops.lstm_ext.lstm_layer(
            data, hx[0][0], hx[1][0], *weights, sizes, None, False
        )
        return output, (h.unsqueeze(0), c.unsqueeze(0))


class TheirLayer(nn.LSTM):
    """nn.LSTM, with the same output of a packed sequence as OurLayer."""

    def forward(self, x: Any, hx: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        """Return the data of a packed output."""
        output, states = super().forward(x, hx)
        return (output.data if isinstance(output, PackedSequence) else output), states


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def modules(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """Build ours and theirs with equal weights."""
    sizes = shape[-2:]
    theirs: nn.Module = nn.LSTMCell(*sizes) if kind == "cell" else TheirLayer(*sizes)
    ours: nn.Module = lstm_ext.LSTMCell(*sizes) if kind == "cell" else OurLayer(*sizes)
    ours.load_state_dict(theirs.state_dict())
    found = {OURS: ours, CELL if kind == "cell" else LAYER: theirs}
    return {name: module.to(device, dtype) for name, module in found.items()}


def inputs(kind: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Return the input, packed where the kind says so, and the states."""
    N, H = shape[-3], shape[-1]
    x = torch.randn(*shape[:-1]).to(device, dtype).requires_grad_()
    ahead = () if kind == "cell" else (1,)
    states = tuple(torch.randn(*ahead, N, H).to(device, dtype).requires_grad_() for _ in range(2))
    if kind != "packed layer":
        return x, states
    lengths = torch.linspace(shape[0], max(1, shape[0] // 4), N).long()
    return pack_padded_sequence(x, lengths), states


def closure(module: nn.Module, x: Any, states: Any, training: bool) -> Callable[[], Any]:
    if not training:
        return lambda: module(x, states)
    out = module(x, states)
    grad = torch.randn_like(out[0])
    leaves = [x.data if isinstance(x, PackedSequence) else x, *states, *module.parameters()]
    return lambda: torch.autograd.grad(module(x, states)[0], leaves, grad)


def check_correct(calls: dict[str, nn.Module], x: Any, states: Any, eps: float) -> None:
    """Fail before a row is timed unless all compute the same."""
    first, *rest = (module(x, states)[0].detach().double() for module in calls.values())
    for other in rest:
        error = (other - first).norm() / first.norm()
        assert error < 64 * eps, f"results differ by {error:.2g}"


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


def kernel_microseconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Sum up the kernels of a call, by torch's profiler."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    total = sum(event.self_device_time_total for event in profile.key_averages())
    return float(total) / repeats


def times(calls: dict[str, Callable[[], Any]], rounds: int, on_gpu: bool) -> Iterator[Any]:
    """Yield each way of timing, and microseconds by name."""
    yield "eager", protocol.interleaved(calls, rounds)
    if not on_gpu:
        return
    yield "kernels", {name: kernel_microseconds(call) for name, call in calls.items()}
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = graphed(call)
        except RuntimeError as error:  # not every call can be captured: packed sequences of cuDNN
            print(f"{name} is not captured: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
    if OURS in graphs:
        yield "graph", protocol.interleaved(graphs, rounds)


def bench_row(
    case: tuple[str, Shape, str, str], device: str, rounds: int, compiled: bool
) -> list[dict[str, Any]]:
    kind, shape, dtype_name, mode = case
    dtype, training = DTYPES[dtype_name], mode == "training"
    allow_tf32(dtype_name == "tf32")
    built = modules(kind, shape, dtype, device)
    x, states = inputs(kind, shape, dtype, device)
    with torch.set_grad_enabled(training):
        check_correct(built, x, states, 2**-10 if dtype_name == "tf32" else torch.finfo(dtype).eps)
        if compiled:
            torch._dynamo.reset()
            built[COMPILED] = torch.compile(built[CELL], dynamic=False)  # type: ignore[assignment]
        calls = {name: closure(module, x, states, training) for name, module in built.items()}
        rows = []
        for way, found in times(calls, rounds, device == "cuda"):
            row: dict[str, Any] = {
                "model": dtype_name,
                "shape": list(shape),
                "mode": f"{kind} {mode}, {way}",
                "dtype": dtype_name,
                "threads": torch.get_num_threads(),
                "microseconds": found,
            }
            rivals = [time for name, time in found.items() if name != OURS]
            if rivals:
                row["ratio"] = min(rivals) / found[OURS]
            rows.append(row)
    return rows


def plan(quick: bool, dtypes: list[str]) -> list[tuple[str, Shape, str, str]]:
    """All cases, what matters most first."""
    cells, layers = ([(3, 4, 5)], [(4, 3, 2, 5)]) if quick else (CELLS, LAYERS)
    cases = []
    for k in range(max(len(cells), len(layers))):
        for mode in ("inference", "training"):
            for dtype in dtypes:
                cases += [("layer", shape, dtype, mode) for shape in layers[k : k + 1]]
                cases += [("cell", shape, dtype, mode) for shape in cells[k : k + 1]]
                if k == 0:
                    cases.append(("packed layer", layers[0], dtype, mode))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="one small shape each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time to be done in")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each call")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cuda.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the script")
    begin = time.monotonic()
    protocol.environment()
    torch.manual_seed(0)
    cases = plan(options.quick, options.dtypes)
    rows: list[dict[str, Any]] = []
    for done, case in enumerate(tqdm(cases, desc="cases"), start=1):
        compiled = case[0] == "cell" and case[1] == CELLS[0]
        rows += bench_row(case, options.device, options.rounds, compiled)
        left = len(cases) - done
        protocol.save(
            options.out,
            rows,
            title="LSTM on a GPU" if options.device == "cuda" else "LSTM, a try on the CPU",
            rivals="nn.LSTMCell and its torch.compile, or nn.LSTM",
            cases_left_out=left,
        )
        if time.monotonic() - begin > options.seconds:
            break
    report.print_table(options.out)
    if left:
        print(f"\n{left} of {len(cases)} cases left out: {options.seconds:.0f} seconds were over")


if __name__ == "__main__":
    main()
