"""Two builds of lstm_ext side by side: whether a change altered any number.

    python benchmarks/same_bits.py PATH            this checkout against a built one at PATH
    python benchmarks/same_bits.py PATH --cases 20000 --seed 1

Each build runs in a process of its own, with the same drawn calls: cell and layer, every dtype,
option and way in (module, functional form, frozen, trace), forward, first and second derivatives.
Every result is compared bit for bit, and every error by its words.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def worker(seed: int, cases: int) -> None:
    """Print a line for each case: what was called, and what came out."""
    import torch

    import lstm_ext

    print(lstm_ext.__file__)
    draw = random.Random(seed)
    for number in range(cases):
        torch.manual_seed(number)
        torch.set_num_threads(draw.choice([1, 1, 2, 3]))
        case = drawn(draw)
        digest = hashlib.sha256()
        try:
            for tensor in called(case):
                if tensor is not None:
                    digest.update(repr((tensor.shape, tensor.dtype)).encode())
                    digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
            result = digest.hexdigest()[:16]
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            result = repr(error)
        print(number, {**case, "dtype": str(case["dtype"])}, result, flush=True)


def drawn(draw: random.Random) -> dict[str, Any]:
    """Draw a case."""
    import torch

    small = draw.random() < 0.7
    return {
        "way": draw.choice(["cell", "layer", "layer", "functional", "frozen", "trace"]),
        "L": draw.randint(0, 9),
        "N": draw.randint(0, 7) if small else draw.choice([1, 9, 33, 60]),
        "I": draw.randint(0, 12) if small else draw.randint(1, 150),
        "H": draw.randint(0, 12) if small else draw.randint(1, 150),
        "dtype": draw.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        "bias": draw.random() < 0.7,
        "layers": draw.randint(1, 2),
        "bidirectional": draw.random() < 0.4,
        "batch_first": draw.random() < 0.3,
        "packed": draw.random() < 0.4,
        "reset": draw.random() < 0.3,
        "states": draw.random() < 0.7,
        "derivatives": draw.choice([0, 1, 1, 1, 2]),
    }


def called(case: dict[str, Any]) -> list[Any]:
    """Return all tensors that come of a case."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence
    from torch.utils._pytree import tree_leaves

    import lstm_ext

    L, N, I, H, dtype = (case[key] for key in ("L", "N", "I", "H", "dtype"))
    way, D = case["way"], 2 if case["bidirectional"] else 1
    options = {"bias": case["bias"], "dtype": dtype}
    if way == "cell":
        module: Any = lstm_ext.LSTMCell(I, H, **options)
        shape, state = (N, I), (N, H)
    else:
        options |= {key: case[key] for key in ("bidirectional", "batch_first")}
        module = lstm_ext.LSTM(I, H, case["layers"], **options)
        shape, state = (*((N, L) if case["batch_first"] else (L, N)), I), (case["layers"] * D, N, H)
    x = torch.randn(shape).to(dtype).requires_grad_()
    hx = tuple(torch.randn(state).to(dtype).requires_grad_() for _ in range(2))
    value: Any = x
    if case["packed"] and way != "cell" and L and N:
        lengths = torch.randint(1, L + 1, (N,))
        value = pack_padded_sequence(
            x, lengths, batch_first=case["batch_first"], enforce_sorted=False
        )
    arguments = (value, hx) if case["states"] else (value,)
    named = {}
    if case["reset"] and way in ("layer", "trace"):
        padded = torch.rand(shape[:2]) < 0.3
        named["reset"] = padded if value is x else torch.rand(L, N) < 0.3
    if way == "frozen":
        module = lstm_ext.freeze(module.eval())
        with torch.no_grad():
            return list(tree_leaves(module(*arguments)))
    if way == "trace":
        trace = lstm_ext.trace_gates(module, *arguments, **named)
        return [trace.i, trace.f, trace.g, trace.o, trace.c, trace.h]
    if way == "functional" and value is x and not case["batch_first"]:
        flat = module._flat_weights
        each = 4 if case["bias"] else 2
        weights = [
            lstm_ext.LayerWeights(*flat[k : k + each], *[None] * (4 - each))
            for k in range(0, len(flat), each)
        ]
        out: Any = lstm_ext.lstm(x, hx, weights, bidirectional=case["bidirectional"])
    else:
        out = module(*arguments, **named)
    results = [t for t in tree_leaves(out) if t.requires_grad or t.is_floating_point()]
    if not case["derivatives"]:
        return results
    leaves = [x, *hx, *module.parameters()]
    second = case["derivatives"] == 2
    loss = sum(r.double().square().sum() for r in results)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, create_graph=second)
    results += grads
    if second:
        loss = sum(g.double().square().sum() for g in grads if g is not None)
        results += torch.autograd.grad(loss, leaves, allow_unused=True)
    return results


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path, nargs="?", help="a checkout with a build")
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.seed, arguments.cases)
    if arguments.path is None:
        parser.error("the path of a built checkout is needed")
    command = [sys.executable, __file__, "--worker"]
    command += ["--cases", str(arguments.cases), "--seed", str(arguments.seed)]
    checkouts = [path.resolve() for path in (ROOT, arguments.path)]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(path)}, stdout=subprocess.PIPE, text=True
        )
        for path in checkouts
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    for path, lines, process in zip(checkouts, outputs, processes, strict=True):
        if process.returncode or Path(lines[0]).parent != path / "lstm_ext":
            raise SystemExit(f"the build at {path} did not run: {lines[:1]}")
    new, old = (lines[1:] for lines in outputs)
    different = [pair for pair in zip(new, old, strict=True) if pair[0] != pair[1]]
    for a, b in different[:20]:
        print(f"new: {a}\nold: {b}\n")
    errors = sum("Error(" in line for line in new)
    print(f"{len(new)} cases, {errors} of them errors: {len(different)} differ")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
