"""LSTM layers to test with, and their outputs and gradients."""

import torch
from measure import uniform
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
    {"num_layers": 3},
]


def identify(value):
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return "-".join(f"{k}={v}" for k, v in value.items()) or "plain"


def pair(I, H, dtype=torch.float32, **options):
    """torch's LSTM and ours with the same weights."""
    theirs = nn.LSTM(I, H, dtype=dtype, **options)
    mine = lstm_ext.LSTM(I, H, dtype=dtype, **options)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def sequence(module, L, N):
    """Inputs and states in float64, and lengths for packing."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    shape = (N, L, module.input_size) if module.batch_first else (L, N, module.input_size)
    P = module.proj_size or module.hidden_size
    states = uniform((layers, N, P)), uniform((layers, N, module.hidden_size))
    return uniform(shape), states, torch.randint(1, L + 1, (N,))


def run(module, x, states, lengths=None, call=None):
    """Outputs, and gradients of a random combination of them: of input, states, parameters.

    call: of the module, if it is not simply called.
    """
    dtype = next(module.parameters()).dtype
    leaves = [t.to(dtype).detach().requires_grad_() for t in (x, *states)]
    value = leaves[0]
    if lengths is not None:
        value = pack_padded_sequence(
            value, lengths, batch_first=module.batch_first, enforce_sorted=False
        )
    output, (h, c) = (call or module)(value, tuple(leaves[1:]))
    outputs = [output.data if isinstance(output, PackedSequence) else output, h, c]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    wanted = [*leaves, *module.parameters()]
    found = torch.autograd.grad(outputs, wanted, [g.to(dtype) for g in grads])
    return [t.detach() for t in (*outputs, *found)]
