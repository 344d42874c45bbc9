"""The CUDA operators on CPU tensors, their kernels emulated, against torch's modules.

    python check_ops.py LIBRARY            (built and run by tests/test_cuda_emu.py)
    python check_ops.py LIBRARY cuda       the package's own library, on a GPU (make gpu-check)

The environment variable LSTM_EXT_EMU_SHARED narrows the shared memory of the emulated GPU, so that
layers go by the launch that spreads units over blocks, or step by step;
LSTM_EXT_EMU_MULTIPROCESSORS makes it refuse launches of more blocks that wait for each other.
"""

import itertools
import os
import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

torch.ops.load_library(sys.argv[1])
torch.set_default_device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
ops = torch.ops.lstm_ext
torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"
PEEPHOLE = 1  # csrc/core/cells.h
checks = 0


def close(found, expected, dtype):
    global checks
    checks += 1
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 3e-2)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def compare(ours, theirs, leaves, wanted, dtype):
    """Outputs, and gradients of a drawn combination of them."""
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, dtype)
    grads = [torch.randn_like(b) for b in theirs]
    # A state that is reset at the first step, in all rows, has no part in anything.
    expected = torch.autograd.grad(theirs, wanted, grads, materialize_grads=True)
    found = torch.autograd.grad(
        ours, leaves, [g.to(a.dtype) for g, a in zip(grads, ours, strict=True)]
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, dtype)


def cell(N, I, H, dtype, bias):
    module = nn.LSTMCell(I, H, bias=bias, dtype=torch.float64).to(dtype).to(torch.float64)
    tensors = [torch.randn(N, size).to(dtype) for size in (I, H, H)]
    exact = [t.double().requires_grad_() for t in tensors]
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*tensors, *module.parameters())]
    weights = leaves[3:] if bias else [*leaves[3:], None, None]
    theirs = module(exact[0], (exact[1], exact[2]))
    compare(ops.lstm_cell(*leaves[:3], *weights), theirs, leaves, [*exact, *module.parameters()],
            dtype)  # fmt: skip
    with torch.no_grad():
        close(ops.lstm_cell(*leaves[:3], *weights)[0], theirs[0], dtype)


def peephole_cell(x, h, c, w_ih, w_hh, b_ih, b_hh, p):
    """The formula of ONNX's LSTM, whose peepholes are p: of i, f and o."""
    i, f, g, o = (x @ w_ih.T + h @ w_hh.T + b_ih + b_hh).chunk(4, 1)
    i, f = torch.sigmoid(i + p[0] * c), torch.sigmoid(f + p[1] * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + p[2] * c) * torch.tanh(c), c


def peepholes(N, I, H, dtype):
    """The cell, and in float16, which has no kernel of it, in tensor operations."""
    shapes = ((N, I), (N, H), (N, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,), (3, H))
    exact = [(torch.randn(s) * 0.5).to(dtype).double().requires_grad_() for s in shapes]
    leaves = [t.detach().to(dtype).requires_grad_() for t in exact]
    compare(ops.lstm_cell(*leaves, PEEPHOLE), peephole_cell(*exact), leaves, exact, dtype)


def by_cell(module, x, h, c, sizes, reset, reverse, p=None, to=None):
    """A layer step by step in float64, with resets to zero or to (h, c); and every c."""
    weights = list(module.parameters())
    step = torch.lstm_cell
    if p is not None:
        weights.append(p)

        def step(x, hx, *weights):
            return peephole_cell(x, *hx, *weights)

    steps, cells = list(x.split(sizes)), list(x.split(sizes))
    zero = torch.zeros_like(h), torch.zeros_like(c)
    h, c = list(h.split(1)), list(c.split(1))
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        for n in range(sizes[t]):
            before = [s[n : n + 1] for s in to or zero] if reset[t, n] else [h[n], c[n]]
            h[n], c[n] = step(steps[t][n : n + 1], before, *weights)
        steps[t], cells[t] = torch.cat(h[: sizes[t]]), torch.cat(c[: sizes[t]])
    return torch.cat(steps), torch.cat(h), torch.cat(c), torch.cat(cells)


def layer(L, N, I, H, dtype, packed, reverse, with_reset, peephole=False):
    module = nn.LSTMCell(I, H, dtype=torch.float64).to(dtype).to(torch.float64)
    lengths = torch.randint(1, L + 1, (N,), device="cpu").sort(descending=True).values
    lengths[0] = L
    if not packed:
        lengths[:] = L
    sizes = pack_padded_sequence(torch.zeros(L, N, 1), lengths).batch_sizes
    reset = torch.rand(L, N) < (0.3 if with_reset else -1)
    tensors = [torch.randn(int(sizes.sum()), I), torch.randn(N, H), torch.randn(N, H)]
    exact = [t.to(dtype).double().requires_grad_() for t in tensors]
    own = [(torch.randn(3, H) * 0.5).to(dtype).double().requires_grad_()] if peephole else []
    wanted = [*exact, *module.parameters(), *own]
    leaves = [t.detach().to(dtype).requires_grad_() for t in wanted]
    *theirs, _ = by_cell(module, *exact, sizes.tolist(), reset, reverse, *own)
    x = leaves[0] if packed else leaves[0].view(L, N, I)
    rest = [sizes if packed else None, reset if with_reset else None, reverse]
    if peephole:
        rest += [leaves[-1], PEEPHOLE]
    ours = ops.lstm_layer(x, *leaves[1:7], *rest)
    compare((ours[0].reshape(-1, H), *ours[1:]), theirs, leaves, wanted, dtype)
    with torch.no_grad():
        for a, b in zip(ops.lstm_layer(x, *leaves[1:7], *rest), ours, strict=True):
            assert torch.equal(a, b)


def states(L, N, I, H, dtype, packed, reverse):
    """A layer that is reset to states, and its c of every step."""
    module = nn.LSTMCell(I, H, dtype=torch.float64).to(dtype).to(torch.float64)
    sizes = [N] * (L - 1) + [1 if packed else N]
    reset = torch.rand(L, N) < 0.4
    shapes = ((sum(sizes), I), *[(N, H)] * 4)
    exact = [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]
    wanted = [*exact, *module.parameters()]
    theirs = by_cell(module, *exact[:3], sizes, reset, reverse, to=exact[3:])
    leaves = [t.detach().to(dtype).requires_grad_() for t in wanted]
    x = leaves[0] if packed else leaves[0].view(L, N, I)
    rest = [torch.tensor(sizes, device="cpu") if packed else None, reset, reverse, None, 0]
    ours = ops.lstm_layer_states(x, *leaves[1:3], *leaves[5:], *rest, *leaves[3:5])
    rows = [t.reshape(-1, H) for t in ours]
    compare(rows, theirs, leaves, wanted, dtype)
    with torch.no_grad():
        again = ops.lstm_layer_states(x, *leaves[1:3], *leaves[5:], *rest, *leaves[3:5])
    for a, b in zip(again, ours, strict=True):
        assert torch.equal(a, b)


def rounding():
    """TF32 in a layer as cuDNN's switch says, in a cell as cuBLAS's, the older switches' too."""
    module = nn.LSTMCell(24, 24)
    x, h, c = (torch.randn(3, 24) for _ in range(3))
    weights = [p.detach() for p in module.parameters()]

    def run_cell():
        return ops.lstm_cell(x, h, c, *weights)[0]

    def run_layer():
        # With a mask: without one, kernels that never round take so small a layer.
        reset = torch.zeros(1, 3, dtype=torch.bool)
        return ops.lstm_layer(x[None], h, c, *weights, None, reset, False)[0]

    matmul, rnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    for run, switch, other in ((run_cell, matmul, rnn), (run_layer, rnn, matmul)):
        exact = run()
        other.fp32_precision = "tf32"
        assert torch.equal(run(), exact)
        other.fp32_precision, switch.fp32_precision = "ieee", "tf32"
        error = float((run() - exact).abs().max())
        assert 1e-6 < error < 1e-2, error
        switch.fp32_precision = "ieee"
        torch.backends.fp32_precision = "ieee"
        assert torch.equal(run(), exact)
        torch.backends.fp32_precision = "none"


torch.manual_seed(0)
if "LSTM_EXT_EMU_SHARED" not in os.environ or int(os.environ["LSTM_EXT_EMU_SHARED"]) > 64 * 1024:
    rounding()  # step by step, the emulator's products are the CPU's
for dtype, bias in itertools.product(
    (torch.float32, torch.float64, torch.bfloat16, torch.float16), (True, False)
):
    for N, I, H in ((1, 3, 2), (5, 8, 16), (0, 3, 2)):
        cell(N, I, H, dtype, bias)
cell(600, 8, 4, torch.float32, True)  # products by the library
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for packed, reverse, with_reset in itertools.product((False, True), repeat=3):
        layer(4, 3, 5, 8, dtype, packed, reverse, with_reset)
        layer(4, 3, 5, 8, dtype, packed, reverse, with_reset, peephole=True)
    for packed, reverse in itertools.product((False, True), repeat=2):
        with torch.random.fork_rng():  # the other checks draw as they did without this one
            states(4, 3, 5, 8, dtype, packed, reverse)
layer(3, 140, 2, 3, torch.float32, True, True, True)
layer(3, 140, 2, 3, torch.float32, True, True, True, peephole=True)
layer(4, 3, 5, 8, torch.float16, False, False, False, peephole=True)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for N, I, H in ((1, 3, 2), (5, 8, 16), (600, 8, 4)):
        peepholes(N, I, H, dtype)
layer(3, 3, 5, 136, torch.bfloat16, False, True, False)  # in a cluster, where one fits
print(f"{checks} comparisons agree")
