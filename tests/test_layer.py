"""The numbers of the LSTM layer: against torch.nn.LSTM and reference cells, and by gradcheck."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import OPTIONS, identify, pair, run, sequence
from limits import slow_where
from measure import DTYPES, Pool, uniform

import lstm_ext
from lstm_ext import reference

SHAPES = [(7, 3, 5, 4), (5, 1, 3, 2), (3, 9, 17, 33), (2, 1, 8, 8), (130, 2, 6, 20)]
PACKED = {False: "padded", True: "packed"}
LARGE = [(9, 50, 20, 70), (6, 1, 30, 300)]  # for one layer alone


@pytest.mark.parametrize(
    ("dtype", "options", "packed"),
    slow_where(
        lambda dtype, options, _: dtype != torch.float32 and options,
        [*itertools.product(DTYPES, OPTIONS, [False, True])],
    ),
    ids=lambda v: identify(v) if isinstance(v, dict) else PACKED.get(v, str(v)),
)
def test_error_is_no_worse_than_torchs(dtype, options, packed):
    pools = {}
    for shape in SHAPES if "num_layers" in options else SHAPES + LARGE:
        L, N, I, H = shape
        for _ in range(1 if N * H > 256 else 3):
            theirs, mine = pair(I, H, dtype, **options)
            exact = copy.deepcopy(theirs).double()
            x, states, lengths = sequence(mine, L, N)
            x, states = x.to(dtype), tuple(s.to(dtype) for s in states)
            lengths = lengths if packed else None
            if dtype == torch.float64:
                torch.testing.assert_close(
                    run(mine, x, states, lengths), run(theirs, x, states, lengths),
                    rtol=1e-9, atol=1e-11,
                )  # fmt: skip
                continue
            results = (run(module, x, states, lengths) for module in (exact, mine, theirs))
            for k, (truth, a, b) in enumerate(zip(*results, strict=True)):
                name = ["output", "h_n", "c_n", "input", "h_0", "c_0"][k] if k < 6 else "weights"
                # Relative to each result's size: small and large ones in one pool.
                scale = truth.abs().max().clamp(min=1e-30)
                pools.setdefault(name, Pool()).add(
                    (truth / scale).numpy().astype(np.longdouble),
                    a.double() / scale,
                    b.double() / scale,
                )
    for name, pool in pools.items():
        pool.assert_no_worse(name, dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    L=st.integers(1, 12), N=st.integers(0, 60), I=st.integers(1, 40), H=st.integers(1, 80),
    reverse=st.booleans(), packed=st.booleans(), with_reset=st.booleans(), data=st.data(),
)  # fmt: skip
def test_any_size(L, N, I, H, reverse, packed, with_reset, data):
    """Kernels, padded or packed, in either direction, against the reference."""
    torch.manual_seed(data.draw(st.integers(0, 100)))
    N = max(N, 1) if packed else N
    sizes = torch.sort(torch.randint(1, N + 1, (L,)), descending=True).values if packed else None
    if packed:
        sizes[0] = N
    rows = (int(sizes.sum()),) if packed else (L, N)
    tensors = [uniform(s) for s in ((*rows, I), (N, H), (N, H), (4 * H, I), (4 * H, H))]
    tensors[3:] = [t * H**-0.5 for t in tensors[3:]]
    tensors += [uniform((4 * H,)), None]
    reset = torch.rand(L, N) < 0.3 if with_reset else None

    def results(layer):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        outputs = layer(*leaves, sizes, reset, reverse)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]

    def by_reference(x, h, c, *rest):
        output, states = reference.lstm(x, (h, c), *rest)
        return output, *states

    expected = results(by_reference)
    actual = results(torch.ops.lstm_ext.lstm_layer)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("packed", "N", "dtype"),
    slow_where(
        lambda packed, N, dtype: N < 60 and (dtype != torch.float32 or (N == 9 and packed)),
        [*itertools.product([False, True], [1, 9, 60], DTYPES)],
    ),
    ids=lambda v: PACKED[v] if isinstance(v, bool) else str(v),
)
def test_one_set_of_bits(dtype, N, packed):
    """Any number of threads, with and without gradients: the same bits."""
    module = lstm_ext.LSTM(70, 130, num_layers=2, bidirectional=True, dtype=dtype)
    x, states, lengths = sequence(module, 20, N)
    lengths = lengths if packed else None
    first = run(module, x, states, lengths)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for a, b in zip(first, run(module, x, states, lengths), strict=True):
                assert torch.equal(a, b)
            if not packed:
                with torch.no_grad():
                    output, (h, c) = module(x.to(dtype), tuple(s.to(dtype) for s in states))
                for a, b in zip(first, (output, h, c), strict=False):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("packed", "reverse", "with_reset"),
    slow_where(lambda *options: sum(options) % 2, [*itertools.product([False, True], repeat=3)]),
)
def test_gradcheck(packed, reverse, with_reset):
    L, N, I, H = 4, 3, 3, 2
    sizes = torch.tensor([3, 3, 2, 1]) if packed else None
    rows = (9,) if packed else (L, N)
    shapes = (*rows, I), (N, H), (N, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)
    leaves = [uniform(s).requires_grad_() for s in shapes]
    reset = torch.rand(L, N) < 0.4 if with_reset else None

    def layer(*tensors):
        return torch.ops.lstm_ext.lstm_layer(*tensors, sizes, reset, reverse)

    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize(
    ("sizes", "reset", "message"),
    [
        (torch.tensor([2, 3]), None, "descending"),
        (torch.tensor([3, 3]), None, "adds up to"),
        (torch.tensor([3, 2], dtype=torch.int32), None, "int64"),
        (torch.tensor([3, 2]), torch.zeros(2, 2, dtype=torch.bool), "reset must be"),
        (torch.tensor([3, 2]), torch.zeros(2, 3), "reset must be"),
    ],
)
def test_wrong_sequences(sizes, reset, message):
    shapes = ((5, 4), (3, 6), (3, 6), (24, 4), (24, 6))
    tensors = [torch.randn(s) for s in shapes]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lstm_ext.lstm_layer(*tensors, None, None, sizes, reset, False)
