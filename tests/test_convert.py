"""lstm_ext.convert and revert: torch's modules inside a model made ours, and back."""

import abc
import copy
import functools
import io
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import lstm_ext


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.LSTMCell(8, 8, bias=False)])
        self.gru = nn.GRU(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        output, _ = self.encoder(x)
        h = output[:, -1]
        for cell in self.cells:
            h, _ = cell(h)
        return self.head(self.gru(h.unsqueeze(0))[0][0])


def kinds(model):
    return [type(m) for m in model.modules()]


def train(model, optimizer, steps, x, y):
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_there_and_back():
    model = Model()
    before = kinds(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    x = torch.randn(2, 5, 3)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lstm_ext.convert(model) is model
    assert type(model.encoder) is lstm_ext.LSTM
    assert [type(cell) for cell in model.cells] == [lstm_ext.LSTMCell] * 2
    assert type(model.gru) is nn.GRU
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    torch.testing.assert_close(model(x), expected)
    assert lstm_ext.revert(model) is model
    assert kinds(model) == before
    assert "checkpoint_every" not in vars(model.encoder)
    torch.testing.assert_close(model(x), expected)


def test_a_running_optimizer_goes_on():
    torch.manual_seed(0)
    ours = Model()
    torchs = copy.deepcopy(ours)
    x, y = torch.randn(4, 5, 3), torch.randn(4, 2)
    curves = []
    for model, change in ((torchs, lambda m: m), (ours, lstm_ext.convert)):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        curve = train(model, optimizer, 5, x, y)
        change(model)
        curve += train(model, optimizer, 15, x, y)
        if change is lstm_ext.convert:
            lstm_ext.revert(model)
        curves.append(curve + train(model, optimizer, 5, x, y))
    torch.testing.assert_close(
        torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-4, atol=1e-5
    )
    assert curves[0][-1] < 0.7 * curves[0][0]


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_the_module_itself(kind):
    module = getattr(nn, kind)(3, 4, dtype=torch.float64).eval()
    handles = []
    handle = module.register_forward_hook(lambda *_: handles.append(1))
    assert lstm_ext.convert(module) is module
    assert type(module) is getattr(lstm_ext, kind)
    assert not module.training
    assert module.weight_hh_l0.dtype == torch.float64 if kind == "LSTM" else True
    module(torch.randn(2, 3, dtype=torch.float64))
    handle.remove()
    lstm_ext.revert(module)
    module(torch.randn(2, 3, dtype=torch.float64))
    assert handles == [1]
    assert type(module) is getattr(nn, kind)


def test_twice_is_once():
    model = lstm_ext.convert(lstm_ext.convert(Model()))
    assert type(model.encoder) is lstm_ext.LSTM
    assert kinds(lstm_ext.revert(lstm_ext.revert(model))) == kinds(Model())


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_parametrized_and_pruned(norm):
    model = nn.ModuleList([norm(nn.LSTM(3, 4), "weight_hh_l0"), nn.LSTMCell(3, 4)])
    model.eval()  # training would change spectral_norm's vectors at every call
    prune.l1_unstructured(model[1], "weight_ih", amount=0.5)
    x = torch.randn(2, 3)
    expected = [m(x) for m in model]
    keys = list(model.state_dict())
    lstm_ext.convert(model)
    assert isinstance(model[0], lstm_ext.LSTM)
    assert parametrize.is_parametrized(model[0], "weight_hh_l0")
    torch.testing.assert_close([m(x) for m in model], expected)
    assert list(model.state_dict()) == keys
    lstm_ext.revert(model)
    assert isinstance(model[0], nn.LSTM)
    torch.testing.assert_close([m(x) for m in model], expected)
    parametrize.remove_parametrizations(lstm_ext.convert(model)[0], "weight_hh_l0")
    assert type(model[0]) is lstm_ext.LSTM
    torch.testing.assert_close(model[0](x), expected[0])


class Peephole(nn.LSTMCell):
    def forward(self, input, hx=None):
        return nn.LSTMCell.forward(self, input, hx)


class Own(lstm_ext.LSTM):
    pass


def test_what_is_left_is_said():
    model = nn.ModuleDict({"peephole": Peephole(3, 4), "lstm": nn.LSTM(3, 4)})
    with pytest.warns(
        UserWarning, match=r"convert left peephole \(Peephole\).*nn\.LSTMCell"
    ) as seen:
        lstm_ext.convert(model)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert type(model["peephole"]) is Peephole
    assert type(model["lstm"]) is lstm_ext.LSTM
    model = nn.ModuleDict({"own": Own(3, 4), "frozen": lstm_ext.freeze(lstm_ext.LSTM(3, 4).eval())})
    with pytest.warns(UserWarning, match="revert left") as seen:
        lstm_ext.revert(model)
    assert [str(w.message).split(" as it is: ")[0] for w in seen] == [
        "lstm_ext.revert left own (Own)",
        "lstm_ext.revert left frozen (FrozenLSTM)",
    ]
    with pytest.warns(UserWarning, match="loses checkpoint_every=4"):
        assert type(lstm_ext.revert(lstm_ext.LSTM(3, 4, checkpoint_every=4))) is nn.LSTM


def test_copies_and_state_dicts():
    model = lstm_ext.convert(Model())
    twin = copy.deepcopy(model)
    assert type(twin.encoder) is lstm_ext.LSTM
    plain = Model()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(plain(x), twin(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_and_trace_by_way_of_revert():
    model = lstm_ext.convert(Model()).eval()
    x = torch.randn(2, 5, 3)
    expected = model(x)
    lstm_ext.revert(model)
    for compiled in (torch.jit.script(model), torch.jit.trace(model, x)):
        torch.testing.assert_close(compiled(x), expected)
    with pytest.warns(UserWarning, match=r"encoder .*compiled by torch\.jit"):
        lstm_ext.convert(torch.jit.script(model))


def test_fx_with_our_modules_as_leaves():
    """torch.fx takes what is in torch.nn as one node; ours, where a tracer is told to."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            ours = isinstance(module, (lstm_ext.LSTM, lstm_ext.LSTMCell))
            return ours or super().is_leaf_module(module, name)

    model = lstm_ext.convert(Model())
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["encoder", "cells.0", "cells.1", "gru", "head"]
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(lstm_ext.revert(model))(x), traced(x))


# Subclasses


class Forgetful(nn.LSTM):
    def reset_parameters(self):
        super().reset_parameters()
        nn.init.ones_(self.bias_ih_l0.data[4:8])


class Scaled(Forgetful):
    def forward(self, input, hx=None):
        output, state = super().forward(2 * input, hx)
        return output + 1, state


class WeightDropped(nn.LSTM):
    """The usual weight drop: the weight is no parameter, and is written at each call."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.raw = nn.Parameter(self.weight_hh_l0.detach().clone())
        del self._parameters["weight_hh_l0"]
        self.weight_hh_l0 = self.raw.detach()

    def forward(self, *arguments):
        self.weight_hh_l0 = nn.functional.dropout(self.raw, 0.5, self.training)
        return super().forward(*arguments)


class NamedBase(nn.LSTM):
    def forward(self, input, hx=None):
        return nn.LSTM.forward(self, input, hx)


class Mixed(NamedBase, nn.Module):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


class ByTheModule(nn.LSTM):
    def forward(self, input, hx=None):
        parent = super(sys.modules[__name__].ByTheModule, self)
        return parent.forward(input, hx)


class ForgetfulCell(nn.LSTMCell):
    def forward(self, input, hx=None):
        def step():
            return super(ForgetfulCell, self).forward(input, hx)

        return step()


def operators(module, *arguments):
    """The names of our operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(*arguments)
    return {e.key for e in profile.key_averages() if e.key.startswith("lstm_ext::")}


@pytest.mark.parametrize("kind", [Forgetful, Scaled, WeightDropped, ByTheModule, ForgetfulCell])
def test_subclasses_that_use_the_forward_of_their_base(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4))
    module = model[0]
    x = torch.randn(5, 3)

    def called(m):
        torch.manual_seed(1)
        out = m(x)
        loss = out[0].square().sum()
        return [out[0], *torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)]

    expected = called(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.convert(model)
    ours = lstm_ext.LSTMCell if kind is ForgetfulCell else lstm_ext.LSTM
    assert isinstance(module, kind)
    assert isinstance(module, ours)
    assert type(module).__name__ == kind.__name__
    assert operators(model, x)
    with torch.no_grad():
        module(x)  # no weight that was written is part of a graph, which could not be copied
    joined = type(module)
    copies = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    file = io.BytesIO()
    torch.save(module, file)
    copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for copied in copies:
        assert type(copied) is joined
        torch.testing.assert_close(called(copied), expected)
        assert type(lstm_ext.revert(copied)) is kind
        torch.testing.assert_close(called(copied), expected)


class CallsOtherThings(nn.LSTM):
    """Both words, but not super().forward."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.other = nn.Linear(3, 4)

    def forward(self, input, hx=None):
        super().flatten_parameters()
        return self.other.forward(input), hx


@pytest.mark.parametrize("kind", [NamedBase, Mixed, CallsOtherThings])
def test_subclasses_that_replace_forward_are_left(kind):
    model = nn.ModuleDict({"own": kind(3, 4)})
    with pytest.warns(UserWarning, match=r"convert left own \(\w+\).*super\(\)\.forward"):
        lstm_ext.convert(model)
    assert type(model["own"]) is kind


def test_a_parametrized_subclass():
    module = weight_norm(Forgetful(3, 4), "weight_hh_l0")
    x = torch.randn(5, 3)
    expected = module(x)
    lstm_ext.convert(module)
    assert isinstance(module, Forgetful)
    assert isinstance(module, lstm_ext.LSTM)
    torch.testing.assert_close(module(x), expected)
    lstm_ext.revert(module)
    assert not isinstance(module, lstm_ext.LSTM)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is Forgetful
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell, Forgetful, lstm_ext.LSTM])
def test_isinstance_of_torchs_class_after_everything(kind):
    module = lstm_ext.convert(kind(3, 4))
    base = nn.LSTMCell if kind is nn.LSTMCell else nn.LSTM
    name = "weight_hh" if base is nn.LSTMCell else "weight_hh_l0"
    frozen = lstm_ext.freeze(copy.deepcopy(module).eval())
    normed = spectral_norm(copy.deepcopy(module), name)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), frozen, normed):
        assert isinstance(m, base)
    assert isinstance(lstm_ext.revert(module), base)


# Forwards that were kept somewhere


def by_partial(m):
    old = m.forward
    m.forward = functools.partial(lambda *a: old(*a))


def by_closure(m):
    old = m.forward

    @functools.wraps(old)
    def forward(*arguments, **options):
        return old(*arguments, **options)

    m.forward = forward


def like_accelerate(m):
    def new_forward(module, *arguments, **options):
        return module._old_forward(*arguments, **options)

    m._old_forward = m.forward
    m.forward = functools.update_wrapper(functools.partial(new_forward, m), m._old_forward)


def as_it_was(m):
    m.forward = m.forward


class Calling:
    def __init__(self, old):
        self.old = old

    def __call__(self, *arguments):
        return self.old(*arguments)


def by_an_object(m):
    m.forward = Calling(m.forward)


def by_a_list(m):
    kept = [m.forward]
    m.forward = lambda *a: kept[0](*a)


def by_a_dict_in_a_tuple(m):
    m.kept = ({"old": m.forward}, None)
    m.forward = lambda *a: m.kept[0]["old"](*a)


KEPT = [
    by_partial, by_closure, like_accelerate, as_it_was, by_an_object, by_a_list,
    by_a_dict_in_a_tuple,
]  # fmt: skip


@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell, Scaled])
@pytest.mark.parametrize("keep", KEPT)
def test_forwards_of_the_instance(keep, kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4))
    keep(model[0])
    x = torch.randn(5, 3)
    expected = model(x)
    with warnings.catch_warnings():
        # Of a subclass, its own forward was kept, which calls ours through super().
        warnings.simplefilter("ignore" if kind is Scaled else "error")
        lstm_ext.convert(model)
    assert operators(model, x)
    torch.testing.assert_close(model(x), expected)
    lstm_ext.revert(model)
    assert not operators(model, x)
    torch.testing.assert_close(model(x), expected)


def test_a_forward_that_cannot_be_followed_is_told_of():
    m = nn.LSTM(3, 4)
    m.forward = functools.lru_cache(m.forward)
    with pytest.warns(UserWarning, match="may not run lstm_ext's forward.*before that"):
        lstm_ext.convert(m)


KEEPERS = {
    "itself": lambda method: method,
    "partial": lambda method: functools.partial(method, hx=None),
    "list": lambda method: [method],
    "tuple": lambda method: (method,),
    "dict": lambda method: [{"run": method}],
    "object": lambda method: [Calling(method)],
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell])
def test_bound_methods_in_other_modules(kind, keep):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(3, 4)
            self.run = keep(self.rnn.forward)

        def forward(self, x):
            run = self.run
            while isinstance(run, (list, tuple)):
                run = run[0]
            return (run["run"] if isinstance(run, dict) else run)(x)[0]

    model, x = Model(), torch.randn(5, 3)
    expected = model(x)
    lstm_ext.convert(model)
    assert operators(model, x)
    torch.testing.assert_close(model(x), expected)
    lstm_ext.revert(model)
    assert not operators(model, x)
    torch.testing.assert_close(model(x), expected)


HIDDEN = {
    "list": lambda m: [m],
    "tuple in a dict": lambda m: {"a": (m,)},
    "closure": lambda m: lambda x: m(x),
    "module": lambda m: [nn.Sequential(m)],
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
def test_an_lstm_that_is_no_module_of_the_model_is_told_of(hide, capsys):
    hidden = nn.LSTM(3, 4)
    model = nn.Sequential(nn.LSTM(3, 4))
    model[0].others = hide(hidden)
    with pytest.warns(UserWarning, match=r"left 0.others \(.*none of its modules; convert it"):
        lstm_ext.convert(model, report=True)
    assert "0.others" in capsys.readouterr().out
    assert type(hidden) is nn.LSTM
    # Not of one that is, or that is ours, or of none.
    shown = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 4))
    shown[1].others = hide(shown[0])
    converted = nn.Sequential(nn.LSTM(3, 4))
    converted[0].others = hide(lstm_ext.LSTM(3, 4)), hide(nn.Linear(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.convert(shown)
        lstm_ext.convert(converted)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.LSTMCell])
def test_modules_that_were_compiled(kind):
    torch._dynamo.reset()
    module, x = kind(3, 4), torch.randn(5, 3)
    module.compile(backend="aot_eager")
    expected = module(x)
    lstm_ext.convert(module)
    torch.testing.assert_close(module(x), expected)
    assert operators(module, x)


# What is said


def test_nothing_to_convert_is_said():
    with pytest.warns(UserWarning, match="found no torch.nn.LSTM.*Sequential"):
        lstm_ext.convert(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_and_other_lstms_are_said():
    quantized = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM}, dtype=torch.qint8
    )
    with pytest.warns(UserWarning, match=r"convert left 0 \(LSTM\).*quantized; convert"):
        lstm_ext.convert(quantized)

    class HandMadeLSTM(nn.Module):
        def __init__(self):
            super().__init__()
            self.gates = nn.Linear(3, 16)

    with pytest.warns(UserWarning, match=r"left HandMadeLSTM.*does not derive from torch"):
        lstm_ext.convert(HandMadeLSTM())

    class LSTMTagger(nn.Module):
        """Named so, but only holds one."""

        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.convert(LSTMTagger())


def test_report(capsys):
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": NamedBase(3, 4), "c": lstm_ext.LSTMCell(3, 4)})
    with pytest.warns(UserWarning, match="left b"):
        lstm_ext.convert(model, report=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lstm_ext.convert:"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == ["a", "b", "c"]
    assert lines[1].endswith("converted")
    assert "left as it is" in lines[2]
    assert lines[3].endswith("already")
    lstm_ext.convert(nn.LSTM(3, 4), report=True)
    assert "(the model itself): LSTM: converted" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="revert left frozen"):
        lstm_ext.revert(
            nn.ModuleDict({"frozen": lstm_ext.freeze(lstm_ext.LSTM(3, 4).eval())}), report=True
        )
    assert "frozen: FrozenLSTM: left as it is" in capsys.readouterr().out


class SkipsEmpty(abc.ABC, nn.RNNBase):
    """As pytorch-forecasting has it: the forward of a base that stands in front of nn.LSTM."""

    @abc.abstractmethod
    def empty(self, x): ...

    def forward(self, x, hx=None, lengths=None):
        return self.empty(x) if lengths is not None and not any(lengths) else super().forward(x, hx)


class Skips(SkipsEmpty, nn.LSTM):
    def empty(self, x):
        return x.new_zeros(*x.shape[:-1], self.hidden_size), None


class DropsWeights(nn.Module):
    """As fastai has it: a tensor in the place of a parameter, written at every call."""

    def __init__(self, module, name="weight_hh_l0"):
        super().__init__()
        self.module, self.name = module, name
        self.raw = nn.Parameter(getattr(module, name).data)
        delattr(module, name)
        setattr(module, name, self.raw.clone())
        module.flatten_parameters = lambda: None

    def forward(self, x):
        setattr(self.module, self.name, nn.functional.dropout(self.raw, 0.5, self.training))
        return self.module(x)


@pytest.mark.parametrize("make", [lambda: Skips(3, 4), lambda: DropsWeights(nn.LSTM(3, 4))])
def test_modules_as_published_packages_have_them(make):
    x, gradients = torch.randn(5, 2, 3), []
    for change in (lambda model: model, lstm_ext.convert):
        torch.manual_seed(0)
        model = make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            change(model)
        lstms = [m for m in model.modules() if isinstance(m, lstm_ext.LSTM)]
        assert len(lstms) == (change is lstm_ext.convert)
        torch.manual_seed(1)
        with torch.profiler.profile() as profiler:
            output, _ = model(x)
            output.square().sum().backward()
        assert any("lstm_ext::" in e.name for e in profiler.events()) == len(lstms)
        gradients.append([output.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])
    if isinstance(model, Skips):
        assert model(x, lengths=[0, 0])[1] is None
    else:
        with pytest.raises(ValueError, match="weight_hh_l0 is not a parameter"):
            lstm_ext.freeze(model.eval())
