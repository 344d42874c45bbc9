"""lstm_ext.freeze and unfreeze: weights packed once, for inference."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from layers import identify
from measure import DTYPES
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import lstm_ext

OPTIONS = [
    {},
    {"num_layers": 2, "dropout": 0.5},
    {"bidirectional": True, "num_layers": 2},
    {"batch_first": True},
    {"bias": False},
]


def frozen_pair(*args, kind=lstm_ext.LSTM, **options):
    module = kind(*args, **options).eval()
    return module, lstm_ext.freeze(module)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=identify)
def test_same_bits(options, dtype):
    module, frozen = frozen_pair(5, 21, dtype=dtype, **options)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    with torch.no_grad():
        for N, L in ((1, 7), (3, 7), (40, 9)):
            x = torch.randn(N, L, 5).to(dtype)
            x = x if module.batch_first else x.transpose(0, 1)
            states = tuple(torch.randn(2, layers, N, 21).to(dtype))
            for hx in (None, states):
                torch.testing.assert_close(frozen(x, hx), module(x, hx), rtol=0, atol=0)
        sequences = [torch.randn(n, 5).to(dtype) for n in (2, 6, 1)]
        packed = pack_sequence(sequences, enforce_sorted=False)
        found, expected = frozen(packed), module(packed)
        torch.testing.assert_close(found[0].data, expected[0].data, rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
        # unbatched; below four steps the unpacked kernels add up in another order
        torch.testing.assert_close(frozen(sequences[1]), module(sequences[1]), rtol=0, atol=0)


@pytest.mark.parametrize("with_reset", [False, True])
def test_steps_are_the_sequence(with_reset):
    """Streaming: one step a call, the state carried over."""
    module, frozen = frozen_pair(4, 33, num_layers=2)
    x, reset = torch.randn(20, 3, 4), torch.rand(20, 3) < 0.3
    reset = reset if with_reset else None
    with torch.inference_mode():
        expected, last = module(x, reset=reset)
        state = None
        for t in range(20):
            part = None if reset is None else reset[t : t + 1]
            output, state = frozen(x[t : t + 1], state, reset=part)
            torch.testing.assert_close(output[0], expected[t])
        torch.testing.assert_close(state, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_cell(bias, dtype):
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-6)
    module, frozen = frozen_pair(5, 21, bias, kind=lstm_ext.LSTMCell, dtype=dtype)
    with torch.no_grad():
        for N in (1, 4, 30):
            x, h, c = (torch.randn(N, n).to(dtype) for n in (5, 21, 21))
            for hx in ((h, c), [h, c], None):
                torch.testing.assert_close(
                    frozen(x, hx), module(x, hx), rtol=tolerance, atol=tolerance
                )
        torch.testing.assert_close(
            frozen(x[0], (h[0], c[0])), module(x[0], (h[0], c[0])), rtol=tolerance, atol=tolerance
        )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = lstm_ext.LSTM(3, 4, batch_first=True)
        self.decoder = nn.ModuleList([lstm_ext.LSTMCell(4, 4)])
        self.other = nn.LSTM(4, 4)

    def forward(self, x):
        output, _ = self.encoder(x)
        h, c = self.decoder[0](output[:, -1])
        return self.other(h.unsqueeze(0))[0] + c


def test_model_is_frozen_in_place_and_back():
    model = Model().eval()
    before = dict(model.named_modules())
    keys, parameters = list(model.state_dict()), list(model.parameters())
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        expected = model(x)
    assert lstm_ext.freeze(model) is model
    assert type(model.encoder) is not lstm_ext.LSTM
    assert isinstance(model.encoder, lstm_ext.LSTM)
    assert model.other is before["other"]
    assert "frozen" in repr(model.encoder)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert lstm_ext.unfreeze(model) is model
    assert dict(model.named_modules()) == before
    model.train()
    model(x).sum().backward()
    assert model.encoder.weight_hh_l0.grad is not None


def test_a_module_in_two_places():
    model = nn.Module()
    model.a = model.b = lstm_ext.LSTM(3, 3)
    model.list = nn.ModuleList([model.a, nn.Sequential(model.a)])
    lstm_ext.freeze(model.eval())
    assert type(model.a) is not lstm_ext.LSTM
    assert model.a is model.b is model.list[0] is model.list[1][0]
    with pytest.raises(ValueError, match="only frozen ones"):
        lstm_ext.freeze(model)
    lstm_ext.unfreeze(model)
    assert type(model.a) is lstm_ext.LSTM
    assert model.a is model.b is model.list[0] is model.list[1][0]


def test_weights_are_those_of_the_time():
    module, frozen = frozen_pair(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        before = frozen(x)[0]
        module.weight_hh_l0.mul_(2)
        module.bias_hh_l0.add_(1)
        torch.testing.assert_close(frozen(x)[0], before, rtol=0, atol=0)
        again = lstm_ext.freeze(lstm_ext.unfreeze(frozen))
        torch.testing.assert_close(again(x)[0], module(x)[0], rtol=0, atol=0)


def test_parametrized_weights():
    module = weight_norm(lstm_ext.LSTM(3, 4), "weight_hh_l0").eval()
    frozen = lstm_ext.freeze(module)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x)[0], module(x)[0], rtol=0, atol=0)
    assert list(frozen.state_dict()) == list(module.state_dict())


def test_hooks_stay():
    module = lstm_ext.LSTMCell(3, 4).eval()
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    frozen = lstm_ext.freeze(module)
    with torch.no_grad():
        frozen(torch.randn(2, 3))
        handle.remove()
        frozen(torch.randn(2, 3))
    assert seen == [1]


@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_copies_and_pickles(kind):
    _, frozen = frozen_pair(3, 4, kind=kind)
    x = torch.randn(2, 3)
    with torch.no_grad():
        for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            torch.testing.assert_close(copied(x), frozen(x), rtol=0, atol=0)
            assert list(copied.state_dict()) == list(frozen.state_dict())
            assert type(lstm_ext.unfreeze(copied)) is kind
        # Packed anew, not copied: what another processor packed would be refused.
        assert frozen.__getstate__()["_buffers"] == {}
        frozen.packed_0[0] = 88
        with pytest.raises(RuntimeError, match="packed for"):
            frozen(x if kind is lstm_ext.LSTM else x[0])  # small cells: from plain weights


@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_frozen_modules_pickled_by_older_versions(kind):
    """They held three tensors, and no more, for the cell too."""
    _, frozen = frozen_pair(3, 4, kind=kind)
    state = {**frozen.__getstate__(), "_packed_names": ["packed_0", "packed_1", "packed_2"]}
    del state["like_weights"]
    read = type(frozen).__new__(type(frozen))
    read.__setstate__(state)
    x = torch.randn(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(read(x), frozen(x), rtol=0, atol=0)
        torch.testing.assert_close(read(x[:1]), frozen(x[:1]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_training_is_refused(kind):
    module = kind(3, 4)
    with pytest.raises(RuntimeError, match=r"training mode.*eval"):
        lstm_ext.freeze(module)
    frozen = lstm_ext.freeze(module.eval())
    assert frozen.eval() is frozen
    for refused in (
        frozen.train,
        nn.Sequential(frozen).train,
        frozen.double,
        lambda: frozen.to("meta"),
        lambda: frozen.load_state_dict(module.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=r"frozen module cannot.*lstm_ext\.unfreeze"):
            refused()
    frozen.to("cpu")
    frozen.float()
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"for inference.*unfreeze"):
        frozen(x.requires_grad_())
    output = frozen(x.detach())[0]
    assert not output.requires_grad


def test_half_a_model_is_never_frozen():
    model = nn.ModuleList([lstm_ext.LSTM(3, 4), lstm_ext.LSTM(3, 4, device="meta")]).eval()
    with pytest.raises(ValueError, match=r"1 is torch\.float32 on meta"):
        lstm_ext.freeze(model)
    assert type(model[0]) is lstm_ext.LSTM
    with pytest.raises(ValueError, match="Linear has no lstm_ext"):
        lstm_ext.freeze(nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match=r"float32 on meta.*CPU's kernels"):
        lstm_ext.freeze(lstm_ext.LSTM(3, 4, device="meta").eval())


def test_subclasses_with_a_forward_of_their_own_are_left():
    class Doubled(lstm_ext.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    class Checked(lstm_ext.LSTM):
        def check_input(self, input, batch_sizes):
            raise RuntimeError("checked")

    class Plain(lstm_ext.LSTM):
        pass

    model = nn.ModuleList([kind(3, 4) for kind in (Doubled, Checked, Plain)]).eval()
    with pytest.warns(UserWarning, match="freeze left") as seen:
        lstm_ext.freeze(model)
    assert [str(w.message).split()[2] for w in seen] == ["0", "1"]
    assert [type(m).__name__ for m in model] == ["Doubled", "Checked", "FrozenLSTM"]


WRONG = {
    "features": lambda m: m(torch.randn(5, 2, 4)),
    "rank": lambda m: m(torch.randn(5)),
    "states": lambda m: m(torch.randn(5, 2, 3), (torch.zeros(1, 3, 4),) * 2),
    "state dtype": lambda m: m(torch.randn(5, 2, 3), (torch.zeros(1, 2, 4).double(),) * 2),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_the_originals(name):
    found = []
    for module in frozen_pair(3, 4):
        with torch.no_grad(), pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
            WRONG[name](module)
        found.append((type(caught.value), str(caught.value)))
    if name == "state dtype":  # the operators' own words
        assert found[1][0] is RuntimeError
    else:
        assert found[1] == found[0]


WRONG_CELL = {
    "features": lambda m: m(torch.randn(2, 4)),
    "rank": lambda m: m(torch.randn(2, 2, 3)),
    "states": lambda m: m(torch.randn(2, 3), (torch.zeros(3, 4),) * 2),
    "no pair": lambda m: m(torch.randn(2, 3), torch.zeros(2, 4)),
}


@pytest.mark.parametrize("name", WRONG_CELL)
def test_cell_errors_are_the_originals(name):
    found = []
    for module in frozen_pair(3, 4, kind=lstm_ext.LSTMCell):
        with torch.no_grad(), pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
            WRONG_CELL[name](module)
        found.append((type(caught.value), str(caught.value)))
    assert found[1] == found[0]


def test_packed_for_another():
    """Packed weights say for what they were packed."""
    op = torch.ops.lstm_ext
    packed = op.lstm_layer_pack(torch.randn(16, 3), torch.randn(16, 4))
    h = torch.zeros(2, 4)

    def call(packed, x=None, h=h):
        x = torch.randn(5, 2, 3) if x is None else x
        return op.lstm_layer_packed(x, h, h, packed, None, None, None, None, False)

    call(packed)
    other = packed.clone()
    other[0] = 88  # the first letter of the instruction set
    with pytest.raises(RuntimeError, match=r"packed for.*not for.*again"):
        call(other)
    with pytest.raises(RuntimeError, match=r"3 -> 4.*not for Float 5 -> 4"):
        call(packed, torch.randn(5, 2, 5))
    with pytest.raises(RuntimeError, match=r"not for Double"):
        call(packed, torch.randn(5, 2, 3).double(), h.double())
    for wrong in (packed[:-1], packed[:10], packed.float(), packed.view(2, -1), packed[::2]):
        with pytest.raises(RuntimeError, match="lstm_layer_packed"):
            call(wrong)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        call(packed, h=torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"\(4H, I\) and \(4H, H\)"):
        op.lstm_layer_pack(torch.randn(16, 3), torch.randn(12, 4))
    with pytest.raises(RuntimeError, match="one dtype"):
        op.lstm_layer_pack(torch.randn(16, 3), torch.randn(16, 4).double())


@pytest.mark.usefixtures("allow_rnn")
def test_compiles_whole():
    for kind, x in ((lstm_ext.LSTM, torch.randn(5, 2, 3)), (lstm_ext.LSTMCell, torch.randn(2, 3))):
        _, frozen = frozen_pair(3, 4, kind=kind)
        with torch.no_grad():
            compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), frozen(x))


# Weights that something writes


def double_the_weight(module, _):
    module.weight_hh_l0 = 2 * module.raw


class WeightDrop(nn.Module):
    """The usual wrapper: it writes the weight of what it holds at each call."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.raw = nn.Parameter(module.weight_hh_l0.detach())
        del module.weight_hh_l0
        module.weight_hh_l0 = self.raw

    def forward(self, *arguments):
        del self.module.weight_hh_l0
        self.module.weight_hh_l0 = nn.functional.dropout(self.raw.clone(), 0.5, self.training)
        return self.module(*arguments)


def hooked(module):
    module.raw = nn.Parameter(module.weight_hh_l0.detach())
    del module.weight_hh_l0
    module.weight_hh_l0 = module.raw.detach()
    module.register_forward_pre_hook(double_the_weight)
    return module


@pytest.mark.parametrize("make", [hooked, WeightDrop])
def test_weights_that_something_writes_are_refused(make):
    model = make(lstm_ext.LSTM(3, 4))
    model(torch.randn(5, 2, 3))  # in training: a part of the weight is dropped
    before = dict(vars(model.eval()))
    with pytest.raises(ValueError, match=r"weight_hh_l0 is not a parameter.*remove that"):
        lstm_ext.freeze(model)
    assert dict(vars(model)) == before
    assert not any("Frozen" in type(m).__name__ for m in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "pruned", "pruned twice"])
def test_weights_that_torchs_own_hooks_write_are_computed_first(how, kind):
    from torch.nn.utils import prune

    name = "weight_hh_l0" if kind is lstm_ext.LSTM else "weight_hh"
    module = kind(3, 4)
    if how.startswith("pruned"):
        for _ in range(len(how.split())):
            prune.random_unstructured(module, name, 0.3)
    else:
        getattr(torch.nn.utils, how)(module, name)
    x = torch.randn(5, 3)
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    module(x)[0].sum().backward()
    optimizer.step()  # what the hook wrote last is stale now
    frozen = lstm_ext.freeze(module.eval())
    with torch.no_grad():
        found = frozen(x)
        torch.testing.assert_close(found, module(x))
        for p in module.parameters():
            p.zero_()
        torch.testing.assert_close(frozen(x), found)
        torch.testing.assert_close(frozen(x[:1])[0], found[0][:1])
    assert list(frozen.state_dict()) == list(module.state_dict())
    if how.startswith("pruned"):
        assert f"{name}_mask" in frozen.state_dict()
    copied = pickle.loads(pickle.dumps(lstm_ext.freeze(module)))
    assert list(copied.state_dict()) == list(module.state_dict())


def test_a_forward_of_the_instance_is_refused():
    module = lstm_ext.LSTM(3, 4).eval()
    old = module.forward
    module.forward = lambda *a: old(*a)
    with pytest.raises(ValueError, match="has a forward of its own"):
        lstm_ext.freeze(nn.Sequential(module))


@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_a_compiled_module_is_frozen_all_the_same(kind):
    torch._dynamo.reset()
    module, x = kind(3, 4).eval(), torch.randn(5, 3)
    module.compile(backend="aot_eager")
    with pytest.warns(UserWarning, match=r"compiled by \.compile\(\)"):
        frozen = lstm_ext.freeze(module)
    with torch.no_grad():
        found = frozen(x)
        for p in module.parameters():
            p.zero_()
        torch.testing.assert_close(frozen(x), found, rtol=0, atol=0)


def test_parametrized_weights_are_frozen_with_every_option():
    module = torch.nn.utils.parametrizations.weight_norm(lstm_ext.LSTM(3, 4), "weight_hh_l0")
    frozen, x = lstm_ext.freeze(module.eval()), torch.randn(5, 2, 3)
    reset = torch.rand(5, 2) < 0.3
    with torch.no_grad():
        torch.testing.assert_close(frozen(x, reset=reset), module(x, reset=reset))


# A whole model


def snapshot(model):
    modes = [m.training for m in model.modules()]
    return modes, {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
@pytest.mark.parametrize(
    "refused",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.to("meta"),
        lambda m: m.bfloat16(),
        lambda m: m.to_empty(device="meta"),
        lambda m: m.train(),
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict(m.state_dict(), strict=False),
    ],
)
def test_a_refused_change_leaves_the_whole_model_as_it_was(refused, kind):
    frozen = lstm_ext.freeze(kind(3, 4).eval())
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"rnn": frozen}), nn.Linear(4, 4)).eval()
    for whole in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        modes, state = snapshot(whole)
        with pytest.raises(RuntimeError, match="a frozen module cannot"):
            refused(whole)
        assert snapshot(whole)[0] == modes
        torch.testing.assert_close(snapshot(whole)[1], state, rtol=0, atol=0)
        # What changes nothing is not refused.
        assert whole.eval().float().to("cpu") is whole
        whole.requires_grad_(False).share_memory()
    lstm_ext.unfreeze(model)
    refused(model)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_autocast_as_unfrozen(kind, dtype, low):
    module = kind(3, 4, dtype=dtype).eval()
    frozen = lstm_ext.freeze(module)
    x = torch.randn(5, 2, 3, dtype=dtype)
    packed = pack_sequence([x[:, 0], x[:2, 1]])
    arguments = [x[0]] if kind is lstm_ext.LSTMCell else [x, x[:, 0], packed]
    for argument in arguments:
        with torch.no_grad(), torch.autocast("cpu", low):
            found, expected = frozen(argument), module(argument)
        if argument is packed:
            found, expected = (found[0].data, *found[1]), (expected[0].data, *expected[1])
        elif kind is lstm_ext.LSTM:
            found, expected = (found[0], *found[1]), (expected[0], *expected[1])
        flat, right = list(found), list(expected)
        assert [t.dtype for t in flat] == [t.dtype for t in right]
        torch.testing.assert_close(flat, right, rtol=0.02, atol=0.02)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("low", HALVES)
@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "how", [{}, {"keep_weights": False}, {"weights": "int8"}, {"weights": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("kind", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_autocast_of_other_dtypes_than_its_own(kind, how, own, low):
    """What comes from another layer under autocast has the lower precision."""
    module = kind(3, 4, dtype=own).eval()
    if "weights" in how and own != torch.float32:
        pytest.skip("stored so only of float32")
    expected_of = copy.deepcopy(module)
    frozen = lstm_ext.freeze(module, **how)
    dtypes = [torch.float32, torch.float64, *HALVES]
    state = (2, 4) if kind is lstm_ext.LSTMCell else (1, 2, 4)
    for given, of_states in itertools.product(dtypes, [None, *dtypes]):
        x = torch.randn(2, 3) if kind is lstm_ext.LSTMCell else torch.randn(5, 2, 3)
        hx = None if of_states is None else tuple(torch.randn(2, *state).to(of_states))
        found = []
        for m in (expected_of, frozen):
            with torch.no_grad(), torch.autocast("cpu", low):
                try:
                    out = m(x.to(given), hx)
                    found.append(list(out if kind is lstm_ext.LSTMCell else (out[0], *out[1])))
                except RuntimeError as error:
                    found.append(type(error))
        expected, mine = found
        if not isinstance(expected, list):
            assert mine is expected, (given, of_states)
            continue
        assert isinstance(mine, list), (given, of_states)
        assert [t.dtype for t in mine] == [t.dtype for t in expected], (given, of_states)
        torch.testing.assert_close(mine, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("how", [{}, {"keep_weights": False}, {"weights": "int8"}], ids=str)
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"peephole": True, "bidirectional": True}], ids=identify
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_by_torch_jit(options, how):
    """For other lengths and batches than it was traced with, too."""
    frozen = lstm_ext.freeze(lstm_ext.LSTM(5, 9, **options).eval(), **how)
    layers, file = frozen.num_layers * (1 + frozen.bidirectional), io.BytesIO()
    states = tuple(torch.randn(2, layers, 3, 9))
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(frozen, (torch.randn(4, 3, 5),)), file)
        file.seek(0)
        traced = torch.jit.load(file)
        for shape in ((4, 3, 5), (7, 2, 5), (1, 1, 5), (2, 30, 5)):
            x = torch.randn(shape)
            torch.testing.assert_close(traced(x), frozen(x), rtol=0, atol=0)
        x = torch.randn(3, 3, 5)
        with_states = torch.jit.trace(frozen, (torch.randn(3, 3, 5), states))
        hx = tuple(torch.randn(2, layers, 3, 9))
        torch.testing.assert_close(with_states(x, hx), frozen(x, hx), rtol=0, atol=0)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(5, 9, 2, bidirectional=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0])[0]


@pytest.mark.filterwarnings("ignore")
def test_traced_by_torch_jit_with_a_packed_sequence():
    frozen = lstm_ext.freeze(Padded().eval())
    with torch.no_grad():
        traced = torch.jit.trace(frozen, (torch.randn(4, 3, 5), torch.tensor([2, 4, 1])))
        for lengths in ([2, 4, 1], [4, 1, 3, 2, 2], [1, 4]):
            example = torch.randn(4, len(lengths), 5), torch.tensor(lengths)
            torch.testing.assert_close(traced(*example), frozen(*example), rtol=0, atol=0)
