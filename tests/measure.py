"""Errors of a cell against a result of higher precision, pooled over many random cases."""

import numpy as np
import torch
from torch import nn

import lstm_ext

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ["h'", "c'", "input", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh"]


def uniform(shape):
    """Unit variance without far outliers, which would make largest errors a lottery."""
    return torch.empty(shape, dtype=torch.float64).uniform_(-(3**0.5), 3**0.5)


def case(N, I, H, dtype, device="cpu", bias=True):
    """Random inputs, states, parameters and output gradients of one cell, in float64's order."""
    bound = max(H, 1) ** -0.5
    shapes = {
        "input": (N, I),
        "h": (N, H),
        "c": (N, H),
        "w_ih": (4 * H, I),
        "w_hh": (4 * H, H),
        "b_ih": (4 * H,),
        "b_hh": (4 * H,),
    }
    values = {}
    for name, shape in shapes.items():
        if name.startswith("w") or name.startswith("b"):
            value = torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound)
        else:
            value = uniform(shape)
        values[name] = value.to(dtype).to(device)
    if not bias:
        values["b_ih"] = values["b_hh"] = None
    grads = tuple(uniform((N, H)).to(dtype).to(device) for _ in range(2))
    return values, grads


def run(cell, values, grads, dtype=None):
    """Outputs and gradients of cell(input, h, c, w_ih, w_hh, b_ih, b_hh), in NAMES' order."""
    leaves = [
        None if v is None else v.detach().to(dtype or v.dtype).requires_grad_()
        for v in values.values()
    ]
    out = cell(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(out, wanted, [g.to(dtype or g.dtype) for g in grads])
    return [t.detach() for t in (*out, *gradients)]


def ours(x, h, c, *weights):
    return lstm_ext.lstm_cell(x, (h, c), *weights)


def torchs(x, h, c, w_ih, w_hh, b_ih, b_hh):
    cell = nn.LSTMCell(x.shape[1], h.shape[1], bias=b_ih is not None, device=x.device)
    parameters = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    return torch.func.functional_call(cell, parameters, (x, (h, c)))


def exact(values, grads):
    """The cell and its gradients in numpy's long double: what float64 is measured against.

    Written from the chain rule, apart from the package and from torch.
    """
    x, h, c, w_ih, w_hh, b_ih, b_hh = (
        None if v is None else v.detach().double().cpu().numpy().astype(np.longdouble)
        for v in values.values()
    )
    gh, gc = (g.double().cpu().numpy().astype(np.longdouble) for g in grads)
    pre = x @ w_ih.T + h @ w_hh.T
    if b_ih is not None:
        pre = pre + b_ih + b_hh
    i, f, g, o = np.split(pre, 4, axis=1)
    i, f, o = (1 / (1 + np.exp(-z)) for z in (i, f, o))
    g = np.tanh(g)
    c_next = f * c + i * g
    t = np.tanh(c_next)
    d = gc + gh * o * (1 - t**2)
    pre_grad = np.concatenate(
        [d * g * i * (1 - i), d * c * f * (1 - f), d * i * (1 - g**2), gh * t * o * (1 - o)], axis=1
    )
    result = [
        o * t,
        c_next,
        pre_grad @ w_ih,
        pre_grad @ w_hh,
        d * f,
        pre_grad.T @ x,
        pre_grad.T @ h,
    ]
    if b_ih is not None:
        result += [pre_grad.sum(0)] * 2
    return result


class Pool:
    """Errors of two implementations, gathered over cases."""

    def __init__(self):
        self.errors = [[], []]
        self.scale = 0.0

    def add(self, truth, *results):
        for errors, result in zip(self.errors, results, strict=True):
            error = result.double().cpu().numpy().astype(np.longdouble) - truth
            errors.append(np.abs(error).astype(np.float64).ravel())
        self.scale = max(self.scale, float(np.abs(truth).max(initial=0)))

    def assert_no_worse(self, name, dtype, ratio=1.5):
        """The first's error is at most ratio times the second's.

        In root mean square, in the 99th percentile, and in the largest; the largest of a sample is
        a matter of luck, torch's as well as ours: it counts as at least four times the 99th
        percentile, and as the rounding of one number of the largest size there.
        """
        mine, others = (np.concatenate(errors) for errors in self.errors)
        tail = np.quantile(others, 0.99)
        rounding = torch.finfo(dtype).eps * self.scale / ratio
        pairs = {
            "rms error": (np.sqrt((mine**2).mean()), np.sqrt((others**2).mean())),
            "99 % of errors below": (np.quantile(mine, 0.99), tail),
            "largest error": (mine.max(), max(others.max(), 4 * tail, rounding)),
        }
        for what, (a, b) in pairs.items():
            assert a <= ratio * b, f"{name}: {what} {a:.3g}, torch's {b:.3g}"
