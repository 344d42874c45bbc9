"""The CPU's operators, their threads watched by ThreadSanitizer, against torch's modules.

python check_threads.py LIBRARY        (built and run by tests/test_native.py)
"""

import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

torch.ops.load_library(sys.argv[1])
OPS = torch.ops.lstm_ext
checks = 0


def close(found, expected, dtype):
    global checks
    checks += 1
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def gradients(outputs, leaves):
    return torch.autograd.grad([t.float().sum() for t in outputs], leaves, retain_graph=True)


# Few rows: the threads share the units and meet at every step. Many: each takes rows of its own.
for dtype in (torch.float32, torch.bfloat16):
    for N, H in ((1, 256), (3, 192), (64, 64), (150, 32)):
        for packed, reverse in ((False, False), (True, False), (False, True)):
            layer = nn.LSTM(24, H, dtype=dtype)
            x = torch.randn(6, N, 24).to(dtype).requires_grad_()
            h, c = (torch.randn(1, N, H).to(dtype).requires_grad_() for _ in "hc")
            sequence, sizes = x, None
            if packed:
                sequence = pack_padded_sequence(x, torch.linspace(6, 1, N).long())
                sizes = sequence.batch_sizes
            elif reverse:
                sequence = x.flip(0)
            theirs, (h_n, c_n) = layer(sequence, (h, c))
            theirs = theirs.data if packed else theirs.flip(0) if reverse else theirs
            data = sequence.data if packed else x
            weights = list(layer.parameters())
            ours = OPS.lstm_layer(data, h[0], c[0], *weights, sizes, None, reverse)
            for a, b in zip(ours, (theirs, h_n[0], c_n[0]), strict=True):
                close(a, b, dtype)
            leaves = [x, h, c, *weights]
            for a, b in zip(gradients(ours, leaves), gradients((theirs, h_n, c_n), leaves),
                            strict=True):  # fmt: skip
                scale = max(1.0, float(b.detach().abs().max()))
                close(a / scale, b / scale, dtype)
    for N, H in ((1, 300), (40, 128), (300, 64)):
        cell = nn.LSTMCell(40, H, dtype=dtype)
        x = torch.randn(N, 40).to(dtype).requires_grad_()
        h, c = (torch.randn(N, H).to(dtype).requires_grad_() for _ in "hc")
        leaves = [x, h, c, *cell.parameters()]
        ours, theirs = OPS.lstm_cell(*leaves), cell(x, (h, c))
        for a, b in zip((*ours, *gradients(ours, leaves)), (*theirs, *gradients(theirs, leaves)),
                        strict=True):  # fmt: skip
            scale = max(1.0, float(b.detach().abs().max()))
            close(a / scale, b / scale, dtype)
print(f"{checks} comparisons agree")
