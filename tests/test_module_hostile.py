"""Wrong calls of the modules, drawn at random, beside torch's: same type of error, same words."""

import random
import re
import warnings

import numpy as np
import pytest
import torch
from limits import slow
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

L, N, I, H = 4, 3, 5, 6
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"batch_first": True},
    {"proj_size": 2},
    {"bias": False, "num_layers": 2, "bidirectional": True},
]
# What may stand where a tensor belongs.
NO_TENSORS = [None, 1, 2.5, "text", [], (), {}, np.zeros((N, I), np.float32), [[1.0]], object]


def pair(draw, cell):
    """torch's module and ours, with the same weights."""
    dtype = draw.choice([torch.float32, torch.float64])
    options = {"bias": draw.random() < 0.7} if cell else draw.choice(OPTIONS)
    made = []
    for library in (nn, lstm_ext):
        torch.manual_seed(0)
        kind = library.LSTMCell if cell else library.LSTM
        made.append(kind(I, H, dtype=dtype, **options))
    return made


def right_arguments(draw, module, cell):
    dtype = module.weight_ih.dtype if cell else module.weight_ih_l0.dtype
    if cell:
        shape = draw.choice([(N, I), (I,)])
        states = [(*shape[:-1], H)] * 2
    else:
        K = module.num_layers * (2 if module.bidirectional else 1)
        shape = (N, L, I) if module.batch_first else (L, N, I)
        batch = [N]
        if draw.random() < 0.3:
            shape, batch = (L, I), []
        states = [(K, *batch, module.proj_size or H), (K, *batch, H)]
    x = torch.randn(shape, dtype=dtype)
    if not cell and len(shape) == 3 and draw.random() < 0.3:
        lengths = torch.tensor([4, 2, 3])
        x = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    hx = tuple(torch.randn(s, dtype=dtype) for s in states) if draw.random() < 0.7 else None
    return [x] if hx is None and draw.random() < 0.5 else [x, hx]


CHANGES = [
    lambda t, d: t.unsqueeze(d.randrange(t.dim() + 1)),
    lambda t, d: t.select(d.randrange(t.dim()), 0) if t.dim() and t.numel() else t,
    lambda t, d: torch.cat([t, t], d.randrange(t.dim())) if t.dim() else t,
    lambda t, d: t.narrow(d.randrange(t.dim()), 0, 1) if t.dim() and t.numel() else t,
    lambda t, d: t.narrow(d.randrange(t.dim()), 0, 0) if t.dim() else t,
    lambda t, d: t.transpose(0, -1) if t.dim() else t,
    lambda t, _: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    lambda t, _: t.to(torch.bfloat16),
    lambda t, _: t.long(),
    lambda t, _: t.bool(),
    lambda t, _: t.to(torch.complex64),
    lambda t, _: t.sum(),
    lambda t, _: t.to("meta"),
    lambda t, _: t.to_sparse(),
    lambda t, d: d.choice(NO_TENSORS),
]


def spoil(draw, value):
    if isinstance(value, PackedSequence):
        data, sizes, order, back = value
        where = draw.randrange(3)
        if where == 0:
            return PackedSequence(draw.choice(CHANGES[:10])(data, draw), sizes, order, back)
        if where == 1:
            wrong = [sizes + 1, sizes.flip(0), sizes[:-1], sizes * 0, sizes[:0]]
            return PackedSequence(data, draw.choice(wrong), order, back)
        return draw.choice([data, tuple(value), list(value), sizes])
    if isinstance(value, torch.Tensor):
        try:
            return draw.choice(CHANGES)(value, draw)
        except (RuntimeError, IndexError):  # of a tensor that was changed before
            return value
    if isinstance(value, tuple) and value:
        where = draw.randrange(6)
        if where == 0:
            return list(value)
        if where == 1:
            return draw.choice([value[0], value[:1], (*value, value[0]), value[::-1]])
        parts = list(value)
        k = draw.randrange(len(parts))
        parts[k] = spoil(draw, parts[k])
        return tuple(parts)
    return draw.choice(NO_TENSORS)


def outcome(module, arguments):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return None, torch.utils._pytree.tree_leaves(module(*arguments))
    except Exception as error:
        return error, None


# What torch's kernels say of what its modules let through; ours says it at the border.
FROM_KERNELS = re.compile(
    "mat1 and mat2|Dimension out of range|size of tensor a|match the broadcast shape|mkldnn|"
    "SparseMeta|primitive|incorrect number of RNN parameters|must match the size|"
    "Expected more hidden"
)
# Where torch computes with what does not fit: from memory that nobody has written to, or with what
# is broadcast or left unread.
NOT_TAKEN = re.compile("on the same device|must be 2-D, got 3-D")


def words(error):
    return str(error).splitlines()[0] if str(error) else ""


def compare(seed, cell):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    theirs, ours = pair(draw, cell)
    arguments = right_arguments(draw, theirs, cell)
    packed = isinstance(arguments[0], PackedSequence)
    before = list(arguments)
    for _ in range(draw.choice([0, 1, 1, 1, 2])):
        k = draw.randrange(len(arguments))
        arguments[k] = spoil(draw, arguments[k])
    with torch.set_grad_enabled(draw.random() < 0.5):
        our_error, found = outcome(ours, arguments)
        if packed and any(a is not b for a, b in zip(arguments, before, strict=True)):
            # torch checks little there, and ends the process: ours ends well or in an error.
            return None if our_error is None or words(our_error) else f"seed {seed}: no words"
        their_error, expected = outcome(theirs, arguments)
    what = f"seed {seed}: torch's {their_error!r:.300}, ours {our_error!r:.300}"
    if their_error is None and our_error is None:
        for a, b in zip(found, expected, strict=True):
            if isinstance(a, torch.Tensor):
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), what
                if not a.is_meta:
                    torch.testing.assert_close(a, b, equal_nan=True)
        return None
    if isinstance(our_error, RuntimeError) and NOT_TAKEN.search(words(our_error)):
        return None if their_error is None or isinstance(their_error, RuntimeError) else what
    if our_error is not None and FROM_KERNELS.search(words(their_error)):
        return None if isinstance(our_error, (RuntimeError, IndexError, ValueError)) else what
    same = type(their_error) is type(our_error) and words(their_error) == words(our_error)
    return None if same else what


@pytest.mark.parametrize("count", [400, *slow(4000)])
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_wrong_calls(cell, count):
    different = [d for d in (compare(seed, cell) for seed in range(count)) if d]
    assert not different, f"{len(different)}:\n" + "\n".join(different[:20])
