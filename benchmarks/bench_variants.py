"""Relatives of torch's LSTM: what each costs beside the plain layer, and against loops by hand.

    python benchmarks/bench_variants.py [--shapes LxNxIxH ..] [--quick] [--threads 1] [--loops]

First table, "cost": every variant over the plain lstm_ext.LSTM of the same run. Second table,
"loops", with --loops: layer normalisation and zoneout in a loop of torch operations, eager, with
the step compiled by torch.compile, and with the whole loop compiled (which takes minutes), over
ours. Microseconds a call (medians, taken in turn): inference, and a training step with the
gradients of weights and input. Writes the rows to benchmarks/results/variants.json.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import protocol
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lstm_ext

Shape = tuple[int, ...]
SHAPES = [(50, 16, 128, 128), (50, 1, 128, 128), (100, 32, 256, 256), (20, 64, 512, 512)]
QUICK = [(5, 2, 16, 16)]
LOOP_SHAPES = SHAPES[:2]
WHOLE_LOOP = "layer norm, sum"  # whose whole loop is compiled, for a minute and more each time
MODES = ["inference", "training"]
# Of lstm_ext.LSTM, or of LayerNormLSTM where it says which.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm, apart": {"normalize": "apart"},
    "layer norm, sum": {"normalize": "sum", "carry_norm": True},
    "zoneout of h": {"zoneout_h": 0.1},
    "zoneout of h and c": {"zoneout_h": 0.1, "zoneout_c": 0.1},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "recurrent dropout, each gate": {
        "recurrent_dropout": 0.2,
        "recurrent_dropout_per_gate": True,
    },
    "recurrent dropout, each step": {
        "recurrent_dropout": 0.2,
        "recurrent_dropout_per_step": True,
    },
    "input dropout": {"input_dropout": 0.2},
    "weight dropout": {"weight_dropout": 0.5},
    "weight dropout, rows": {"weight_dropout": 0.5, "weight_dropout_rows": True},
    "coupled gates": {"coupled_gates": True},
    "cell clip": {"cell_clip": 3.0},
    "peephole": {"peephole": True},
}


def parse_shape(text: str) -> Shape:
    """Read LxNxIxH."""
    L, N, I, H = map(int, text.split("x"))
    return L, N, I, H


def build(name: str, I: int, H: int) -> nn.Module:
    """Return a module of a variant."""
    options = VARIANTS[name]
    kind = lstm_ext.LayerNormLSTM if "normalize" in options else lstm_ext.LSTM
    return kind(I, H, **options)


def call_of(run: Callable[[Tensor], Tensor], x: Tensor, mode: str) -> Callable[[], object]:
    """Return a call of a mode."""
    if mode == "inference":

        def infer() -> Tensor:
            with torch.no_grad():
                return run(x)

        return infer
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        ones = torch.ones_like(run(x))
    return lambda: run(leaf).backward(ones)


def step_of(form: str, w: dict[str, Tensor], training: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Return one step by hand: (x's product, h, c) -> h', c'."""
    H = w["weight_hh_l0"].shape[1]

    def step(gates_x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w["weight_hh_l0"])
        bias = w["bias_ih_l0"] + w["bias_hh_l0"]
        if form == "layer norm, sum":
            pre = F.layer_norm(gates_x + z, (4 * H,), w["norm_gates_l0"], bias)
        elif form == "layer norm, apart":
            pre = gates_x + F.layer_norm(z, (4 * H,), w["norm_hh_l0"], bias)
        else:
            pre = gates_x + z + bias
        i, f, g, o = pre.chunk(4, -1)
        c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
        shown = c_next
        if "norm" in form:
            shown = F.layer_norm(c_next, (H,), w["norm_c_l0"], w["bias_c_l0"])
        h_next = o.sigmoid() * shown.tanh()
        if form == "layer norm, sum":
            c_next = shown
        if "zoneout" in form:
            keep = 0.9 if not training else (torch.rand_like(h) < 0.9).to(h.dtype)
            h_next = keep * h_next + (1 - keep) * h
            keep = 0.9 if not training else (torch.rand_like(c) < 0.9).to(c.dtype)
            c_next = keep * c_next + (1 - keep) * c
        return h_next, c_next

    return step


def loop_of(
    module: nn.Module, form: str, compiled: str, training: bool
) -> Callable[[Tensor], Tensor]:
    """Return a module's computation as a loop: compiled "", "step" or "loop"."""
    w = dict(module.named_parameters())
    step = step_of(form, w, training)
    if compiled == "step":
        step = torch.compile(step)

    def loop(x: Tensor) -> Tensor:
        gates = F.linear(x, w["weight_ih_l0"])
        if form == "layer norm, apart":
            gates = F.layer_norm(gates, gates.shape[-1:], w["norm_ih_l0"])
        h = c = x.new_zeros(x.shape[1], w["weight_hh_l0"].shape[1])
        outputs = []
        for gates_x in gates.unbind():
            h, c = step(gates_x, h, c)
            outputs.append(h)
        return torch.stack(outputs)

    return torch.compile(loop) if compiled == "loop" else loop


def measure_cost(shape: Shape, mode: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time every variant beside the plain layer."""
    L, N, I, H = shape
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    x = torch.randn(L, N, I)
    modules = {name: build(name, I, H).train(mode == "training") for name in VARIANTS}
    runs = {name: (lambda x, m=m: m(x)[0]) for name, m in modules.items()}
    times = protocol.interleaved({n: call_of(run, x, mode) for n, run in runs.items()}, rounds)
    rows = []
    for name, time in times.items():
        ratio = time / times["plain"]
        text = "x".join(map(str, shape))
        print(f"cost  {text:14} {mode:9} {threads} {name:29} {time:10.1f} {ratio:6.2f}", flush=True)
        rows.append(
            {
                "table": "cost",
                "shape": text,
                "mode": mode,
                "threads": threads,
                "variant": name,
                "us": time,
                "over_plain": ratio,
            }
        )
    return rows


def compare(
    runs: dict[str, Callable[[Tensor], Tensor]], exact: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Raise an error unless all ways are about as near to float64 as the eager loop is."""
    with torch.no_grad():
        truth = exact(x.double())
        errors = {name: (run(x).double() - truth).abs().max() for name, run in runs.items()}
    bound = 4 * float(errors["eager loop"]) + 1e-6
    wrong = {name: float(error) for name, error in errors.items() if not error <= bound}
    if wrong:
        raise AssertionError(f"errors beyond {bound:.1e}, four times the eager loop's: {wrong}")


def measure_loops(shape: Shape, mode: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time loops by hand over ours."""
    L, N, I, H = shape
    torch.set_num_threads(threads)
    rows = []
    for form in ("layer norm, sum", "layer norm, apart", "zoneout of h and c"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        training, x = mode == "training", torch.randn(L, N, I)
        module = build(form, I, H).train(training)
        runs: dict[str, Callable[[Tensor], Tensor]] = {"lstm_ext": lambda x, m=module: m(x)[0]}
        for compiled in ("", "step", "loop") if form == WHOLE_LOOP else ("", "step"):
            name = f"compiled {compiled}" if compiled else "eager loop"
            runs[name] = loop_of(module, form, compiled, training)
        if "norm" in form or not training:
            compare(runs, loop_of(copy.deepcopy(module).double(), form, "", training), x)
        times = protocol.interleaved({n: call_of(run, x, mode) for n, run in runs.items()}, rounds)
        text = "x".join(map(str, shape))
        ratios = {name: time / times["lstm_ext"] for name, time in times.items()}
        print(
            f"loops {text:14} {mode:9} {threads} {form:20}",
            *(f"{name} {times[name]:.1f} ({ratio:.2f});" for name, ratio in ratios.items()),
            flush=True,
        )
        rows.append(
            {
                "table": "loops",
                "shape": text,
                "mode": mode,
                "threads": threads,
                "variant": form,
                "us": times,
                "over_ours": ratios,
            }
        )
    return rows


def main() -> None:
    parser = protocol.options(__doc__, parse_shape, MODES, [], [], "variants.json")
    parser.add_argument("--loops", action="store_true", help="the second table too")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 9)
    threads = options.threads or [1]
    rows = [
        row
        for count in threads
        for shape in options.shapes or (QUICK if options.quick else SHAPES)
        for mode in options.modes
        for row in measure_cost(shape, mode, count, rounds)
    ]
    if options.loops:
        for count in threads:
            for shape in options.shapes or (QUICK if options.quick else LOOP_SHAPES):
                for mode in options.modes:
                    rows += measure_loops(shape, mode, count, rounds)
    protocol.save(options.out, rows, dtype=options.dtype)


if __name__ == "__main__":
    main()
