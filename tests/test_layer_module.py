"""lstm_ext.LSTM as a module: options, states, reset, packed input, checkpointing, errors."""

import functools

import numpy as np
import pytest
import torch
from layers import OPTIONS, identify, pair, run, sequence
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_ext


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_through_one_output_alone(which):
    theirs, mine = pair(4, 6, num_layers=2)
    x, (h, c), _ = sequence(mine, 5, 3)
    found = []
    for module in (theirs, mine):
        leaves = [t.float().requires_grad_() for t in (x, h, c)]
        output, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]))
        loss = (output, h_n, c_n)[which].square().sum()
        found.append(torch.autograd.grad(loss, [*leaves, *module.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_only_what_is_asked_for():
    _, mine = pair(4, 6)
    mine.weight_hh_l0.requires_grad_(False)
    mine.bias_ih_l0.requires_grad_(False)
    output, _ = mine(torch.randn(5, 3, 4))
    output.sum().backward()
    assert mine.weight_hh_l0.grad is None
    assert mine.bias_ih_l0.grad is None
    assert mine.weight_ih_l0.grad is not None


def test_truncated_backpropagation():
    """States carried over, detached: gradients of the last piece alone."""
    theirs, mine = pair(4, 6)
    x = torch.randn(3, 5, 2, 4)
    for module in (theirs, mine):
        states = None
        for piece in x:
            output, states = module(piece, states)
            states = tuple(s.detach() for s in states)
            module.zero_grad()
            output.sum().backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_packed_is_each_sequence_alone():
    module = lstm_ext.LSTM(4, 6, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 7, 1, 7, 3)]
    output, (h, c) = module(pack_sequence(sequences, enforce_sorted=False))
    unpacked = nn.utils.rnn.unpack_sequence(output)
    for k, x in enumerate(sequences):
        alone, (h_k, c_k) = module(x)
        torch.testing.assert_close(unpacked[k], alone)
        torch.testing.assert_close((h[:, k], c[:, k]), (h_k, c_k))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_starts_again(batch_first, bidirectional):
    """A reset at step t: what follows is what a new sequence from t would give."""
    module = lstm_ext.LSTM(
        4, 6, dtype=torch.float64, batch_first=batch_first, bidirectional=bidirectional
    )
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    reset = torch.zeros(9, 2, dtype=torch.bool)
    reset[5, 1] = True
    value, mask = (x.transpose(0, 1), reset.transpose(0, 1)) if batch_first else (x, reset)
    output, _ = module(value, reset=mask)
    output = output.transpose(0, 1) if batch_first else output
    whole, _ = module(value)
    whole = whole.transpose(0, 1) if batch_first else whole
    tail, _ = module(x[5:, 1].contiguous())
    torch.testing.assert_close(output[5:, 1, :6], tail[:, :6])
    torch.testing.assert_close(output[:, 0], whole[:, 0])
    if bidirectional:
        # In reverse, step 5 is where the steps 5, 4, .. 0 begin.
        head, _ = module(x[:6, 1].contiguous())
        torch.testing.assert_close(output[:6, 1, 6:], head[:, 6:])
    assert not torch.equal(output[5:, 1], whole[5:, 1])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_projections_with_reset(packed):
    """No reset: torch's numbers and gradients. A reset: a new sequence from there."""
    options = {"proj_size": 3, "num_layers": 2, "bidirectional": True}
    theirs, mine = pair(4, 6, torch.float64, **options)
    x, states, lengths = sequence(mine, 7, 5)
    lengths = lengths if packed else None

    class Never(nn.Module):
        """Takes the way of a reset that never comes."""

        batch_first = False

        def parameters(self, recurse=True):
            return mine.parameters(recurse)

        def forward(self, value, hx):
            return mine(value, hx, reset=torch.zeros(7, 5, dtype=torch.bool)[: max_length(value)])

    def max_length(value):
        return len(value.batch_sizes) if isinstance(value, PackedSequence) else len(value)

    torch.testing.assert_close(
        run(Never(), x, states, lengths), run(theirs, x, states, lengths), rtol=1e-9, atol=1e-11
    )
    one = lstm_ext.LSTM(4, 6, proj_size=3, dtype=torch.float64)
    reset = torch.zeros(7, 5, dtype=torch.bool)
    reset[4, 2] = True
    output, _ = one(x, reset=reset)
    torch.testing.assert_close(output[4:, 2], one(x[4:, 2].contiguous())[0])
    with pytest.raises(RuntimeError, match="reset must be"):
        one(x, reset=reset[1:])


def test_reset_of_a_packed_sequence_is_in_the_order_of_the_batch():
    module = lstm_ext.LSTM(4, 6, dtype=torch.float64)
    sequences = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 6)]
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[2, 0] = reset[4, 0] = True  # the second beyond the end: no such step
    output, (h, _) = module(pack_sequence(sequences, enforce_sorted=False), reset=reset)
    first, second = nn.utils.rnn.unpack_sequence(output)
    torch.testing.assert_close(first[2:], module(sequences[0][2:])[0])
    torch.testing.assert_close(second, module(sequences[1])[0])
    torch.testing.assert_close(h[0, 0], first[-1])


@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"proj_size": 3}, {"proj_size": 2, "num_layers": 2, "bidirectional": True}],
    ids=identify,
)
def test_module_is_torchs_but_for_the_name(options):
    torch.manual_seed(3)
    theirs = nn.LSTM(4, 6, **options)
    torch.manual_seed(3)
    mine = lstm_ext.LSTM(4, 6, **options)
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [len(w) for w in mine.all_weights] == [len(w) for w in theirs.all_weights]
    mine.flatten_parameters()
    for batched in (True, False):
        x = torch.randn(2, 5, 4) if batched else torch.randn(5, 4)
        a, b = mine(x), theirs(x)
        torch.testing.assert_close(a, b)
        assert a[0].stride() == b[0].stride()


def test_dropout_between_layers():
    theirs, mine = pair(4, 6, num_layers=2, dropout=0.5)
    x = torch.randn(5, 3, 4)
    theirs.eval()
    mine.eval()
    torch.testing.assert_close(mine(x), theirs(x))
    mine.train()
    torch.manual_seed(0)
    first, _ = mine(x)
    torch.manual_seed(1)
    second, _ = mine(x)
    assert not torch.equal(first, second)
    _, sure = pair(4, 6, num_layers=2, dropout=1.0)
    lower, _ = lstm_ext.lstm(
        x, (torch.zeros(1, 3, 6),) * 2, [lstm_ext.LayerWeights(*sure.all_weights[0])]
    )[:2]
    upper = lstm_ext.LayerWeights(*sure.all_weights[1])
    nothing = torch.zeros_like(lower)
    expected, _, _ = lstm_ext.lstm(nothing, (torch.zeros(1, 3, 6),) * 2, [upper])
    torch.testing.assert_close(sure(x)[0], expected)


def test_weights_are_read_at_every_call():
    theirs, mine = pair(4, 6)
    x = torch.randn(5, 3, 4)
    mine(x)
    for module in (theirs, mine):
        module.weight_hh_l0.data[:] = 0.25  # the lecture's way
        module.bias_ih_l0 = nn.Parameter(torch.full((24,), 0.5))
    torch.testing.assert_close(mine(x), theirs(x))
    weights = {name: p * 2 for name, p in mine.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(mine, weights, x),
        torch.func.functional_call(theirs, weights, x),
    )
    normed = nn.utils.parametrizations.weight_norm(mine, "weight_hh_l0")
    normed.parametrizations.weight_hh_l0.original0.data.mul_(3)
    expected = nn.LSTM(4, 6)
    with torch.no_grad():
        for name in expected.state_dict():
            getattr(expected, name).copy_(getattr(normed, name))
    torch.testing.assert_close(normed(x), expected(x))


@pytest.mark.usefixtures("allow_rnn")
@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}], ids=str)
def test_compile_full_graph(options):
    torch._dynamo.reset()
    mine = lstm_ext.LSTM(4, 6, num_layers=2, bidirectional=True, **options)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(compiled(x), mine(x))
    compiled(x)[0].sum().backward()
    grads = [p.grad.clone() for p in mine.parameters()]
    mine.zero_grad()
    mine(x)[0].sum().backward()
    torch.testing.assert_close([p.grad for p in mine.parameters()], grads)


WRONG = {
    "1-D": lambda m: m(torch.randn(4)),
    "4-D": lambda m: m(torch.randn(1, 2, 3, 4)),
    "features": lambda m: m(torch.randn(5, 3, 7)),
    "dtype": lambda m: m(torch.randn(5, 3, 4).double()),
    "integers": lambda m: m(torch.zeros(5, 3, 4, dtype=torch.long)),
    "no steps": lambda m: m(torch.randn(0, 3, 4)),
    "2-D states": lambda m: m(torch.randn(5, 3, 4), (torch.zeros(3, 6),) * 2),
    "3-D states": lambda m: m(torch.randn(5, 4), (torch.zeros(1, 3, 6),) * 2),
    "h of a wrong batch": lambda m: m(
        torch.randn(5, 3, 4), (torch.zeros(1, 2, 6), torch.zeros(1, 3, 6))
    ),
    "c of a wrong size": lambda m: m(
        torch.randn(5, 3, 4), (torch.zeros(1, 3, 6), torch.zeros(1, 3, 5))
    ),
    "input None": lambda m: m(None),
    "input a number": lambda m: m(1.0),
    "input an array": lambda m: m(np.zeros((5, 3, 4), np.float32)),
    "input and states numbers": lambda m: m(1.0, 1.0),
    "dtype, and one state": lambda m: m(torch.randn(5, 3, 4).double(), (torch.zeros(1, 3, 6),)),
    "states a number": lambda m: m(torch.randn(5, 3, 4), 1),
    "states a tensor": lambda m: m(torch.randn(5, 3, 4), torch.zeros(2, 3, 6)),
    "one state": lambda m: m(torch.randn(5, 3, 4), (torch.zeros(1, 3, 6),)),
    "three states": lambda m: m(torch.randn(5, 3, 4), (torch.zeros(1, 3, 6),) * 3),
    "no c": lambda m: m(torch.randn(5, 3, 4), (torch.zeros(1, 3, 6), None)),
    "states strings": lambda m: m(torch.randn(5, 3, 4), "hc"),
    "packed, one state": lambda m: m(pack_sequence([torch.randn(5, 4)]), (torch.zeros(1, 1, 6),)),
    "packed, three states": lambda m: m(
        pack_sequence([torch.randn(5, 4)]), (torch.zeros(1, 1, 6),) * 3
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_torchs(name):
    theirs, mine = pair(4, 6)
    errors = []
    for module in (theirs, mine):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
            WRONG[name](module)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[1] == errors[0]


@pytest.mark.parametrize(
    ("features", "batch", "dtype", "message"),
    [
        (7, 1, torch.float32, r"Expected 4, got 7"),
        (4, 2, torch.float32, r"Expected hidden\[0\] size \(1, 1, 6\), got \[1, 2, 6\]"),
        (4, 1, torch.float64, "does not match weight dtype"),
    ],
)
def test_packed_input_is_checked_too(features, batch, dtype, message):
    """torch.nn.LSTM does not: it computes something from the first two (torch 2.13).

    For the dtype its RuntimeError comes out of some product.
    """
    packed = pack_sequence([torch.randn(5, features, dtype=dtype)])
    with pytest.raises(RuntimeError, match=message):
        lstm_ext.LSTM(4, 6)(packed, (torch.zeros(1, batch, 6),) * 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden_size": 0},
        {"proj_size": 9},
        {"dropout": 2},
        {"num_layers": 0},
        {"bias": 1},
        {"batch_first": 1},
    ],
)
def test_construction_errors_are_torchs(arguments):
    arguments = {"input_size": 4, "hidden_size": 6, **arguments}
    errors = []
    for kind in (nn.LSTM, lstm_ext.LSTM):
        with pytest.raises((ValueError, TypeError)) as caught:
            kind(**arguments)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[1] == errors[0]


def test_kept_for_backward():
    """At most 5 S H numbers beyond inputs and outputs."""
    L, N, I, H = 7, 3, 4, 6
    module = lstm_ext.LSTM(I, H)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    x = torch.randn(L, N, I)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, states = module(x)
    for known in (x, output, *states, *module.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    # The zero states are inputs too, made by the module.
    assert sum(kept.values()) <= 5 * L * N * H + 2 * N * H


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_checkpointing_gives_the_same_gradients(packed, every):
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    plain = lstm_ext.LSTM(4, 6, **options)
    sparing = lstm_ext.LSTM(4, 6, checkpoint_every=every, **options)
    sparing.load_state_dict(plain.state_dict())
    assert repr(sparing) == repr(plain)
    x, states, lengths = sequence(plain, 8, 5)
    lengths = lengths if packed else None
    torch.testing.assert_close(
        run(sparing, x, states, lengths), run(plain, x, states, lengths), rtol=1e-10, atol=1e-12
    )
    steps = 8 if lengths is None else int(lengths.max())
    reset = torch.rand(steps, 5) < 0.3
    torch.testing.assert_close(
        run(sparing, x, states, lengths, functools.partial(sparing, reset=reset)),
        run(plain, x, states, lengths, functools.partial(plain, reset=reset)),
        rtol=1e-10,
        atol=1e-12,
    )


def test_checkpointing_keeps_less():
    def kept(module, x):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x)
        return sum(storages.values())

    x = torch.randn(64, 4, 8)
    plain, sparing = lstm_ext.LSTM(8, 32), lstm_ext.LSTM(8, 32, checkpoint_every=16)
    assert kept(sparing, x) < 0.3 * kept(plain, x)
    with pytest.raises(ValueError, match="checkpoint_every should be positive"):
        lstm_ext.LSTM(8, 32, checkpoint_every=0)(x)


def test_saved_tensors_are_guarded():
    """A change in place between forward and backward is an error, not a wrong gradient."""
    module = lstm_ext.LSTM(4, 6)
    x = torch.randn(5, 3, 4)
    output, _ = module(x)
    output.data.sum()
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
