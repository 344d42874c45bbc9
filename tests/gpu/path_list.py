"""The list of kernel paths: what is called, at which sizes, and which kernels should run.

Without torch, so that whoever plans needs no import that may fail.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ["float32", "tf32", "float64", "bfloat16", "float16"]
# Kinds of paths. The sizes below lead to them on a GPU with 132 multiprocessors.
FMA, TENSOR_CORES, LIBRARY = "FMA", "tensor cores", "library"
ONE, SPREAD, STEPS = "one block", "spread", "steps"
SMALL, CLUSTERS = "small", "clusters"  # forward; compute capability 9.0
WATCHDOG_SECONDS = 20.0


@dataclass(frozen=True)
class Case:
    """A path at one size, forward for inference and for training, and backward."""

    op: str  # cell, layer, or module
    way: str  # which kernels; of a module, which of its tests
    dtype: str
    N: int = 0
    I: int = 0
    H: int = 0
    L: int = 0
    # packed, reverse, reset, no bias; unset: with a reset mask that resets nothing, which the
    # kernels with w_hh in registers do not take; of a module: fused
    options: tuple[str, ...] = ()
    watchdog: float = WATCHDOG_SECONDS

    @property
    def name(self) -> str:
        """Name it in words, for tables and for --only."""
        if self.op == "module":
            return " ".join(["module", self.way, self.dtype, *self.options])
        size = f"N{self.N} H{self.H}"
        return " ".join([self.op, self.way, self.dtype, size, *self.options])

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the name."""
        return {**asdict(self), "name": self.name}


def _cells(dtype: str, sizes: list[int]) -> list[Case]:
    way = FMA if dtype in ("float32", "float64") else TENSOR_CORES
    cases = [Case("cell", way, dtype, 5, 24, H) for H in sizes]
    # Sizes that are no multiple of anything; one row; several tiles of rows.
    cases += [
        Case("cell", way, dtype, 3, 7, 33),
        Case("cell", way, dtype, 1, 24, 40, options=("no bias",)),
        Case("cell", way, dtype, 50, 64, 72),
    ]
    cases += [Case("cell", LIBRARY, dtype, 1100, 24, 40)]
    cases += [Case("cell", LIBRARY, dtype, 140, 64, H) for H in sizes if H == 256]
    return cases


VARIANTS: list[tuple[str, ...]] = [
    (),
    ("packed",),
    ("reverse",),
    ("reset",),
    ("packed", "reverse", "reset"),
]


# The most hidden units of a layer with w_hh in registers: in one block, and in a cluster.
MOST_SMALL = {"float32": 128, "tf32": 128, "bfloat16": 128, "float16": 128}
MOST_CLUSTERS = {"tf32": 512, "bfloat16": 768, "float16": 768}


def _shared(dtype: str, H: int, options: tuple[str, ...]) -> tuple[str, ...]:
    """Return options by which a layer keeps to the kernels with w_hh in shared memory."""
    in_registers = max(MOST_SMALL.get(dtype, 0), MOST_CLUSTERS.get(dtype, 0)) >= H
    needs = in_registers and not {"packed", "reset"} & set(options)
    return ("unset", *options) if needs else options


def _in_registers(dtype: str) -> list[Case]:
    kinds: list[tuple[str, ...]] = [(), ("reverse",), ("no bias",), ("reverse", "no bias")]

    def case(way: str, k: int, N: int, H: int, L: int = 6) -> Case:
        return Case("layer", way, dtype, N, 24, H, L, kinds[k % len(kinds)])

    cases = []
    if dtype in MOST_SMALL:
        sizes = [(N, H) for H in (33, 40, 64, 128) for N in (1, 3, 17, 64)]
        # More rows a block, and many steps.
        sizes += [(200, 64), (300, 128), (600, 128)]
        cases += [case(SMALL, k + k // 4, N, H) for k, (N, H) in enumerate(sizes)]
        cases += [case(SMALL, 0, 16, 64, 100)]
    if dtype in MOST_CLUSTERS:
        sizes = [(N, H) for H in (256, 512) for N in (1, 3, 17, 64)]
        sizes += [(3, 136), (5, 251), (140, 256)]  # the last in two turns
        if MOST_CLUSTERS[dtype] == 768:
            sizes += [(N, 768) for N in (1, 3, 17, 56)]
        cases += [case(CLUSTERS, k + k // 4, N, H) for k, (N, H) in enumerate(sizes)]
        cases += [case(CLUSTERS, 0, 16, 256, 100)]
    return cases


def _layers(dtype: str, H: int, way: str) -> list[Case]:
    cases = [
        Case("layer", way, dtype, 5, 24, H, 6, _shared(dtype, H, options)) for options in VARIANTS
    ]
    if way == ONE:
        cases += [Case("layer", way, dtype, N, 24, H, 6, ("packed",)) for N in (17, 40)]
        cases += [
            Case("layer", way, dtype, 1, 24, H, 6, _shared(dtype, H, ("no bias",))),
            Case("layer", way, dtype, 3, 7, 33, 5, ("packed", "reverse", "reset")),
        ]
    if way == SPREAD and H == 256:
        cases += [
            Case("layer", way, dtype, 1, 24, H, 6, _shared(dtype, H, ())),
            Case("layer", way, dtype, 16, 24, H, 40, _shared(dtype, H, ())),
            Case("layer", way, dtype, 40, 24, H, 6, ("packed", "reverse", "reset")),
            Case("layer", way, dtype, 3, 7, 251, 5, ("packed", "reset")),
            Case("layer", STEPS, dtype, 140, 24, H, 4, ("packed", "reset")),
        ]
    return cases


MODULES = [
    "LSTM trains",
    "LSTM, two layers both ways, packed",
    "LSTM, no bias, single sequence",
    "LSTM, checkpoint_every",
    "LSTM, dropout",
    "LSTM, projection",
    "LayerNormLSTM, projection",
    "LSTM, zoneout, packed",
    "LSTMCell trains",
    "convert and revert",
    "autocast",
]
ONCE = ["LSTM, CUDA graph", "LSTMCell, CUDA graph", "second derivatives"]


def groups(device: str) -> dict[str, list[Case]]:
    """All paths, by the process that goes through them; what takes longest first."""
    gpu = device == "cuda"
    sizes = [40, 256, 768, 2048] if gpu else [40]
    result: dict[str, list[Case]] = {
        "torch.compile": [Case("module", "LSTMCell, torch.compile", "float32", watchdog=60)]
    }
    for dtype in DTYPES:
        if dtype == "tf32" and not gpu:
            continue
        small = _cells(dtype, sizes) + _layers(dtype, 40, ONE)
        large = [c for H in sizes[1:3] for c in _layers(dtype, H, SPREAD)]
        large += [c for H in sizes[3:] for c in _layers(dtype, H, STEPS)]
        result[f"small, {dtype}"] = small
        if large:
            result[f"large, {dtype}"] = large
        in_registers = _in_registers(dtype) if gpu else []
        if in_registers:
            result[f"in registers, {dtype}"] = in_registers
    for dtype in ("float32", "bfloat16", "float16") if gpu else ("float32",):
        # torch's own LSTM cannot do it on every CPU.
        tests = [test for test in MODULES if gpu or test != "autocast"]
        # As a user finds them, and with LSTM_EXT_CUDA=fused: all by our kernels.
        for options in ((), ("fused",)) if gpu else ((),):
            result[f"modules, {dtype} {' '.join(options)}"] = [
                Case("module", test, dtype, options=options) for test in tests
            ]
    result["modules, once"] = [
        Case("module", test, "float32") for test in ONCE if gpu or "graph" not in test
    ]
    return result
