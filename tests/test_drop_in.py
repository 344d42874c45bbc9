"""What code does with nn.LSTM and nn.LSTMCell beside calling them, done with ours."""

import contextlib
import functools
import io
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from limits import slow
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

L, N, I, H = 5, 3, 4, 4
LENGTHS = torch.tensor([5, 2, 4])
OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 2},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "deep, bidirectional": {"num_layers": 2, "bidirectional": True},
    "projected": {"proj_size": 2},
    "no bias": {"bias": False},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def pair(kind="LSTM", dtype=torch.float32, **options):
    """torch's module and ours, with the same weights."""
    made = []
    for library in (nn, lstm_ext):
        torch.manual_seed(0)
        made.append(getattr(library, kind)(I, H, dtype=dtype, **options))
    return made


def data(dtype=torch.float32, rows=N):
    return torch.randn(L, rows, I, dtype=dtype, generator=torch.Generator().manual_seed(7))


def packed(x, module):
    return pack_padded_sequence(
        x, LENGTHS[: x.shape[0 if module.batch_first else 1]], module.batch_first, False
    )


def relative_error(found, true):
    return ((found.double() - true).norm() / true.norm()).item()


def laid_out(x, module):
    return x.transpose(0, 1) if module.batch_first else x


def flat(out):
    output, (h, c) = out
    return [output.data if isinstance(output, PackedSequence) else output, h, c]


# Ways to call a layer that go different ways inside.
CALLS = {
    "padded": lambda m, x: m(laid_out(x, m)),
    "packed": lambda m, x: m(packed(laid_out(x, m), m)),
    "one sequence": lambda m, x: m(x[:, 0]),
    "no gradient": lambda m, x: torch.no_grad()(m)(laid_out(x, m)),
    "reset": lambda m, x: m(laid_out(x, m), **no_reset(m, x)),
    "checkpoint_every": lambda m, x: in_pieces(m)(laid_out(x, m)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def no_reset(module, x):
    if not isinstance(module, lstm_ext.LSTM):
        return {}
    return {"reset": laid_out(torch.zeros(x.shape[:2], dtype=torch.bool), module)}


def in_pieces(module):
    if isinstance(module, lstm_ext.LSTM):
        module.checkpoint_every = 2
    return module


# Weights


def write_into_the_list(m):
    m._flat_weights[1] = torch.zeros_like(m._flat_weights[1])


def replace_the_list(m):
    m._flat_weights = [2 * w.detach() for w in m._flat_weights]


def replace_a_parameter(m):
    m._parameters["weight_hh_l0"] = nn.Parameter(2 * m.weight_hh_l0.detach())


def hide_a_parameter(m):
    vars(m)["weight_hh_l0"] = 2 * m.weight_hh_l0.detach()


def assign_a_parameter(m):
    m.weight_hh_l0 = nn.Parameter(2 * m.weight_hh_l0.detach())


def write_the_data(m):
    m.weight_hh_l0.data.mul_(2)


def replace_a_parameter_by_no_parameter(m):
    w = m.weight_hh_l0.detach()
    del m.weight_hh_l0
    m.weight_hh_l0 = 2 * w


WRITTEN = [
    write_into_the_list, replace_the_list, replace_a_parameter, hide_a_parameter,
    assign_a_parameter, write_the_data, replace_a_parameter_by_no_parameter,
]  # fmt: skip


@every_call
@every_option
@pytest.mark.parametrize("write", WRITTEN)
def test_written_weights(write, options, call):
    theirs, ours = pair(**options)
    x = data()
    before = flat(call(ours, x))
    for module in (theirs, ours):
        write(module)
    found, expected = flat(call(ours, x)), flat(call(theirs, x))
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], before[0])


def test_replaced_parameters_are_called_directly_again(monkeypatch, capsys):
    """A loader that writes into _parameters makes one call slower, and not all."""
    module = pair()[1]
    replace_a_parameter(module)
    with torch.no_grad():
        assert refusal(monkeypatch, capsys, module, data())
        assert not refusal(monkeypatch, capsys, module, data())


@pytest.mark.parametrize("write", WRITTEN)
def test_written_weights_in_a_trace(write):
    theirs, ours = pair()
    for module in (theirs, ours):
        write(module)
        trace = lstm_ext.trace_gates(module, data())
        torch.testing.assert_close(trace.h[-1], theirs(data())[0])


@pytest.mark.parametrize("write", [replace_a_parameter, hide_a_parameter, write_the_data])
def test_written_weights_of_a_cell(write):
    theirs, ours = pair("LSTMCell")
    for module in (theirs, ours):
        # The functions above name the layer's weight.
        module.weight_hh_l0 = module.weight_hh
        write(module)
        for store in (module._parameters, vars(module)):
            if "weight_hh_l0" in store:
                store["weight_hh"] = store.pop("weight_hh_l0")
    torch.testing.assert_close(ours(data()[0]), theirs(data()[0]))


@every_call
@every_option
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_functional_call_of_another_dtype(dropout, options, call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout of one layer
        theirs, ours = pair(dropout=dropout, **options)
    x = data(torch.float64)
    found = []
    for module in (theirs, ours):
        torch.manual_seed(2)
        parameters = {k: v.double() for k, v in module.named_parameters()}
        inner = nn.ModuleList([module])  # so that the module itself can be called in any way
        inner.forward = lambda x, inner=inner: call(inner[0], x)
        names = {f"0.{k}": v for k, v in parameters.items()}
        found.append(flat(functional_call(inner, names, (x,))))
    torch.testing.assert_close(found[1], found[0])
    assert found[1][0].dtype == torch.float64
    # Nothing of the call is left behind.
    assert next(ours.parameters()).dtype == torch.float32
    assert call(ours, data())[1][0].dtype == torch.float32


@every_option
def test_functional_call_in_halves(options):
    _, ours = pair(**options)
    parameters = {k: v.bfloat16() for k, v in ours.named_parameters()}
    output, _ = functional_call(ours, parameters, (laid_out(data().bfloat16(), ours),))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.float(), ours(laid_out(data(), ours))[0], rtol=0.05, atol=0.05
    )


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ensembles_of_another_dtype(options, dtype):
    models = [pair(**options)[1] for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(2)
    stacked, buffers = stack_module_state(models)
    stacked = {k: v.detach().to(dtype) for k, v in stacked.items()}
    x = laid_out(data(dtype), models[0])
    found = vmap(lambda p: functional_call(models[0], (p, buffers), (x,))[0])(stacked)
    for k, model in enumerate(models):
        torch.testing.assert_close(found[k], model.to(dtype)(x)[0])


def test_projections_under_every_transform():
    theirs, ours = pair(proj_size=2, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = data(torch.float64)
    parameters = {k: v.detach() for k, v in ours.named_parameters()}

    def loss(module, p, x):
        return functional_call(module, p, (x,))[0].square().sum()

    batched = torch.stack([x, 2 * x])
    torch.testing.assert_close(vmap(lambda x: ours(x)[0])(batched)[1], theirs(2 * x)[0])
    per_sample = vmap(grad(functools.partial(loss, ours)), (None, 0))(parameters, batched)
    for name, expected in grad(functools.partial(loss, theirs))(parameters, 2 * x).items():
        torch.testing.assert_close(per_sample[name][1], expected)
    torch.testing.assert_close(jacrev(lambda x: ours(x)[0])(x), jacrev(lambda x: theirs(x)[0])(x))
    torch.testing.assert_close(jacfwd(lambda x: ours(x)[0])(x), jacrev(lambda x: ours(x)[0])(x))
    _, tangent = jvp(lambda x: ours(x)[0], (x,), (x,))
    assert tangent.abs().max() > 0


class Dropped(nn.Module):
    def forward(self, weight):
        return nn.functional.dropout(weight, 0.5, self.training)


def parametrize_twice(make):
    """A parametrization of two weights, of which torch reads the first once more."""

    def change(module):
        for name in ("weight_hh_l0", "weight_ih_l1"):
            make(module, name)

    return change


PARAMETRIZED = {
    "spectral_norm": parametrize_twice(nn.utils.parametrizations.spectral_norm),
    "weight_norm": parametrize_twice(nn.utils.parametrizations.weight_norm),
    "orthogonal": parametrize_twice(nn.utils.parametrizations.orthogonal),
    "dropout": parametrize_twice(
        lambda m, name: nn.utils.parametrize.register_parametrization(m, name, Dropped())
    ),
}


@every_call
@pytest.mark.parametrize("change", PARAMETRIZED.values(), ids=PARAMETRIZED)
@pytest.mark.parametrize("cached", [False, True])
def test_parametrizations_that_differ_each_time(cached, change, call):
    """In training each reading of such a weight draws numbers, or moves its buffers."""
    found = []
    for module in pair(num_layers=2, bidirectional=True):
        torch.manual_seed(1)
        change(module)
        # In its cache a weight is made once.
        with nn.utils.parametrize.cached() if cached else contextlib.nullcontext():
            results = [*flat(call(module, data())), *flat(call(module, data()))]
        if results[0].requires_grad:
            results[-1].square().sum().backward()
            results += [p.grad for p in module.parameters()]
        results += flat(call(module.eval(), data()))
        found.append([*results, *module.buffers(), torch.rand(2)])
    torch.testing.assert_close(found[1], found[0])


def raised(call):
    try:
        call()
    except Exception as error:
        return type(error)
    return None


def drop_a_parameter(m):
    m.bias_hh_l0 = None


def drop_the_first_parameter(m):
    m.weight_ih_l0 = None


def put_none_into_the_list(m):
    m._flat_weights[1] = None


def put_a_number_into_the_list(m):
    m._flat_weights[2] = 3.0


def cut_the_list(m):
    m._flat_weights = m._flat_weights[:-1]


def add_one_to_the_list(m):
    m._flat_weights.append(m._flat_weights[0])


def empty_the_list(m):
    m._flat_weights = []


@every_call
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize(
    "write",
    [
        drop_a_parameter, drop_the_first_parameter, put_none_into_the_list,
        put_a_number_into_the_list, cut_the_list, add_one_to_the_list, empty_the_list,
    ],
)  # fmt: skip
def test_weights_that_are_none(write, options, call):
    """torch's error, in each of its ways to call a layer."""
    theirs, ours = pair(**options)
    for module in (theirs, ours):
        write(module)
    of_ours = raised(lambda: call(ours, data()))
    assert of_ours is not None
    if write is empty_the_list and call is CALLS["packed"]:
        assert of_ours in (RuntimeError, IndexError)
    else:
        assert of_ours is raised(lambda: call(theirs, data()))


# States that are not two tensors in a tuple, of layers (1, N, H).
NO_PAIRS = {
    "a tensor": lambda h: torch.stack([h, h]),
    "a dict": lambda h: {0: h, 1: h},
    "a generator": lambda h: (h for _ in range(2)),
    "a string": lambda h: "hc",
    "one": lambda h: (h,),
    "three": lambda h: (h, h, h),
    "none and none": lambda h: (None, None),
    "of too few dimensions": lambda h: (h[0], h[0]),
    "of another batch": lambda h: (h[:, 1:], h[:, 1:]),
    "a list": lambda h: [h, h],
}
WITH_STATES = {
    "padded": lambda m, x, hx: m(x, hx),
    "packed": lambda m, x, hx: m(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx),
    "sorted": lambda m, x, hx: m(pack_padded_sequence(x, torch.tensor([5, 3, 2])), hx),
    "reset": lambda m, x, hx: m(x, hx, **no_reset(m, x)),
    "frozen": lambda m, x, hx: frozen(m)(x, hx),
    "frozen, sorted": lambda m, x, hx: WITH_STATES["sorted"](frozen(m), x, hx),
    "trace": lambda m, x, hx: traced(m, x, hx),
}


PACKS = [WITH_STATES[name] for name in ("packed", "sorted", "frozen, sorted")]


def frozen(module):
    return lstm_ext.freeze(module.eval()) if isinstance(module, lstm_ext.LSTM) else module


def traced(module, x, hx):
    if not isinstance(module, lstm_ext.LSTM):
        return module(x, hx)
    trace = lstm_ext.trace_gates(module, x, hx)
    return trace.h[-1], (trace.h[:, -1], trace.c[:, -1])


@pytest.mark.parametrize("call", WITH_STATES.values(), ids=WITH_STATES)
@pytest.mark.parametrize("states", NO_PAIRS.values(), ids=NO_PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_that_are_no_pair_of_tensors(dtype, states, call):
    h = data(dtype)[:1]
    theirs, ours = pair(dtype=dtype)
    with torch.no_grad():
        expected = raised(lambda: call(theirs, data(dtype), states(h)))
        found = raised(lambda: call(ours, data(dtype), states(h)))
        if states is NO_PAIRS["of too few dimensions"] and call in PACKS:
            assert found in (expected, RuntimeError)
            return
        assert found is expected
        if expected is None:
            theirs, ours = (call(m, data(dtype), states(h)) for m in pair(dtype=dtype))
            torch.testing.assert_close(flat(ours), flat(theirs))


# Gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("steps", "calls"), [(20, 20), *slow((200, 4), (1, 100)), (300, 1)])
def test_gradients_of_halves_add_up(dtype, steps, calls):
    """Over the steps of one backward, and over backwards; at most 1.5 times torch's error."""

    def gradient(cls, dtype):
        torch.manual_seed(0)
        cell = cls(16, 32).to(dtype)
        torch.manual_seed(1)
        for _ in range(calls):
            h = c = torch.full((4, 32), 0.5, dtype=dtype)
            loss = 0
            for _ in range(steps):
                h, c = cell(torch.randn(4, 16).to(dtype), (h, c))
                loss = loss + h.float().square().mean()
            loss.backward()
        return [p.grad for p in cell.parameters()]

    exact = gradient(nn.LSTMCell, torch.float64)
    theirs, ours = gradient(nn.LSTMCell, dtype), gradient(lstm_ext.LSTMCell, dtype)
    for mine, torchs, true in zip(ours, theirs, exact, strict=True):
        assert relative_error(mine, true) <= 1.5 * relative_error(torchs, true)


@every_option
@pytest.mark.parametrize("call", [CALLS["padded"], CALLS["packed"]], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_changed_in_place_before_backward(call, options, dtype):
    """What torch lets change, or a clear error where torch raises one."""
    for k in range(3):
        found = []
        for module in pair(dtype=dtype, **options):
            tensors = flat(call(module, data(dtype)))
            loss = tensors[0].square().sum() + tensors[2].sum() if k != 2 else tensors[0].sum()
            try:
                tensors[k].mul_(2)
                (loss + tensors[k].sum()).backward()
                found.append([p.grad for p in module.parameters()])
            except RuntimeError as error:
                found.append(error)
        theirs, ours = found
        if isinstance(theirs, RuntimeError):
            # oneDNN's layer keeps its output; ours may then refuse too, in the same words.
            assert not isinstance(ours, RuntimeError) or "modified by an inplace" in str(ours)
            continue
        assert not isinstance(ours, RuntimeError), (k, ours)
        torch.testing.assert_close(ours, theirs)


# Inputs (L, N, I) or (N, L, I) that a layer reads with the time first, so or after a copy.
LAYOUTS = {
    "as it is read": {},
    "batch first": {"batch_first": True},
    "transposed": {},
    "every second": {},
}


def laid_out_as(name, x):
    if name == "batch first":
        return x.transpose(0, 1).contiguous()
    if name == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x.repeat_interleave(2, 1)[:, ::2] if name == "every second" else x


@every_option
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", ["padded", "checkpoint_every", "reset", "cells", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_changed_in_place_before_backward(dtype, call, layout, options):
    """A residual connection adds to it: torch lets that be done to what it has copied."""
    options = {**options, "batch_first": False, **LAYOUTS[layout]}
    found = []
    for module in pair(dtype=dtype, **options):
        first = data(dtype).requires_grad_()
        x = laid_out_as(layout, first * 1)
        assert x.is_contiguous() == (layout in ("as it is read", "batch first"))
        given = {}
        if isinstance(module, lstm_ext.LSTM):
            module.checkpoint_every = 2 if call == "checkpoint_every" else None
            if call == "reset":
                given["reset"] = torch.zeros(x.shape[:2], dtype=torch.bool)
            given["return_cell_states"] = call == "cells"
        if call == "dropout" and module.num_layers > 1:
            module.dropout = 0.5
        torch.manual_seed(1)
        output = module(x, **given)[0]
        x += output.detach()[..., :1]
        try:
            (output.square().sum() + x.square().sum()).backward()
            found.append([first.grad, *(p.grad for p in module.parameters())])
        except RuntimeError as error:
            if "modified by an inplace" not in str(error) and "modified inplace" not in str(error):
                raise
            found.append(None)
    theirs, ours = found
    assert (ours is None) == (layout == "as it is read")
    # By steps torch makes no copy of this one.
    by_steps = layout == "every second" and (dtype == torch.float64 or "proj_size" in options)
    assert (theirs is None) == (ours is None or by_steps)
    if theirs is not None:
        torch.testing.assert_close(ours, theirs)


@every_option
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("what", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "reset", "h", "x"])
def test_pieces_notice_what_is_changed_before_backward(what, packs, options):
    """With checkpoint_every backward computes them anew, from what forward had."""
    if what == "bias_hh_l0" and options.get("bias") is False:
        pytest.skip("there is no bias")
    gradients = []
    for changes in (False, True):
        module = pair(**options)[1]
        module.checkpoint_every = 2
        x = laid_out(data(), module).contiguous()
        given = packed(x, module) if packs else x
        hx = tuple(s.clone() for s in flat(module(given))[1:])
        reset = torch.zeros(L, N, dtype=torch.bool)
        reset = laid_out(reset, module).contiguous() if not packs else reset
        loss = flat(module(given, hx, reset=reset))[0].square().sum()
        changed = {"reset": reset, "h": hx[0], "x": given.data if packs else x}.get(what)
        with torch.no_grad():
            if changes:
                changed = getattr(module, what) if changed is None else changed
                changed.logical_not_() if what == "reset" else changed.mul_(2)
        copied = what == "x" and module.batch_first and not packs
        if changes and what != "bias_hh_l0" and not copied and not (packs and what in "reset h"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            return
        loss.backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_biases_changed_in_place_before_backward(kind, dtype):
    """oneDNN's layer keeps them too, and refuses: the gradient is then as if nothing changed."""
    found = []
    for k, module in enumerate(pair(kind, dtype=dtype)):
        x = data(dtype) if kind == "LSTM" else data(dtype)[0]
        first = module(x)[0]
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "bias" in name and k == 1:
                    p.add_(1)
        first.square().sum().backward()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_a_graph_of_the_backward_notices_a_changed_bias(kind):
    """It is made from the biases: a wrong one is never silent."""
    _, module = pair(kind)
    x = (data() if kind == "LSTM" else data()[0]).requires_grad_()
    first = module(x)[0]
    with torch.no_grad():
        getattr(module, "bias_ih_l0" if kind == "LSTM" else "bias_ih").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("existing", [False, True])
def test_anomaly_mode_sees_every_gradient(kind, existing):
    for module in pair(kind):
        x = data() if kind == "LSTM" else data()[0]
        if existing:
            module(x)[0].sum().backward()
        bad = x.clone()
        bad[..., 0] = float("inf")  # the gates saturate: 0 * inf in the gradient of w_ih alone
        with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = module(bad)[0].sum()
            with pytest.raises(RuntimeError, match="returned nan values"):
                loss.backward()


# States


@every_option
@every_call
def test_last_states_are_tensors_of_their_own(call, options):
    if call is CALLS["one sequence"]:
        pytest.skip("torch's own are views there")
    theirs, ours = pair(**options)
    modules = [theirs, ours, lstm_ext.freeze(pair(**options)[1].eval())]
    for module in modules:
        with torch.set_grad_enabled(module is not modules[-1]):
            _, (h, c) = call(module, data())
        for state in (h, c):
            assert not state._is_view()
            state.detach_()
            state.zero_()


def test_truncated_backpropagation_by_detaching_in_place():
    found = []
    for module in pair(num_layers=2):
        state = None
        for _ in range(3):
            output, state = module(data(), state)
            output.square().sum().backward()
            for s in state:
                s.detach_()
        found.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(found[1], found[0])


# Classes, copies and files


class Checked(lstm_ext.LSTM):
    """A subclass with a check of its own."""

    def check_forward_args(self, input, hidden, batch_sizes):
        self.checked = input.shape
        super().check_forward_args(input, hidden, batch_sizes)
        if input.isnan().any():
            raise ValueError("NaN in the input")


@every_call
def test_a_subclass_checks_its_arguments(call):
    module = Checked(I, H)
    call(module, data())
    assert module.checked[-1] == I or call is CALLS["packed"]
    with pytest.raises((ValueError, RuntimeError), match="NaN in the input"):
        call(module, data() * float("nan"))
    expected = lstm_ext.LSTM(I, H)
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(flat(call(module, data())), flat(call(expected, data())))


class OwnList(nn.LSTM):
    """Writes the list of weights itself, as old forms of weight dropout do."""

    def _update_flat_weights(self):
        self._flat_weights = [2 * getattr(self, name) for name in self._flat_weights_names]


class OwnReading(nn.LSTM):
    def _weights_have_changed(self):
        return True

    def _init_flat_weights(self):
        self._flat_weights = [w.tanh() for w in map(self._parameters.get, self._flat_weights_names)]


@every_call
@every_option
@pytest.mark.parametrize("cls", [OwnList, OwnReading])
def test_a_subclass_makes_its_own_list_of_weights(cls, options, call):
    found = []
    for change in (lambda module: module, lstm_ext.convert):
        torch.manual_seed(0)
        module = change(cls(I, H, **options))
        results = flat(call(module, data()))
        if results[0].requires_grad:
            results[0].square().sum().backward()
            results += [p.grad for p in module.parameters()]
        found.append(results)
    assert isinstance(module, lstm_ext.LSTM)
    torch.testing.assert_close(found[1], found[0])
    with (
        pytest.warns(UserWarning, match="forward or checks of its own"),
        pytest.raises(ValueError, match="to freeze"),
    ):
        lstm_ext.freeze(module.eval())


def test_modules_pickled_by_older_versions():
    """Their __dict__ lacks what was added since."""
    theirs, ours = pair(num_layers=2)
    old = dict(vars(ours))
    for name in ("_flat_weight_refs", "proj_size"):
        del old[name]
    read = lstm_ext.LSTM.__new__(lstm_ext.LSTM)
    read.__setstate__(old)
    torch.testing.assert_close(flat(read(data())), flat(theirs(data())))
    assert read.checkpoint_every is None
    with_option = lstm_ext.LSTM(I, H, checkpoint_every=3)
    assert pickle.loads(pickle.dumps(with_option)).checkpoint_every == 3
    file = io.BytesIO()
    torch.save(with_option, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).checkpoint_every == 3


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_torch_jit_script_names_the_remedy(kind):
    model = nn.Sequential(pair(kind)[1])
    for module in (model, lstm_ext.freeze(model.eval())):
        with pytest.raises(RuntimeError, match=r"lstm_ext\.revert"):
            torch.jit.script(module)
    assert isinstance(lstm_ext.unfreeze(model)[0], getattr(lstm_ext, kind))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_plain_compile(kind):
    """Without torch's switch the graph breaks at the layer; the model computes the same."""
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.rnn = nn.Linear(I, I), pair(kind)[1]

        def forward(self, x):
            return self.rnn(self.before(x).relu())[0].tanh()

    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    for x in (data(), data(rows=2)):
        x = x if kind == "LSTM" else x[0]
        torch.testing.assert_close(compiled(x), model(x))
        found = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)


def test_the_compiler_leaves_the_layer_alone():
    """Without torch's switch no frame of ours is compiled: the layer costs what it does eagerly."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    module = pair()[1]
    compiled = torch.compile(module, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(flat(compiled(data())), flat(module(data())))
    assert counter.frame_count == 0


def refusal(monkeypatch, capsys, module, *arguments, **options):
    monkeypatch.setattr("lstm_ext._backend._VERBOSE", True)
    module(*arguments, **options)
    said = capsys.readouterr().err
    return said.partition("not the direct call: ")[2].splitlines()[:1]


def test_the_verbose_mode_says_why_the_direct_call_was_left(monkeypatch, capsys):
    x = data()
    cases = [
        ([], pair()[1], (x,), {}),
        (["reset"], pair()[1], (x,), {"reset": torch.zeros(L, N, dtype=torch.bool)}),
        ([], pair(proj_size=2)[1], (x,), {}),
        (["dropout is to be drawn"], pair(num_layers=2, dropout=0.5)[1], (x,), {}),
        (["checkpoint_every"], lstm_ext.LSTM(I, H, checkpoint_every=2), (x,), {}),
        (["the class has checks of its own"], Checked(I, H), (x,), {}),
        (["a single sequence"], pair()[1], (x[:, 0],), {}),
        (["no tuple of two states"], pair()[1], (x, list(torch.zeros(2, 1, N, H))), {}),
        (["the device is meta"], lstm_ext.LSTM(I, H, device="meta"), (x.to("meta"),), {}),
    ]
    written = pair()[1]
    write_into_the_list(written)
    reason = "a weight is no parameter, or not what _flat_weights has"
    cases.append(([reason], written, (x,), {}))
    cell, normed = pair("LSTMCell")[1], pair("LSTMCell")[1]
    torch.nn.utils.parametrizations.weight_norm(normed, "weight_hh")
    cases.append(([], cell, (x[0],), {}))
    cases.append((["a single sample"], cell, (x[0, 0],), {}))
    cases.append((["a weight is no parameter"], normed, (x[0],), {}))
    frozen = lstm_ext.freeze(pair()[1].eval())
    cases.append((["a single sequence"], frozen, (x[:, 0],), {}))
    with torch.no_grad():
        for expected, module, arguments, options in cases:
            assert refusal(monkeypatch, capsys, module, *arguments, **options) == expected


@pytest.mark.usefixtures("allow_rnn")
@pytest.mark.parametrize(
    ("frozen", "states"), [(False, True), (True, False), *slow((False, False), (True, True))]
)
def test_packed_argument_in_a_whole_graph(states, frozen):
    torch._dynamo.reset()
    module = pair(num_layers=2, bidirectional=True)[1]
    if frozen:
        module = lstm_ext.freeze(module.eval())

    def call(values, sizes, h, c):
        output, (h, c) = module(PackedSequence(values, sizes), (h, c) if states else None)
        return output.data, h, c

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(not frozen):
        for lengths in ([5, 3, 2], [4, 4, 1]):
            p = pack_padded_sequence(data(), torch.tensor(lengths))
            arguments = p.data, p.batch_sizes, torch.ones(4, N, H), torch.ones(4, N, H)
            torch.testing.assert_close(compiled(*arguments), call(*arguments))
