"""Goes through kernel paths one after another and reports each at once: run by paths.py.

    python path_worker.py --device cuda --out LINES.jsonl --cases CASES.json [--library LIBRARY]

Every path is computed in float64 by torch.lstm_cell step by step, by torch in the path's own dtype,
and by the operator. An error is the largest difference from float64, relative to the largest value;
ours may be twice torch's and a few roundings more. Whoever reports an error of CUDA ends here: what
comes after it says nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from path_list import CLUSTERS, FMA, LIBRARY, ONE, SMALL, SPREAD, STEPS, TENSOR_CORES
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

NAMES = ["output", "h", "c", "grad x", "grad h", "grad c",
         "grad w_ih", "grad w_hh", "grad b_ih", "grad b_hh"]  # fmt: skip
EPS = {"float32": 2.0**-23, "tf32": 2.0**-10, "float64": 2.0**-52, "bfloat16": 2.0**-7,
       "float16": 2.0**-10}  # fmt: skip
# At the largest value, beyond twice torch's error. In float64 what is called the truth has errors
# of its own, which torch's share where its kernels are the same.
ROUNDINGS = {"float32": 4, "tf32": 2, "float64": 64, "bfloat16": 2, "float16": 2}
LARGE = 768  # from here on float64 is computed on the GPU too, by torch's own kernels
WAYS = {
    FMA: ["cell_forward_kernel<FmaTile", "cell_backward"],
    TENSOR_CORES: ["cell_forward_kernel<MmaTile", "cell_backward"],
    LIBRARY: ["cell_finish", "cell_backward"],
    ONE: ["layer_forward_kernel", "layer_backward_kernel"],
    SPREAD: ["layer_forward_kernel", "layer_backward_kernel"],
    STEPS: ["cell_finish", "cell_backward"],
    SMALL: ["layer_small_", "layer_backward_small_"],
    CLUSTERS: ["layer_cluster_kernel", "layer_backward_cluster_kernel"],
}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a path; tf32 is float32, multiplied in another way."""
    dtype: torch.dtype = getattr(torch, {"tf32": "float32"}.get(name, name))
    return dtype


def in_steps(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], sizes: Sequence[int],
    reset: Tensor | None, reverse: bool,
) -> list[Tensor]:  # fmt: skip
    """Compute a layer by torch.lstm_cell: output (S, H), h and c."""
    steps = list(x.split(list(sizes)))
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        h_t, c_t = h[:n], c[:n]
        if reset is not None:
            zero = reset[t, :n].unsqueeze(1)
            h_t, c_t = h_t.masked_fill(zero, 0), c_t.masked_fill(zero, 0)
        h_t, c_t = torch.lstm_cell(steps[t], (h_t, c_t), *weights)
        steps[t] = h_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    return [torch.cat(steps), h, c]


class Numbers:
    """One case's numbers, and the ways to compute with them."""

    def __init__(self, case: dict[str, Any], device: str) -> None:
        self.case, self.device = case, device
        self.options = case["options"]
        N, I, H, L = (case[key] for key in "NIHL")
        self.dtype = torch_dtype(case["dtype"])
        torch.manual_seed(zlib.crc32(case["name"].encode()))
        self.sizes = [N] if case["op"] == "cell" else [N] * L
        if "packed" in self.options:
            lengths = torch.randint(1, L + 1, (N,)).sort(descending=True).values
            lengths[0] = L
            self.sizes = pack_padded_sequence(torch.zeros(L, N, 1), lengths).batch_sizes.tolist()
        self.reset = torch.rand(L, N) < 0.3 if "reset" in self.options else None
        if "unset" in self.options:
            self.reset = torch.zeros(L, N, dtype=torch.bool)
        self.reverse = "reverse" in self.options
        bound = 1 / math.sqrt(H)
        shapes = [(4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
        if "no bias" in self.options:
            shapes = shapes[:2]
        rows = sum(self.sizes)
        values = [torch.randn(size) for size in ((rows, I), (N, H), (N, H))]
        values += [torch.empty(shape).uniform_(-bound, bound) for shape in shapes]
        if self.dtype == torch.float64:  # more digits than float32 has
            values = [v.double() + torch.rand(v.shape, dtype=torch.float64) * 2e-8 for v in values]
        self.values = [v.to(self.dtype).to(device) for v in values]
        grads = [torch.randn(size) for size in ((rows, H), (N, H), (N, H))]
        self.grads = [g.to(self.dtype).to(device) for g in grads[: 2 if self.is_cell else 3]]

    @property
    def is_cell(self) -> bool:
        """Whether the path is one of the cell's."""
        return bool(self.case["op"] == "cell")

    def _with_gradients(self, call: Callable[..., Sequence[Tensor]], dtype: torch.dtype,
                        device: str) -> list[Tensor]:  # fmt: skip
        leaves = [v.to(device, dtype).detach().requires_grad_() for v in self.values]
        out = call(*leaves)
        grads = [g.to(device, dtype) for g in self.grads]
        return [t.detach() for t in (*out, *torch.autograd.grad(out, leaves, grads))]

    def _steps(self, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> list[Tensor]:
        if self.is_cell:
            return list(torch.lstm_cell(x, (h, c), *weights))
        reset = None if self.reset is None else self.reset.to(x.device)
        return in_steps(x, h, c, weights, self.sizes, reset, self.reverse)

    def _whole(self, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> list[Tensor]:
        """nn.LSTM's own, which is cuDNN on a GPU."""
        has_biases = len(weights) == 4
        states, options = (h.unsqueeze(0), c.unsqueeze(0)), (has_biases, 1, 0.0, True, False)
        if "packed" in self.options:
            sizes = torch.tensor(self.sizes)
            out = torch._VF.lstm(x, sizes, states, list(weights), *options)
        else:
            rows = x.view(len(self.sizes), -1, x.shape[1])
            out = torch._VF.lstm(rows, states, list(weights), *options, False)
        return [out[0].reshape(-1, h.shape[1]), out[1][0], out[2][0]]

    def ours(self, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> list[Tensor]:
        """The operator, past all modules and switches."""
        all_weights = [*weights, None, None][:4]
        if self.is_cell:
            return list(torch.ops.lstm_ext.lstm_cell(x, h, c, *all_weights))
        packed = "packed" in self.options
        sizes = torch.tensor(self.sizes) if packed else None
        reset = None if self.reset is None else self.reset.to(x.device)
        x = x if packed else x.view(len(self.sizes), -1, x.shape[1])
        out = torch.ops.lstm_ext.lstm_layer(x, h, c, *all_weights, sizes, reset, self.reverse)
        return [out[0].reshape(-1, h.shape[1]), *out[1:]]

    def truth(self) -> list[Tensor]:
        """Outputs and gradients in float64."""
        where = self.device if self.case["H"] >= LARGE else "cpu"
        return [t.to(self.device)
                for t in self._with_gradients(self._steps, torch.float64, where)]  # fmt: skip

    def run_torchs(self) -> list[list[Tensor]]:
        """Outputs and gradients of torch in the path's own dtype, in each of its ways."""
        found = [self._with_gradients(self._steps, self.dtype, self.device)]
        resets = self.reset is not None and bool(self.reset.any())
        if not self.is_cell and not resets and not self.reverse:
            found.append(self._with_gradients(self._whole, self.dtype, self.device))
        return found

    def run_ours(self) -> list[Tensor]:
        """Outputs and gradients of the operator."""
        return self._with_gradients(self.ours, self.dtype, self.device)

    def names(self) -> list[str]:
        """Name what the functions above return."""
        names = [n for n in NAMES if not (self.is_cell and n == "output")]
        return names[:-2] if "no bias" in self.options else names


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite where NaN is."""
    difference = (found.double() - exact).abs().max() if exact.numel() else exact.sum()
    error = float(difference) / max(float(exact.abs().max()), 1e-300)
    return error if math.isfinite(error) else math.inf


def judge(
    names: Sequence[str], ours: Sequence[Tensor], torchs: Sequence[Sequence[Tensor]],
    truth: Sequence[Tensor], dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Compare ours with the truth, and with the errors that torch's ways make."""
    errors = {}
    for k, name in enumerate(names):
        mine = relative_error(ours[k], truth[k])
        others = [relative_error(other[k], truth[k]) for other in torchs]
        theirs = max((error for error in others if math.isfinite(error)), default=0.0)
        errors[name] = [mine, theirs, 2 * theirs + ROUNDINGS[dtype] * EPS[dtype]]
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][2])
    mine, theirs, allowed = errors[worst]
    return {
        "status": "ok" if mine <= allowed else "wrong",
        "worst": worst,
        "error": mine,
        "torch": theirs,
        "allowed": allowed,
        "errors": {name: [float(f"{v:.3g}") for v in values] for name, values in errors.items()},
    }


def run_operator(case: dict[str, Any], device: str, tell: Callable[..., None]) -> None:
    """Compare one path of an operator, report it, and then which kernels ran."""
    path = Numbers(case, device)
    truth = path.truth()
    ours = path.run_ours()
    result = judge(path.names(), ours, path.run_torchs(), truth, case["dtype"])
    with torch.no_grad():
        inference = path.ours(*path.values)
    for name, found, exact in zip(path.names(), inference, truth, strict=False):
        # Another kernel, which keeps nothing for backward.
        error = relative_error(found, exact)
        if error > result["errors"][name][2]:
            result.update(status="wrong", worst=f"{name} without gradients", error=error)
    tell(**result)  # before the profiler, which may hang too
    again, seen = path.run_ours(), {}
    if not all(torch.equal(a, b) for a, b in zip(again, ours, strict=True)):
        seen = {"status": "wrong", "worst": "other bits at a second call"}
    if device == "cuda":
        try:
            kernels = kernels_of(path.run_ours)
            seen.update(kernels=kernels, other_way=other_way(case, kernels))
        except (OSError, ValueError, KeyError) as error:
            seen.update(other_way=f"the profiler fails: {type(error).__name__}: {error}")
    if seen and (result["status"] == "ok" or "status" not in seen):
        tell(**seen)


def kernels_of(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Return the kernels that a call runs: name, blocks, threads, shared memory, how often."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    counted: dict[tuple[Any, ...], int] = {}
    for event in events:
        if event.get("cat") == "kernel":
            a = event.get("args", {})
            key = (readable(event["name"]), tuple(a.get("grid", ())), tuple(a.get("block", ())),
                   a.get("shared memory"))  # fmt: skip
            counted[key] = counted.get(key, 0) + 1
    return [
        {"name": name, "grid": grid, "block": block, "shared": shared, "times": times}
        for (name, grid, block, shared), times in counted.items()
    ]


def readable(kernel: str) -> str:
    """Shorten a kernel's name."""
    hidden = r"\(anonymous namespace\)::|_GLOBAL__N__\w+::"
    name = re.sub(rf"{hidden}|lstm_ext::cuda::|void |\((int|bool)\)", "", kernel)
    return re.sub(r"\(.*", "", name)[:120]


def other_way(case: dict[str, Any], kernels: list[dict[str, Any]]) -> str:
    """Say what ran if it is not what the case is for; '' if it is."""
    names = [kernel["name"] for kernel in kernels]
    if not names:
        return "the profiler saw no kernel"
    for wanted in WAYS[case["way"]]:
        if not any(wanted in name for name in names):
            return f"no {wanted}"
    for kernel in kernels:
        if kernel["name"].startswith("layer_"):
            blocks = math.prod(kernel["grid"])
            if case["way"] == ONE and blocks > case["N"]:
                return f"{kernel['name']} with {blocks} blocks"
            if case["way"] == SPREAD and case["N"] <= 5 and blocks <= case["N"]:
                return f"{kernel['name']} with {blocks} blocks"
            if case["way"] == STEPS:
                return kernel["name"]
    return ""


def is_fatal(error: BaseException) -> bool:
    """Whether the process is of no more use to CUDA."""
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def main() -> int:
    """Go through the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True, help="a JSON list of cases")
    parser.add_argument("--library", help="operators, in place of the package's")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    stream = options.out.open("a", buffering=1)

    def say(**line: Any) -> None:
        stream.write(json.dumps(line) + "\n")

    say(event="started")
    torch.set_num_threads(options.threads)
    if options.library:
        torch.ops.load_library(options.library)
        run_module: Callable[..., None] | None = None
    else:
        from path_modules import run_module
    if options.device == "cuda":
        torch.zeros(1, device="cuda").sum().item()
    say(event="ready")
    for case in json.loads(options.cases.read_text()):
        name = case["name"]
        say(event="begin", path=name)
        begin = time.monotonic()

        def tell(name: str = name, **result: Any) -> None:
            say(event="result", path=name, **result)

        for flags in (torch.backends.cuda.matmul, torch.backends.cudnn):
            flags.allow_tf32 = case["dtype"] == "tf32"
        try:
            if case["op"] == "module":
                assert run_module is not None
                run_module(case, options.device, tell)
            else:
                run_operator(case, options.device, tell)
            if options.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            said = traceback.format_exc(limit=-4)
            print(f"{name}\n{said}", flush=True)
            lines = [line for line in str(error).splitlines() if line.strip()] or ["-"]
            # An error that quotes another says the most in its last line.
            ends = " .. ".join(dict.fromkeys(line.strip()[:150] for line in (lines[0], lines[-1])))
            tell(status="error", worst=f"{type(error).__name__}: {ends}")
            if is_fatal(error):
                return 3
        say(event="end", path=name, seconds=round(time.monotonic() - begin, 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
