"""Projections (proj_size): lstm_ext.LSTM against torch.nn.LSTM, and ELMo's two clamps.

    python benchmarks/bench_projection.py [--shapes LxNxIxHxP ..] [--quick] [--threads 1 2]
                                          [--tables layers clips]

Two tables, of medians in microseconds, taken in turn; all ways of a table have the same weights.

- layers: torch's and ours, and torch's over ours: inference, a training step with the gradients of
  all weights, and both of a packed batch whose lengths fall from L to L / 4. Written to
  benchmarks/results/projection.json.
- clips: ours without clips; with both (cell_clip and projection_clip); and a loop of torch's
  operations with both, by hand. What both cost, and the loop over ours; the same modes but for the
  packed ones. Written to benchmarks/results/projection_clips.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import protocol
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

Shape = tuple[int, ...]
SHAPES = [
    (50, 16, 128, 128, 64),
    (50, 1, 128, 128, 64),
    (50, 64, 128, 128, 64),
    (10, 1, 64, 64, 32),
    (100, 8, 32, 32, 16),
    (100, 32, 64, 256, 128),
    (20, 4, 512, 1024, 256),
    (20, 64, 512, 1024, 512),
]
QUICK = SHAPES[:2]
CLIP_SHAPES = [SHAPES[0], SHAPES[1], SHAPES[6]]
# Limits that some numbers of every shape are beyond, not all: compare_clips looks.
CLIPS = {"cell_clip": 0.2, "projection_clip": 0.05}
TABLES = ["layers", "clips"]
MODES = ["inference", "training", "packed inference", "packed training"]


def parse_shape(text: str) -> Shape:
    """Read LxNxIxHxP."""
    L, N, I, H, P = map(int, text.split("x"))
    return L, N, I, H, P


def data(shape: Shape, packed: bool, dtype: torch.dtype) -> torch.Tensor | PackedSequence:
    """Return an input, packed or padded."""
    L, N, I, _, _ = shape
    x = torch.randn(L, N, I, dtype=dtype)
    if not packed:
        return x
    return pack_padded_sequence(x, torch.linspace(L, max(L / 4, 1), N).round().long())


def calls(
    shape: Shape, mode: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], dict[str, nn.LSTM]]:
    """Return a call of each, and the modules."""
    _, _, I, H, P = shape
    theirs = nn.LSTM(I, H, proj_size=P, dtype=dtype)
    ours = lstm_ext.LSTM(I, H, proj_size=P, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    modules: dict[str, nn.LSTM] = {"torch": theirs, "lstm_ext": ours}
    x = data(shape, mode.startswith("packed"), dtype)

    def output(module: nn.LSTM) -> Tensor:
        out = module(x)[0]
        return out.data if isinstance(out, PackedSequence) else out

    timed = {name: call_of(lambda m=m: output(m), m, mode) for name, m in modules.items()}
    return timed, modules


def call_of(forward: Callable[[], Tensor], module: nn.Module, mode: str) -> Callable[[], object]:
    """Return a call of a mode, of a forward that computes with a module's weights."""

    def train() -> None:
        out = forward()
        module.zero_grad(set_to_none=True)
        out.backward(torch.ones_like(out))

    def infer() -> Tensor:
        with torch.no_grad():
            return forward()

    return train if mode.endswith("training") else infer


def compare(modules: dict[str, nn.LSTM], shape: Shape, dtype: torch.dtype) -> None:
    """Raise an error unless both compute the same."""
    x = data(shape, False, dtype)
    with torch.no_grad():
        torch.testing.assert_close(modules["lstm_ext"](x), modules["torch"](x))


def measure(
    shape: Shape, mode: str, threads: int, rounds: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Time a row and print it."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    timed, modules = calls(shape, mode, dtype)
    if dtype in (torch.float32, torch.float64):
        compare(modules, shape, dtype)
    times = protocol.interleaved(timed, rounds)
    ratio = times["torch"] / times["lstm_ext"]
    name = "x".join(map(str, shape))
    print(
        f"{name:22} {mode:17} {threads:2}",
        *(f"{time:12.1f}" for time in times.values()),
        f"{ratio:7.2f}",
        flush=True,
    )
    return {"shape": name, "mode": mode, "threads": threads, "us": times, "ratio": ratio}


def clipped_by_hand(x: Tensor, module: nn.LSTM) -> Tensor:
    """Compute the output of a layer with both clips, as AllenNLP does for ELMo."""
    w = {name.removesuffix("_l0"): weight for name, weight in module.named_parameters()}
    gates_x = F.linear(x, w["weight_ih"], w["bias_ih"] + w["bias_hh"])
    h, c = x.new_zeros(x.shape[1], module.proj_size), x.new_zeros(x.shape[1], module.hidden_size)
    cell_clip, projection_clip = CLIPS.values()
    outputs = []
    for of_x in gates_x.unbind():
        i, f, g, o = torch.addmm(of_x, h, w["weight_hh"].T).chunk(4, 1)
        c = (f.sigmoid() * c + i.sigmoid() * g.tanh()).clamp(-cell_clip, cell_clip)
        h = F.linear(o.sigmoid() * c.tanh(), w["weight_hr"])
        h = h.clamp(-projection_clip, projection_clip)
        outputs.append(h)
    return torch.stack(outputs)


def clip_ways(shape: Shape, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Tensor]], nn.LSTM]:
    """Return the ways of the second table, and the module whose weights all have."""
    L, N, I, H, P = shape
    plain = lstm_ext.LSTM(I, H, proj_size=P, dtype=dtype)
    clipped = lstm_ext.LSTM(I, H, proj_size=P, dtype=dtype, **CLIPS)
    for name, weight in plain.named_parameters():
        setattr(clipped, name, weight)
    x = torch.randn(L, N, I, dtype=dtype)
    ways = {
        "no clip": lambda: plain(x)[0],
        "both clips": lambda: clipped(x)[0],
        "loop by hand": lambda: clipped_by_hand(x, plain),
    }
    return ways, plain


def compare_clips(ways: dict[str, Callable[[], Tensor]]) -> None:
    """Raise an error unless both with clips compute the same, and something was clipped."""
    with torch.no_grad():
        plain, ours, by_hand = (way() for way in ways.values())
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    if torch.allclose(ours, plain, rtol=1e-4, atol=1e-5):
        raise AssertionError("nothing was clipped")


def measure_clips(
    shape: Shape, mode: str, threads: int, rounds: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Time a row of the second table and print it."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    ways, module = clip_ways(shape, dtype)
    if dtype in (torch.float32, torch.float64):
        compare_clips(ways)
    timed = {name: call_of(way, module, mode) for name, way in ways.items()}
    times = protocol.interleaved(timed, rounds)
    pairs = [("both clips", "no clip"), ("loop by hand", "both clips")]
    ratios = {f"{a} / {b}": times[a] / times[b] for a, b in pairs}
    name = "x".join(map(str, shape))
    print(
        f"{name:22} {mode:17} {threads:2}",
        *(f"{label} {time:.1f};" for label, time in times.items()),
        *(f"{label} {ratio:.2f};" for label, ratio in ratios.items()),
        flush=True,
    )
    return {"shape": name, "mode": mode, "threads": threads, "us": times, "ratios": ratios}


def main() -> None:
    parser = protocol.options(__doc__, parse_shape, MODES, [], [], "projection.json")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 15)
    threads = options.threads or sorted({1, torch.get_num_threads()})
    dtype = getattr(torch, options.dtype)
    head = {"dtype": options.dtype, "rounds": rounds}
    if "layers" in options.tables:
        print(f"{'L x N x I x H x P':22} {'':17}   {'torch':>12} {'lstm_ext':>12}   ratio")
        rows = [
            measure(shape, mode, count, rounds, dtype)
            for count in threads
            for shape in options.shapes or (QUICK if options.quick else SHAPES)
            for mode in options.modes
        ]
        for mode in options.modes:
            ratios = [row["ratio"] for row in rows if row["mode"] == mode]
            print(f"{mode:17} {protocol.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
        protocol.save(options.out, rows, **head)
    if "clips" in options.tables:
        rows = [
            measure_clips(shape, mode, count, rounds, dtype)
            for count in threads
            for shape in options.shapes or (QUICK if options.quick else CLIP_SHAPES)
            for mode in options.modes
            if not mode.startswith("packed")
        ]
        out = options.out.with_name(f"{options.out.stem}_clips.json")
        protocol.save(out, rows, **head)


if __name__ == "__main__":
    main()
