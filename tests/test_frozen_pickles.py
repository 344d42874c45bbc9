"""Frozen modules that keep their weights: copies and files, in every order of reading."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from limits import HUNG, slow
from torch import multiprocessing, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as weight_norm_by_hook

import lstm_ext
from lstm_ext import frozen as frozen_module

KINDS = [lstm_ext.LSTM, lstm_ext.LSTMCell]
HOWS = {
    "whole": {},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "freed": {"keep_weights": False},
}


def weight(module, kind):
    return module.weight_hh_l0 if kind is lstm_ext.LSTM else module.weight_hh


def frozen_of(kind, how="whole", **options):
    return lstm_ext.freeze(kind(9, 40, **options).eval(), **HOWS[how])


def saved(model, **options):
    file = io.BytesIO()
    torch.save(model, file, **options)
    return file.getvalue()


def older(model):
    """In the format whose reader makes all objects first, and reads their numbers then."""
    return saved(model, _use_new_zipfile_serialization=False)


def load(data, **options):
    return torch.load(io.BytesIO(data), **{"weights_only": False, **options})


def through_pickle(protocol):
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


def mapped(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", mmap=True, weights_only=False)


def loaded_safely(model, save):
    kinds = [frozen_module.FrozenLSTM, frozen_module.FrozenLSTMCell, *KINDS, nn.Sequential, set]
    with torch.serialization.safe_globals(kinds):
        return load(save(model), weights_only=True)


WAYS = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "copy": lambda model, _: nn.Sequential(copy.copy(model[0])),
    **{f"pickle-{k}": lambda model, _, k=k: through_pickle(k)(model) for k in range(2, 6)},
    "torch.save": lambda model, _: load(saved(model)),
    "mmap": mapped,
    "map_location": lambda model, _: load(saved(model), map_location="cpu"),
    "weights_only": lambda model, _: loaded_safely(model, saved),
    "older": lambda model, _: load(older(model)),
    "older-map_location": lambda model, _: load(older(model), map_location=torch.device("cpu")),
    "older-function": lambda model, _: load(older(model), map_location=lambda storage, _: storage),
    "older-twice": lambda model, _: load(older(load(older(model)))),
    "older-pickle": lambda model, _: pickle.loads(pickle.dumps(load(older(model)))),
    "older-deepcopy": lambda model, _: copy.deepcopy(load(older(model))),
}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("way", WAYS)
def test_same_bits(way, how, kind, tmp_path):
    model, x = nn.Sequential(frozen_of(kind, how)), torch.randn(3, 9)
    again = WAYS[way](model, tmp_path)
    with torch.inference_mode():
        expected = model(x), model(x[:1])
        for _ in range(2):  # at the first use, and from then on
            same((again(x), again(x[:1])), expected)
    # Not bound to the mode of the first use.
    assert not any(t.is_inference() for t in again[0]._packed() if t is not None)
    if how != "freed":
        assert list(again.state_dict()) == list(model.state_dict())
        assert type(lstm_ext.unfreeze(again)[0]) is kind


@pytest.mark.parametrize(
    "options", [{"peephole": True}, {"bias": False}, {"dtype": torch.float64}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_comes_back(kind, options):
    frozen = frozen_of(kind, **options)
    x = torch.randn(3, 9, dtype=options.get("dtype"))
    with torch.no_grad():
        for way in ("older", "torch.save", "deepcopy"):
            same(WAYS[way](nn.Sequential(frozen), None)(x), frozen(x))


@pytest.mark.parametrize(
    "name", ["layers", "weight_norm", "parametrization", "prune", "in two places"]
)
def test_what_else_models_are(name):
    lstm = lstm_ext.LSTM(9, 40, 2, bidirectional=name == "layers")
    if name == "weight_norm":
        with pytest.warns(FutureWarning):
            weight_norm_by_hook(lstm, "weight_hh_l1")
        with torch.no_grad():
            lstm.weight_hh_l1_g.mul_(2)
    elif name == "parametrization":
        parametrizations.weight_norm(lstm, "weight_hh_l1")
    elif name == "prune":
        prune.l1_unstructured(lstm, "weight_hh_l1", amount=0.5)
    model = nn.ModuleList([lstm, lstm] if name == "in two places" else [lstm]).eval()
    x = torch.randn(3, 9)
    with torch.no_grad():
        frozen = lstm_ext.freeze(model)
        expected = frozen[-1](x)
        for save in (older, saved):
            # torch pickles no module with a parametrization.
            copied = name == "parametrization"
            again = copy.deepcopy(frozen) if copied else load(save(frozen))
            same(again[-1](x), expected)
            assert (again[0] is again[-1]) == (frozen[0] is frozen[-1])
            if name == "in two places":
                assert again[0] is again[1]


# Weights that were written to


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_written_to_since_it_was_frozen(way, kind, tmp_path):
    """It goes on with the weights as they were, and so do its copies."""
    model, x = nn.Sequential(frozen_of(kind)), torch.randn(50, 9)
    with torch.no_grad():
        expected, few = model(x), model(x[:1])
        weight(model[0], kind).mul_(3)
        same((model(x), model(x[:1])), (expected, few))
        again = WAYS[way](model, tmp_path)
        same((again(x), again(x[:1])), (expected, few))
        assert torch.equal(weight(again[0], kind), weight(model[0], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_written_to_since_it_was_loaded(kind):
    """Read with the module they are packed at once; else before its first call."""
    frozen, x = frozen_of(kind), torch.randn(3, 9)
    with torch.no_grad():
        expected = frozen(x)
        for way in ("deepcopy", "pickle-2", "torch.save", "weights_only"):
            again = WAYS[way](nn.Sequential(frozen), None)[0]
            weight(again, kind).data.zero_()
            same(again(x), expected)
        again = load(older(frozen))
        weight(again, kind).data.zero_()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"not those that it was saved with.*unfreeze"):
                again(x)
        with pytest.raises(RuntimeError, match="not those that it was saved with"):
            again.to("cpu")
        plain = lstm_ext.unfreeze(again)
        torch.testing.assert_close(lstm_ext.freeze(plain)(x), plain(x))
        called = load(older(frozen))
        called(x)
        weight(called, kind).data.zero_()
        same(called(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_never_loaded(kind):
    frozen, x = frozen_of(kind), torch.randn(3, 9)
    data = saved(frozen)
    with torch.serialization.skip_data(), torch.no_grad():
        again = load(data)
    with torch.no_grad():
        for p in again.parameters():
            p.fill_(0.5)  # whatever memory had
        with pytest.raises(RuntimeError, match="or never loaded"):
            again(x)
        for p, q in zip(again.parameters(), frozen.parameters(), strict=True):
            p.copy_(q)
        same(again(x), frozen(x))


# The first use


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_call_of_many_threads(kind):
    frozen, x, found = frozen_of(kind), torch.randn(3, 9), []
    packed = 0
    pack = frozen_module._ops.lstm_layer_pack

    def counted(*arguments):
        nonlocal packed
        packed += 1
        return pack(*arguments)

    with torch.no_grad():
        expected = frozen(x)
    again = load(older(frozen))
    start = threading.Barrier(8)

    def call():
        start.wait()
        with torch.no_grad():
            found.append(again(x))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_module._ops, "lstm_layer_pack", counted)
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert packed == 1
    assert len(found) == 8
    for out in found:
        same(out, expected)


def first_uses(kind):
    x = torch.randn(5, 9)
    states = (torch.randn(5, 40), torch.randn(5, 40))
    yield lambda m: m(x)
    yield lambda m: m(x[:0]) if kind is lstm_ext.LSTMCell else m(x[:, None])
    if kind is lstm_ext.LSTMCell:
        yield lambda m: m(x[0])
        yield lambda m: m(x, states)
    else:
        yield lambda m: m(
            x[:, None], reset=torch.tensor([[False], [True], [False], [False], [True]])
        )
        yield lambda m: m(nn.utils.rnn.pack_sequence([x, x[:2]]))[0].data
    yield lambda m: m.share_memory()(x)
    yield lambda m: m.float()(x)
    if kind is lstm_ext.LSTM:
        yield lambda m: torch.func.vmap(m, in_dims=1, out_dims=0)(x[:, None])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_first_uses(kind, autocast):
    for use in first_uses(kind):
        frozen, x = frozen_of(kind), torch.randn(3, 9)
        again = load(older(frozen))
        with torch.no_grad():
            with torch.autocast("cpu", enabled=autocast):
                same(use(again), use(frozen))
            same(again(x), frozen(x))


@pytest.mark.usefixtures("allow_rnn")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_or_exported_before_its_first_call(kind):
    frozen, x = frozen_of(kind), torch.randn(2, 3, 9)
    x = x[0] if kind is lstm_ext.LSTMCell else x
    again = load(older(frozen))
    with torch.no_grad():
        with pytest.raises(Exception, match=r"call it once before torch\.compile"):
            torch.export.export(again, (x,))
        with pytest.raises(Exception, match=r"call it once before torch\.compile"):
            torch.compile(again, fullgraph=True, backend="eager")(x)
        torch._dynamo.reset()
        again(x)
        exported = torch.export.export(again, (x,)).module()
        compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
        for made in (exported, compiled):
            torch.testing.assert_close(made(x), frozen(x))


# Refused, or for other kernels


def test_the_older_format_with_weights_only_is_refused_by_torch():
    with pytest.raises(pickle.UnpicklingError, match="Only persistent_load of storage"):
        loaded_safely(frozen_of(lstm_ext.LSTM), older)


@pytest.mark.parametrize("save", [saved, older])
def test_another_device_is_refused_when_it_is_loaded(save):
    with pytest.raises(ValueError, match=r"unpickled module is on meta.*for the CPU"):
        load(save(frozen_of(lstm_ext.LSTM)), map_location="meta")


LOADS = """
import sys, torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(model(x)[0], expected)
print("the same numbers")
"""


@pytest.mark.parametrize(
    ("written_to", "zipped"), [(False, False), *slow((True, True), (False, True), (True, False))]
)
def test_for_other_kernels(written_to, zipped, tmp_path):
    """Plain weights are packed anew there; where those are others by now, it is refused."""
    model, x = frozen_of(lstm_ext.LSTM, num_layers=2), torch.randn(3, 2, 9)
    with torch.no_grad():
        file = tmp_path / "model.pt"
        expected = model(x)[0]
        if written_to:
            model.weight_hh_l1.mul_(3)
        torch.save((model, x, expected), file, _use_new_zipfile_serialization=zipped)
    if lstm_ext.build_info()["cpu_instruction_set"] == "DEFAULT":
        pytest.skip("this machine has no other kernels")
    other = subprocess.run(
        [sys.executable, "-c", LOADS, str(file)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if written_to:
        assert "its plain weights were written to since it was frozen" in other.stderr
    else:
        assert other.stdout == "the same numbers\n", other.stderr


class Whole(nn.Module):
    """Whose pickle begins inside: the LSTM refers to the frozen one that was made of it."""

    def __init__(self, lstm):
        super().__init__()
        lstm.user = [self]
        self.frozen = lstm_ext.freeze(lstm)


@pytest.mark.parametrize("save", [saved, older])
def test_a_pickle_that_begins_at_the_original(save):
    whole, x = Whole(lstm_ext.LSTM(9, 40).eval()), torch.randn(3, 9)
    again = load(save(whole.frozen.original)).user[0].frozen
    with torch.no_grad():
        same(again(x), whole.frozen(x))


def answer(to_child, to_parent):
    model, x = to_child.get()
    with torch.no_grad():
        to_parent.put([t.tolist() for t in (model(x)[0], model(x[:1])[0])])


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        (lstm_ext.LSTM, True),
        *slow((lstm_ext.LSTM, False), (lstm_ext.LSTMCell, False), (lstm_ext.LSTMCell, True)),
    ],
)
def test_another_process(kind, shared):
    frozen, x = frozen_of(kind), torch.randn(3, 9)
    if shared:
        frozen.share_memory()
    context = multiprocessing.get_context("spawn")
    to_child, to_parent = context.Queue(), context.Queue()
    process = context.Process(target=answer, args=(to_child, to_parent))
    process.start()
    to_child.put((frozen, x))
    found = to_parent.get(timeout=HUNG)
    process.join()
    with torch.no_grad():
        assert found == [t.tolist() for t in (frozen(x)[0], frozen(x[:1])[0])]


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_of_older_versions(kind):
    """They have no hash, and names of packed weights that they do not have."""
    frozen, x = frozen_of(kind), torch.randn(3, 9)
    state = {**frozen.__getstate__(), "_packed_names": ["packed_0", "packed_1", "packed_2"]}
    del state["_expected"]
    again = type(frozen).__new__(type(frozen))
    again.__setstate__(state)
    with torch.no_grad():
        same(again(x), frozen(x))
        same(copy.deepcopy(again)(x), frozen(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_one_copy_of_the_weights(kind):
    module = kind(100, 200).eval()
    plain = len(saved(module))
    frozen = lstm_ext.freeze(module)
    assert len(saved(frozen)) < 1.1 * plain
