"""The recurrence's operators on CPU tensors, their CUDA kernels emulated, against the reference.

    python check_recurrence_ops.py LIBRARY [cpu | cuda] [cases]

As check_ops.py: built and run by tests/test_cuda_emu.py, and on a GPU by tests/test_gpu.py. With
little shared memory (LSTM_EXT_EMU_SHARED), rows that are normalised go by tensor operations.
"""

import importlib.util
import random
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence

# By itself: the package has operators of its own.
SPEC = importlib.util.spec_from_file_location(
    "reference", Path(__file__).parents[2] / "lstm_ext" / "reference.py"
)
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)

torch.ops.load_library(sys.argv[1])
device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
count = int(sys.argv[3]) if len(sys.argv) > 3 else 40
run = torch.ops.lstm_ext.lstm_recurrence
torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"

NAMES = ("gates_x", "hx", "cx", "w_hh", "bias", "norm", "norm_c", "bias_c", "w_hr")
MASKS = ("update_h", "update_c", "dropout_h")
# L, N, H, P where projected. Threads of a block: 32 to 512 of a row that is normalised, of others
# to 256.
SIZES = [(5, 4, 6, 3), (4, 1, 5, 9), (3, 3, 33, 2), (1, 1, 1, 1), (3, 2, 40, 7), (2, 2, 300, 4),
         (2, 1, 600, 3)]  # fmt: skip
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
checks = 0


def uniform(*shape):
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def draw(seed, dtype):
    """A call with each option present in every second case or so: tensors, masks, the rest."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    L, N, H, P = SIZES[seed % len(SIZES)]
    there = {name: chance.random() < 0.5 for name in NAMES}
    P = P if there["w_hr"] else H
    sizes = None
    if chance.random() < 0.5:
        lengths = torch.randint(1, L + 1, (N,)).sort(descending=True).values
        lengths[0] = L
        sizes = pack_padded_sequence(torch.zeros(L, N, 1), lengths).batch_sizes
    lead = (L, N) if sizes is None else (int(sizes.sum()),)
    scale = H**-0.5
    tensors = [
        uniform(*lead, 4 * H), uniform(N, P), uniform(N, H), uniform(4 * H, P) * scale,
        uniform(4 * H), uniform(4 * H), uniform(H), uniform(H), uniform(P, H) * scale,
    ]  # fmt: skip
    there["bias_c"] = there["bias_c"] and there["norm_c"]
    tensors = [t if k < 4 or there[name] else None
               for k, (name, t) in enumerate(zip(NAMES, tensors, strict=True))]  # fmt: skip
    masks = []
    for columns in (P, H, P):  # 0 and 1, or a mean; 1 / 0.8
        rows = chance.choice([None, None, lead, (N,), ()])
        masks.append(None if rows is None else (torch.rand(*rows, columns) < 0.8).double() / 0.8)
        if rows == ():
            masks[-1] = uniform(columns).abs()
    reset = torch.rand(L, N) < 0.3 if chance.random() < 0.4 else None
    rest = {
        "batch_sizes": sizes, "reset": None if reset is None else reset.to(device),
        "reverse": chance.random() < 0.5, "norm_joint": chance.random() < 0.5,
        "carry_norm": chance.random() < 0.5, "eps": chance.choice([1e-2, 1e-3]),
        "cell_clip": chance.choice([0.0, 0.5]),
        "projection_clip": chance.choice([0.0, 0.3]) if there["w_hr"] else 0.0,
    }  # fmt: skip
    as_stored = [None if t is None else t.to(dtype).to(device) for t in (*tensors, *masks)]
    return as_stored[: len(NAMES)], as_stored[len(NAMES) :], rest, chance


def close(name, found, expected, case, dtype):
    global checks
    checks += 1
    assert found.dtype == dtype
    expected = expected.detach()
    error = float((found.detach() - expected).abs().max() / (1 + expected.abs().max()))
    assert error <= TOLERANCE[dtype], f"{name} off by {error}: {case}"


def check(seed, dtype):
    tensors, masks, rest, chance = draw(seed, dtype)
    case = seed, dtype, [name for name, t in zip((*NAMES, *MASKS), (*tensors, *masks), strict=True)
                         if t is not None], rest  # fmt: skip
    wanted = [t is not None and (seed % 3 > 0 or chance.random() < 0.5) for t in tensors]
    wanted[0] = True
    leaves = [t if t is None else t.clone().requires_grad_(w)
              for t, w in zip(tensors, wanted, strict=True)]  # fmt: skip
    exact = [t if t is None else t.detach().double().requires_grad_(w)
             for t, w in zip(leaves, wanted, strict=True)]  # fmt: skip
    x, h, c, w_hh, *others = exact
    of_masks = [t if t is None else t.double() for t in masks]
    named = dict(zip((*NAMES[4:], *MASKS), (*others, *of_masks), strict=True))
    output, states = reference.recurrence(x, (h, c), w_hh, **named, **rest)
    truth = (output, *states)
    found = run(*leaves, *masks, *rest.values())
    with torch.no_grad():
        again = run(*leaves, *masks, *rest.values())
    for name, a, b, inference in zip(("output", "h", "c"), found, truth, again, strict=True):
        close(name, a, b, case, dtype)
        close(name, inference, b, case, dtype)
    # A rounding decides on which side of a clip a value of 16 bits lies.
    if dtype.itemsize == 2 and (rest["cell_clip"] or rest["projection_clip"]):
        return
    used = [k for k in range(3) if seed % 2 == 0 or chance.random() < 0.5] or [1]
    grads = [torch.randn_like(truth[k]).to(dtype) for k in used]
    names = [name for name, w in zip(NAMES, wanted, strict=True) if w]
    expected = torch.autograd.grad(
        [truth[k] for k in used], [t for t, w in zip(exact, wanted, strict=True) if w],
        [g.double() for g in grads], allow_unused=True, materialize_grads=True, retain_graph=True,
    )  # fmt: skip
    again = None
    for _ in range(1 + (seed % 4 == 0)):
        of_leaves = torch.autograd.grad(
            [found[k] for k in used], [t for t, w in zip(leaves, wanted, strict=True) if w], grads,
            retain_graph=True,
        )  # fmt: skip
        for k, (name, a, b) in enumerate(zip(names, of_leaves, expected, strict=True)):
            close(f"gradient of {name}", a, b, case, dtype)
            assert again is None or torch.equal(a, again[k]), case
        again = of_leaves


for dtype in TOLERANCE:
    for seed in range(count if dtype == torch.float64 else count // 2):
        check(seed + 1000 * dtype.itemsize, dtype)
print(f"{checks} comparisons agree")
