"""Three kernels, once each, for ncu to look at: a layer forward and backward, and a cell.

python profiled.py
"""

from __future__ import annotations

import torch

import lstm_ext  # noqa: F401

L, N, H = 50, 64, 512

torch.manual_seed(0)
x, h, c = (torch.randn(*size, H, device="cuda", dtype=torch.float16, requires_grad=True)
           for size in ((L, N), (N,), (N,)))  # fmt: skip
weights = [torch.randn(4 * H, *size, device="cuda", dtype=torch.float16).mul_(0.04)
           for size in ((H,), (H,), (), ())]  # fmt: skip
output, _, _ = torch.ops.lstm_ext.lstm_layer(x, h, c, *weights, None, None, False)
torch.autograd.grad(output, [x, h, c], torch.randn_like(output))
with torch.no_grad():
    torch.ops.lstm_ext.lstm_cell(x[0], h, c, *weights)
torch.cuda.synchronize()
