"""Mixed calls for a long time: right ones, compared with torch.nn, and hostile ones (hostile.py).

    python tests/soak.py                     800,000 rounds: about an hour on two cores
    python tests/soak.py --rounds 500        a try

Stops by itself after so many rounds. A round is one of: a cell or a layer in inference or training,
padded or packed, against torch's own module; the same module from four threads; a gate trace;
freezing; converting a model there and back; a copy by way of a file; and a hostile call. Prints,
and with --out writes, what was called, at how many different sizes, what failed, and what became
of memory, threads and open files. Exit status 1 after any failure.
"""

import argparse
import collections
import copy
import gc
import io
import json
import os
import random
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import torch
from measure import DTYPES
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tqdm import tqdm

import lstm_ext

PROC = Path("/proc/self")


def flat(result):
    """All tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in flat(part)]


def compare(ours, theirs, dtype):
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 6e-2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Soak:
    """The rounds, and what they came to."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.seed = seed
        self.counts = collections.Counter()
        self.shapes = set()
        self.ends = collections.Counter()
        self.failures = []
        self.pool = ThreadPoolExecutor(4)

    def modules(self, kind):
        """Draw sizes; return torch's module, ours with the same weights, and an input."""
        draw = self.draw
        N, L = draw.choice([1, 2, 3, 8, 17, 33]), draw.choice([1, 2, 5, 13])
        I, H = draw.choice([1, 3, 8, 31, 64]), draw.choice([1, 2, 7, 16, 48, 65])
        dtype = draw.choice(DTYPES)
        self.shapes.add((kind, L if kind == "layer" else 1, N, I, H, str(dtype)))
        if kind == "cell":
            theirs, ours = nn.LSTMCell(I, H, dtype=dtype), lstm_ext.LSTMCell(I, H, dtype=dtype)
            x = torch.randn(N, I).to(dtype)
        else:
            options = {"num_layers": draw.choice([1, 2]), "bidirectional": draw.random() < 0.4}
            theirs = nn.LSTM(I, H, dtype=dtype, **options)
            ours = lstm_ext.LSTM(I, H, dtype=dtype, **options)
            x = torch.randn(L, N, I).to(dtype)
            if draw.random() < 0.4:
                lengths = torch.tensor([draw.randint(1, L) for _ in range(N)])
                x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours, x, dtype

    def inference(self, kind):
        theirs, ours, x, dtype = self.modules(kind)
        with torch.no_grad():
            compare(flat(ours(x)), flat(theirs(x)), dtype)

    def training(self, kind):
        theirs, ours, x, dtype = self.modules(kind)
        for _ in range(2):  # the second time .grad exists
            for module in (theirs, ours):
                sum(t.float().sum() for t in flat(module(x))).backward()
        found = [[p.grad for p in m.parameters()] for m in (ours, theirs)]
        scale = max(float(g.abs().max()) for g in found[1])
        compare([g / max(1, scale) for g in found[0]], [g / max(1, scale) for g in found[1]], dtype)

    def threads(self, kind):
        _, ours, x, _ = self.modules(kind)
        with torch.no_grad():
            wanted = flat(ours(x))

        def call(_):
            with torch.no_grad():
                return flat(ours(x))

        for found in self.pool.map(call, range(8)):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def trace(self, kind):
        theirs, _, x, dtype = self.modules(kind)
        trace = lstm_ext.trace_gates(theirs, x)
        if isinstance(x, torch.Tensor) and dtype == torch.float32:
            K = 2 if kind == "layer" and theirs.bidirectional else 1
            output = theirs(x)[0]
            last = torch.cat(tuple(trace.h[-K:]), -1)
            compare([last if kind == "layer" else last[0]], [output], dtype)

    def freezing(self, kind):
        _, ours, x, dtype = self.modules(kind)
        ours.eval()
        with torch.no_grad():
            wanted = flat(ours(x))
            frozen = lstm_ext.freeze(ours)
            compare(flat(frozen(x)), wanted, dtype)
        assert lstm_ext.unfreeze(frozen) is ours

    def converting(self, kind):
        theirs, _, x, dtype = self.modules(kind)
        model = nn.ModuleList([copy.deepcopy(theirs)])
        lstm_ext.convert(model)
        with torch.no_grad():
            compare(flat(model[0](x)), flat(theirs(x)), dtype)
        assert type(lstm_ext.revert(model)[0]) is type(theirs)

    def saving(self, kind):
        _, ours, x, _ = self.modules(kind)
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        again = copy.deepcopy(ours)
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
            again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            assert all(
                torch.equal(a, b) for a, b in zip(flat(again(x)), flat(ours(x)), strict=True)
            )

    def hostile(self, number):
        name, end, what = hostile.one(number)
        self.ends[end] += 1
        assert not end.startswith("wrong"), f"{name}: {end}: {what}"

    def round(self, number):
        """Do one thing; note it, and whether it failed."""
        kind = self.draw.choice(["cell", "layer"])
        what = self.draw.choices(
            ["inference", "training", "threads", "trace", "freezing", "converting", "saving",
             "hostile"], [6, 6, 1, 2, 1, 1, 1, 6],
        )[0]  # fmt: skip
        self.counts[what if what == "hostile" else f"{what}, {kind}"] += 1
        torch.manual_seed(number)
        try:
            self.hostile(self.seed + number) if what == "hostile" else getattr(self, what)(kind)
        except Exception as error:
            self.failures.append(f"round {number}: {what}, {kind}: {str(error)[:300]}")


def state_of_the_process():
    if not PROC.exists():
        return {}
    gc.collect()
    pages = int((PROC / "statm").read_text().split()[1])
    return {
        "resident MiB": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "open files": len(os.listdir(PROC / "fd")),
        "threads": len(os.listdir(PROC / "task")),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=800_000)
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    soak = Soak(options.seed)
    begin, warm, states = time.monotonic(), max(1, options.rounds // 10), []
    for number in tqdm(range(options.rounds), desc="rounds", mininterval=5):
        if number % warm == 0:
            states.append({"round": number, **state_of_the_process()})
        soak.round(number)
    states.append({"round": options.rounds, **state_of_the_process()})
    report = {
        "rounds": options.rounds,
        "seed": options.seed,
        "seconds": round(time.monotonic() - begin),
        "torch": torch.__version__,
        "calls": dict(sorted(soak.counts.items())),
        "different sizes": len(soak.shapes),
        "ends of hostile calls": dict(soak.ends),
        "failures": soak.failures,
        "process": states,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
