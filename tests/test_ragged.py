"""Sequences of different lengths, nested or in a list: each as it is by itself."""

import copy
import warnings

import pytest
import torch
from layers import OPTIONS, identify
from limits import slow
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import lstm_ext

I, H = 3, 4
LENGTHS = [2, 5, 0, 3, 5, 0, 1]
ALL_OPTIONS = [*OPTIONS, {"proj_size": 2, "num_layers": 2}, {"peephole": True}]


def build(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return lstm_ext.LSTM(I, H, dtype=dtype, **options)


def make_sequences(lengths=LENGTHS, dtype=torch.float64):
    return [torch.randn(n, I, dtype=dtype, requires_grad=True) for n in lengths]


def make_states(lstm, N=7):
    K, P = lstm.num_layers * (2 if lstm.bidirectional else 1), lstm.proj_size or H
    shapes = (K, N, P), (K, N, H)
    return tuple(torch.randn(s, dtype=lstm.weight_ih_l0.dtype, requires_grad=True) for s in shapes)


def nest(sequences):
    return torch.nested.as_nested_tensor(sequences, layout=torch.jagged)


def one_by_one(lstm, sequences, hx=None, reset=None):
    """What each sequence gives by itself; one of length 0 has its first states as its last."""
    outputs, h_n, c_n = [], [], []
    K, P = lstm.num_layers * (2 if lstm.bidirectional else 1), lstm.proj_size or H
    for k, x in enumerate(sequences):
        states = (
            (x.new_zeros(K, P), x.new_zeros(K, H)) if hx is None else tuple(s[:, k] for s in hx)
        )
        output = x.new_zeros(0, P * (2 if lstm.bidirectional else 1))
        if len(x):
            options = {} if reset is None else {"reset": reset[k]}
            output, states = lstm(x, states, **options)
        outputs.append(output)
        h_n.append(states[0])
        c_n.append(states[1])
    return outputs, (torch.stack(h_n, 1), torch.stack(c_n, 1))


def by_nested(lstm, sequences, hx=None, reset=None):
    options = {} if reset is None else {"reset": nest(reset)}
    output, states = lstm(nest(sequences), hx, **options)
    assert output.is_nested
    assert output.layout == torch.jagged
    return list(output.unbind()), states


def by_list(lstm, sequences, hx=None, reset=None):
    return lstm_ext.run_sequences(lstm, sequences, hx, reset=reset)


WAYS = pytest.mark.parametrize("way", [by_nested, by_list])


def everything(way, lstm, sequences, hx, reset=None):
    """Outputs, states and all gradients of a sum that tells places apart."""
    outputs, states = way(lstm, sequences, hx, reset)
    torch.manual_seed(5)
    results = [*outputs, *states]
    loss = sum((r * torch.randn_like(r)).sum() for r in results)
    leaves = [*sequences, *(hx or ()), *lstm.parameters()]
    return results, torch.autograd.grad(loss, leaves, materialize_grads=True)


@WAYS
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=identify)
def test_each_as_by_itself(options, given, way):
    lstm, sequences = build(**options), make_sequences()
    hx = make_states(lstm) if given else None
    results, gradients = everything(way, lstm, sequences, hx)
    expected, expected_gradients = everything(one_by_one, lstm, sequences, hx)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@WAYS
@pytest.mark.parametrize(
    "lengths", [[3, 3, 3], [4], [1, 2, 3, 4], [4, 3, 2, 1], [0, 2], [2, 0], [1, 2, 0] * 9]
)
def test_orders_of_lengths(lengths, way):
    lstm, sequences = build(bidirectional=True), make_sequences(lengths)
    hx = make_states(lstm, len(lengths))
    results, gradients = everything(way, lstm, sequences, hx)
    expected, expected_gradients = everything(one_by_one, lstm, sequences, hx)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_torchs_module_by_list():
    lstm = nn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
    sequences, hx = make_sequences(), make_states(lstm)
    results, gradients = everything(by_list, lstm, sequences, hx)
    expected, expected_gradients = everything(one_by_one, lstm, sequences, hx)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_the_packed_path(dtype, way):
    """Of a sorted pack: the same rows go through the same operator."""
    lstm = build(dtype, num_layers=2, dropout=0.4)
    sequences = make_sequences([4, 2, 6, 6, 1], dtype)
    torch.manual_seed(1)
    outputs, (h, c) = way(lstm, sequences)
    torch.manual_seed(1)
    packed, expected = lstm(pack_sequence(sequences, enforce_sorted=False))
    for mine, theirs in zip((*outputs, h, c), (*unpack_sequence(packed), *expected), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)


@WAYS
def test_states_of_length_zero_are_their_own(way):
    lstm, sequences = build(), make_sequences()
    hx = make_states(lstm)
    outputs, (h, c) = way(lstm, sequences, hx)
    for k, n in enumerate(LENGTHS):
        assert outputs[k].shape == (n, H)
        assert torch.equal(h[:, k], hx[0][:, k]) == (n == 0)
        assert torch.equal(c[:, k], hx[1][:, k]) == (n == 0)
    before = hx[0].detach().clone()
    with torch.no_grad():
        h += 1  # no view of what went in
    assert torch.equal(hx[0], before)


@WAYS
@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "bidirectional": True}], ids=identify)
def test_only_sequences_of_length_zero(options, way):
    lstm, sequences = build(**options), make_sequences([0] * 40)
    hx = make_states(lstm, 40)
    outputs, (h, c) = way(lstm, sequences, hx)
    expected, (h_0, c_0) = one_by_one(lstm, sequences, hx)
    torch.testing.assert_close([*outputs, h, c], [*expected, h_0, c_0])
    assert h.data_ptr() != hx[0].data_ptr()
    _, (h, c) = way(lstm, sequences)
    assert not h.any()
    assert h.shape == hx[0].shape
    assert c.shape == hx[1].shape


def test_no_sequences():
    empty = torch.nested.nested_tensor_from_jagged(torch.randn(0, I), torch.tensor([0]))
    output, (h, c) = build(torch.float32)(empty)
    assert output.shape[0] == 0
    assert output.values().shape == (0, H)
    assert h.shape == c.shape == (1, 0, H)


@WAYS
def test_reset(way):
    lstm, sequences = build(num_layers=2, bidirectional=True), make_sequences()
    hx = make_states(lstm)
    reset = [torch.rand(n) < 0.4 for n in LENGTHS]
    assert sum(int(mask.sum()) for mask in reset) > 2
    results, gradients = everything(way, lstm, sequences, hx, reset)
    expected, expected_gradients = everything(one_by_one, lstm, sequences, hx, reset)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_first_does_not_matter(batch_first):
    lstm, sequences = build(batch_first=batch_first), make_sequences()
    expected, _ = one_by_one(build(), sequences)
    torch.testing.assert_close(by_nested(lstm, sequences)[0], expected)


def test_lengths_of_input_and_output_are_one():
    """So that torch adds them, row by row."""
    lstm = lstm_ext.LSTM(H, H)
    x = nest([torch.randn(n, H) for n in LENGTHS])
    output, _ = lstm(x)
    assert output.shape == x.shape
    assert torch.equal((output + x).values(), output.values() + x.values())
    assert output.offsets() is x.offsets()


def test_a_nested_tensor_with_gaps_and_small_offsets():
    lstm, padded = build(), torch.randn(3, 6, I, dtype=torch.float64)
    begins, lengths = torch.tensor([0, 2, 1]), torch.tensor([3, 0, 4])
    x = torch.nested.narrow(padded, 1, begins, lengths, layout=torch.jagged)
    assert x.lengths() is not None
    rows = [padded[k, b : b + n] for k, (b, n) in enumerate(zip(begins, lengths, strict=True))]
    expected, states = one_by_one(lstm, rows)
    output, last = lstm(x)
    torch.testing.assert_close([*output.unbind(), *last], [*expected, *states])
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    output, _ = lstm(torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets))
    torch.testing.assert_close(output.values(), torch.cat(expected))


def test_second_derivatives():
    """By the list: torch's nested tensors have none, with or without an LSTM."""
    lstm = build()

    def function(a, b, h, c):
        outputs, states = by_list(lstm, [a, b[:0], b], (h, c))
        return torch.cat(outputs), *states

    inputs = (*make_sequences([2, 3]), *make_states(lstm, 3))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_of_a_nested_leaf():
    lstm, sequences = build(), make_sequences()
    torch.cat(one_by_one(lstm, sequences)[0]).square().sum().backward()
    x = torch.nested.nested_tensor(
        [s.detach() for s in sequences], layout=torch.jagged, requires_grad=True
    )
    lstm(2.0 * (x * 0.5))[0].values().square().sum().backward()
    torch.testing.assert_close(x.grad.values(), torch.cat([s.grad for s in sequences if len(s)]))


def test_forward_mode_of_what_has_gradients_too():
    lstm, sequences = build(), make_sequences([2, 3, 1])
    tangents = [torch.randn_like(s) for s in sequences]

    def tangent_of(way):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(s, t) for s, t in zip(sequences, tangents, strict=True)]
            return forward_ad.unpack_dual(torch.cat(way(lstm, duals)[0])).tangent

    torch.testing.assert_close(tangent_of(by_list), tangent_of(one_by_one))


def test_forward_mode_and_vmap():
    lstm = build()
    sequences = [s.detach() for s in make_sequences([2, 3])]

    def function(a, b):
        return torch.cat(lstm_ext.run_sequences(lstm, [a, b])[0])

    tangents = tuple(torch.randn_like(s) for s in sequences)
    _, tangent = torch.func.jvp(function, tuple(sequences), tangents)
    jacobians = torch.func.jacrev(function, argnums=(0, 1))(*sequences)
    expected = sum((j * t).sum((-1, -2)) for j, t in zip(jacobians, tangents, strict=True))
    torch.testing.assert_close(tangent, expected)
    many = [torch.stack([s, -s]) for s in sequences]
    mapped = torch.func.vmap(function)(*many)
    torch.testing.assert_close(mapped[1], function(*(-s for s in sequences)))


class Wrapped(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


def test_converted_frozen_and_hooked():
    sequences = [s.detach() for s in make_sequences()]
    lstm = build().eval()
    expected, _ = one_by_one(lstm, sequences)
    torch.testing.assert_close(
        by_nested(lstm_ext.freeze(copy.deepcopy(lstm)), sequences)[0], expected
    )
    theirs = Wrapped(I, H, dtype=torch.float64)
    theirs.load_state_dict(lstm.state_dict())
    converted = lstm_ext.convert(theirs)
    calls = []
    converted.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(by_nested(converted, sequences)[0], expected)
    assert calls == [1]


def test_arguments_stay():
    lstm, sequences = build(), make_sequences()
    hx = make_states(lstm)
    kept = [t.detach().clone() for t in (*sequences, *hx)]
    for way in (by_nested, by_list):
        way(lstm, sequences, hx)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*sequences, *hx), strict=True))


def jagged(*lengths, features=I, dtype=torch.float64):
    return nest([torch.randn(n, features, dtype=dtype) for n in lengths])


def strided():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(2, I), torch.randn(1, I)])


def masks(*lengths, dtype=torch.bool):
    return nest([torch.zeros(n, dtype=dtype) for n in lengths])


def pair(*shape):
    return torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)


WRONG = {
    "strided": (lambda: ((strided(),), {}), ValueError, "layout torch.jagged"),
    "transposed": (lambda: ((jagged(2, 3).transpose(1, 2),), {}), ValueError, "batch, ragged"),
    "no features": (lambda: ((masks(2, 3),), {}), ValueError, "batch, ragged length, features"),
    "four dimensions": (lambda: ((jagged(2, 3).unsqueeze(-1),), {}), ValueError, "batch, ragged"),
    "features": (lambda: ((jagged(2, 3, features=2),), {}), RuntimeError, "input.size"),
    "features, empty": (lambda: ((jagged(0, features=2),), {}), RuntimeError, "input.size"),
    "dtype": (lambda: ((jagged(2, dtype=torch.float32),), {}), (RuntimeError, ValueError), "dtype"),
    "batch of h": (
        lambda: ((jagged(2, 0, 3), pair(1, 2, H)), {}),
        RuntimeError,
        r"Expected hidden\[0\] size \(1, 3, 4\), got \[1, 2, 4\]",
    ),
    "size of c": (
        lambda: ((jagged(2, 3), (pair(1, 2, H)[0], pair(1, 2, 5)[0])), {}),
        RuntimeError,
        r"Expected hidden\[1\] size \(1, 2, 4\), got \[1, 2, 5\]",
    ),
    "one state": (lambda: ((jagged(2), pair(1, 1, H)[:1]), {}), RuntimeError, "two hidden"),
    "padded reset": (
        lambda: ((jagged(2, 3),), {"reset": torch.zeros(2, 3, dtype=torch.bool)}),
        ValueError,
        "reset should be nested",
    ),
    "lengths of reset": (
        lambda: ((jagged(2, 3),), {"reset": masks(3, 2)}),
        ValueError,
        r"with the lengths of the input, got torch.bool of lengths \[3, 2\]",
    ),
    "dtype of reset": (
        lambda: ((jagged(2, 3),), {"reset": masks(2, 3, dtype=torch.int64)}),
        ValueError,
        "bool nested tensor",
    ),
    "strided reset": (lambda: ((jagged(2, 1),), {"reset": strided()}), ValueError, "nested reset"),
    "offsets": (
        lambda: (
            (
                torch.nested.nested_tensor_from_jagged(
                    torch.randn(5, I, dtype=torch.float64), torch.tensor([0, 2, 4])
                ),
            ),
            {},
        ),
        ValueError,
        "ascend from 0 to the number of its rows, 5",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_nested_input(name):
    make, error, words = WRONG[name]
    arguments, options = make()
    with pytest.raises(error, match=words):
        build()(*arguments, **options)


def wrong_lists():
    a, b = torch.randn(2, I), torch.randn(3, I)
    return {
        "no LSTM": (nn.GRU(I, H), [a], {}, TypeError, "module should be an LSTM, got GRU"),
        "none": (None, [], {}, ValueError, "at least one sequence"),
        "no tensor": (None, [a, [1.0]], {}, TypeError, "sequence 1 should be a Tensor, got list"),
        "dimensions": (None, [a, b[0]], {}, ValueError, r"got \(3,\) for sequence 1"),
        "features": (None, [a, b[:, :2]], {}, ValueError, r"got \(3, 2\) for sequence 1"),
        "all features": (None, [a[:, :2]], {}, RuntimeError, "input.size"),
        "states": (None, [a, b], {"hx": pair(1, 1, H)}, RuntimeError, r"Expected hidden\[0\] size"),
        "masks": (None, [a], {"reset": [torch.zeros(3) > 0]}, ValueError, "reset should be"),
        "few masks": (None, [a, b], {"reset": [torch.zeros(2) > 0]}, ValueError, "reset should be"),
        "nested": (None, [strided()], {}, ValueError, "a nested tensor for sequence 0"),
        "torch's": (
            nn.LSTM(I, H), [a], {"reset": [torch.zeros(2) > 0]}, TypeError, "reset",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_lists())
def test_wrong_lists(name):
    module, sequences, options, error, words = wrong_lists()[name]
    with pytest.raises(error, match=words):
        lstm_ext.run_sequences(module or build(torch.float32), sequences, **options)


def test_a_trace_takes_no_nested_tensor():
    with pytest.raises(ValueError, match="a nested input is for a call"):
        lstm_ext.trace_gates(build(), jagged(2, 3))


@pytest.mark.parametrize("allow_rnn", [False, *slow(True)])
def test_compile(allow_rnn, caplog, recwarn):
    """The graph breaks at the sequences: once, not at every question about their lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.warn_once_cache.clear()
    lstm, x, sequences = build(), jagged(2, 0, 3), make_sequences()
    with torch._dynamo.config.patch(allow_rnn=allow_rnn):
        expected, _ = lstm(x)
        output, _ = torch.compile(lambda x: lstm(x * 2.0), backend="aot_eager")(x * 0.5)
        torch.testing.assert_close(output.values(), expected.values())
        expected, _ = by_list(lstm, sequences)
        outputs, _ = torch.compile(lambda s: by_list(lstm, s), backend="aot_eager")(sequences)
        torch.testing.assert_close(outputs, expected)
    assert "Graph break" not in caplog.text
    assert not [w for w in recwarn if "_ragged.py" in str(w.message)]
    torch._dynamo.reset()


@torch._dynamo.config.patch(allow_rnn=True)
def test_whole_graphs_and_export_say_why_not():
    torch._dynamo.reset()
    lstm, sequences = build(), make_sequences()

    class Model(nn.Module):
        def forward(self, sequences):
            return lstm_ext.run_sequences(lstm, sequences)[0]

    with pytest.raises(RuntimeError, match=r"packed depends on the(ir)? lengths"):
        torch.compile(Model(), backend="aot_eager", fullgraph=True)(sequences)
    with pytest.raises(RuntimeError, match=r"packed depends on the(ir)? lengths"):
        torch.compile(lstm, backend="aot_eager", fullgraph=True)(jagged(2, 0, 3))
    with pytest.raises(RuntimeError, match="Export the module with a padded or a packed input"):
        torch.export.export(Model(), (sequences,))
    torch._dynamo.reset()
