"""Frozen modules that keep no plain weights: lstm_ext.freeze(.., keep_weights=False)."""

import copy
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import types
import weakref

import pytest
import torch
from layers import OPTIONS, identify
from limits import slow, slow_but, slow_where
from measure import DTYPES
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext import _frozen_weights, _ops

WEIGHTS = {
    "whole": {},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int8-int16": {"weights": "int8", "activations": "int16"},
}
KINDS = [lstm_ext.LSTM, lstm_ext.LSTMCell]
FREED = r"lstm_ext\.freeze\(\.\., keep_weights=False\) freed its plain weights"


def freed(module, **how):
    return lstm_ext.freeze(module.eval(), keep_weights=False, **how)


def both(module, **how):
    """Frozen with plain weights and without."""
    return lstm_ext.freeze(copy.deepcopy(module).eval(), **how), freed(module, **how)


def tensors_in(root):
    """Bytes of every storage that can be reached from an object, by its address."""
    found, seen, left = {}, set(), [root]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        left += gc.get_referents(value)
    return found


# Numbers


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("options", [*OPTIONS, {"peephole": True}], ids=identify)
@pytest.mark.parametrize(("L", "N", "I", "H"), [(7, 1, 9, 40), (5, 3, 17, 8), (3, 60, 5, 33)])
def test_same_bits(L, N, I, H, options, kind):
    lstm = lstm_ext.LSTM(I, H, **options)
    kept, alone = both(lstm, **WEIGHTS[kind])
    x = torch.randn((N, L, I) if lstm.batch_first else (L, N, I))
    lengths = torch.randint(1, L + 1, (N,))
    packed = pack_padded_sequence(x, lengths, lstm.batch_first, enforce_sorted=False)
    mask = torch.rand(x.shape[:2]) < 0.3
    states = torch.randn(2, lstm.num_layers * (1 + lstm.bidirectional), N, H)
    with torch.no_grad():
        for given, hx, reset in (
            (x, None, None),
            (x, tuple(states), None),
            (x, None, mask),
            (packed, None, None),
            (x[0], None, None),
        ):
            a, b = alone(given, hx, reset=reset), kept(given, hx, reset=reset)
            first = [t.data if given is packed else t for t in (a[0], b[0])]
            assert torch.equal(*first)
            assert torch.equal(a[1][0], b[1][0])
            assert torch.equal(a[1][1], b[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype(kind, dtype):
    kept, alone = both(kind(5, 21, dtype=dtype))
    x = torch.randn(6, 3, 5).to(dtype)
    with torch.no_grad():
        if kind is lstm_ext.LSTM:
            assert torch.equal(alone(x)[0], kept(x)[0])
        else:
            torch.testing.assert_close(alone(x[0]), kept(x[0]))
            torch.testing.assert_close(alone(x[0, 0]), kept(x[0, 0]))
        with torch.autocast("cpu"):
            assert alone(x[0])[0].dtype == kept(x[0])[0].dtype


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"peephole": True}], ids=identify)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_cell(kind, options):
    """The same bits, where the other has no plain weights at hand to compute few rows from."""
    kept, alone = both(lstm_ext.LSTMCell(30, 44, **options), **WEIGHTS[kind])
    with torch.no_grad():
        for N in (1, 3, 50, 300):
            x, h, c = torch.randn(N, 30), torch.randn(N, 44), torch.randn(N, 44)
            for hx in ((h, c), [h, c], None):
                a, b = alone(x, hx), kept(x, hx)
                if kind == "whole":
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
                    a = alone(x, hx)
                    packed = torch.ops.lstm_ext.lstm_layer_packed
                    buffers = alone._packed()
                    states = hx or (torch.zeros(N, 44), torch.zeros(N, 44))
                    peephole = (buffers[5], 1) if "peephole" in options else (None, 0)
                    args = (*buffers[:3], None, None, False, *peephole)
                    b = packed(x[None], *states, *args)[1:]
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[1], b[1])


# Memory

LARGE = 100_000  # bytes: of a matrix, and of no bias


def watch(module):
    """Weak references to all that a module's large tensors hold."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    large = [t for t in tensors if t.nbytes > LARGE]
    assert large
    return [(weakref.ref(t), StorageWeakRef(t.untyped_storage())) for t in large]


def assert_gone(watched):
    gc.collect()
    assert all(tensor() is None and storage.expired() for tensor, storage in watched)


SHARES = {"whole": 1, "bfloat16": 0.5, "int8": 0.25, "int8-int16": 0.25}
MODULES = {
    "LSTM": lambda: lstm_ext.LSTM(128, 128, num_layers=2, bidirectional=True),
    "no bias": lambda: lstm_ext.LSTM(128, 128, bias=False),
    "peephole": lambda: lstm_ext.LSTM(128, 128, peephole=True),
    "LSTMCell": lambda: lstm_ext.LSTMCell(128, 128),
    "peephole cell": lambda: lstm_ext.LSTMCell(128, 128, peephole=True),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_where(
        lambda name, kind: name != "LSTM" and (name, kind) != ("LSTMCell", "whole"),
        [*itertools.product(MODULES, WEIGHTS)],
    ),
)
def test_memory(name, kind):
    module = MODULES[name]()
    model = nn.Sequential(nn.Identity(), module)
    plain = sum(p.nbytes for n, p in module.named_parameters() if n.startswith(("w", "l")))
    watched = watch(module)
    assert sum(tensors_in(model).values()) >= plain  # what looks for tensors finds them
    kept = tensors_in(lstm_ext.freeze(copy.deepcopy(model).eval(), **WEIGHTS[kind]))
    assert sum(kept.values()) > (1 + SHARES[kind]) * plain
    del module
    freed(model, **WEIGHTS[kind])
    assert_gone(watched)
    after = tensors_in(model)
    # Scales and the corrections beside integers, and biases: 3 % of matrices of this size.
    assert SHARES[kind] * plain <= sum(after.values()) < (SHARES[kind] + 0.04) * plain
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(tensors_in(again).values()) == sum(after.values())
    assert len(pickle.dumps(model)) < (SHARES[kind] + 0.1) * plain


def weight_norm_by_hook(module, name):
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(module, name)


WRITERS = {
    "parametrization": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": weight_norm_by_hook,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruned": lambda m, name: prune.random_unstructured(m, name, 0.3),
    "pruned twice": lambda m, name: prune.l1_unstructured(WRITERS["pruned"](m, name), name, 0.3),
}


@pytest.mark.parametrize("kind", [lstm_ext.LSTM, *slow(lstm_ext.LSTMCell)])
@pytest.mark.parametrize("how", WRITERS)
def test_what_writes_weights_goes_with_them(how, kind):
    """The tensors, of the weight's size or twice it, that torch.nn.utils makes a weight of."""
    names = {lstm_ext.LSTM: "weight_hh_l0", lstm_ext.LSTMCell: "weight_hh"}
    model = nn.Sequential(WRITERS[how](kind(8, 128), names[kind]))
    watched = watch(model)
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model.eval()(x)
        plain = 4 * 128 * (8 + 128) * 4
        freed(model)
        assert_gone(watched)
        torch.testing.assert_close(model(x), expected)
        assert plain <= sum(tensors_in(model).values()) < 1.05 * plain
        again = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(again(x), expected)
    assert not list(model.parameters())


def test_what_else_the_module_has_stays():
    class Tagged(lstm_ext.LSTM):
        def __init__(self):
            super().__init__(3, 4)
            self.scale = nn.Parameter(torch.ones(2))
            self.head = nn.Linear(4, 2)
            self.register_buffer("steps", torch.zeros(3))

        def extra_repr(self):
            return "tagged"

    module = Tagged()
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    alone = freed(module)
    assert [n for n, _ in alone.named_parameters()] == ["scale", "head.weight", "head.bias"]
    assert alone.scale is module.scale
    assert alone.steps is module.steps
    assert alone.head is module.head
    with torch.no_grad():
        alone(torch.randn(2, 1, 3))
    assert seen == [1]
    assert repr(alone).startswith("FrozenLSTM(\n  tagged, frozen, plain weights freed")
    # And the module that was frozen, if it is still held, is as it was.
    assert len(list(module.parameters())) == 7
    module.train()(torch.randn(2, 1, 3))[0].sum().backward()
    assert module.weight_hh_l0.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_held_elsewhere_do_not_matter(kind):
    module = kind(3, 4)
    alone, x = freed(module), torch.randn(5, 3)
    with torch.no_grad():
        before = alone(x)
        for p in module.parameters():
            p.zero_()
        torch.testing.assert_close(alone(x), before, rtol=0, atol=0)


# Refusals


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("bias", [False, True])
def test_refusals(bias, weights, kind, whole):
    """Each says why; and nothing of the model has changed."""
    original = kind(3, 4, bias=bias).eval()
    state = original.state_dict()
    alone = freed(original, weights=weights)
    model = nn.Sequential(nn.Linear(3, 3), alone).eval() if whole else alone
    linear = copy.deepcopy(model[0].state_dict()) if whole else {}
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = model(x)
    for refused in (
        lambda m: m.train(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.float32),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to_empty(device="meta"),
        lambda m: m.load_state_dict({}),
        lambda m: m.load_state_dict(state, strict=False),
        lambda m: m.load_state_dict(state, assign=True),
    ):
        with pytest.raises(RuntimeError, match=f"a frozen module cannot.*{FREED}"):
            refused(model)
    with pytest.raises(RuntimeError, match=f"has no state dict.*{FREED}.*Save the state dict"):
        model.state_dict()
    with pytest.raises(RuntimeError, match=f"unfreeze: .* has no original any more.*{FREED}"):
        lstm_ext.unfreeze(model)
    with pytest.raises(RuntimeError, match=f"frozen_error: .* has no original.*{FREED}"):
        lstm_ext.frozen_error(model, x)
    with pytest.raises(RuntimeError, match=f"trace_gates: .* has no original.*{FREED}"):
        lstm_ext.trace_gates(alone, x)
    with pytest.raises(RuntimeError, match="for inference"):
        alone(x.clone().requires_grad_())
    for name in [*original._parameters, "all_weights", "original"]:
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'.*{FREED}"):
            getattr(alone, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        _ = alone.nothing
    with pytest.raises(ValueError, match="only frozen ones"):
        lstm_ext.freeze(model)
    # What changes nothing is not refused.
    assert model.eval().float().to("cpu").to(torch.float32).cpu() is model
    model.requires_grad_(False).share_memory().zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    if whole:
        torch.testing.assert_close(model[0].state_dict(), linear, rtol=0, atol=0)
        assert not any(m.training for m in model.modules())
    kept = lstm_ext.freeze(original)
    with pytest.raises(RuntimeError, match="a frozen module cannot be emptied"):
        kept.to_empty(device="cpu")


def test_unfreeze_puts_back_all_or_nothing():
    model = nn.ModuleDict({"kept": lstm_ext.LSTM(3, 4), "cell": lstm_ext.LSTMCell(3, 4)}).eval()
    model["kept"] = lstm_ext.freeze(model["kept"])
    freed(model)
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match=f"unfreeze: cell has no original.*{FREED}"):
        lstm_ext.unfreeze(model)
    assert dict(model.named_modules()) == before
    assert type(lstm_ext.unfreeze(model["kept"])) is lstm_ext.LSTM


def test_what_freeze_refuses_or_leaves_keeps_its_weights():
    for module in (
        lstm_ext.LSTM(3, 4, proj_size=2, device="meta"),
        lstm_ext.LSTM(3, 4, device="meta"),
    ):
        model = nn.Sequential(lstm_ext.LSTM(3, 3), module).eval()
        with pytest.raises(ValueError, match="float32 on meta"):
            freed(model)
        assert len(list(model.parameters())) == len(list(module.parameters())) + 4
        assert model.state_dict().keys() > {"0.weight_ih_l0"}
    with pytest.raises(RuntimeError, match="training mode"):
        lstm_ext.freeze(lstm_ext.LSTM(3, 4), keep_weights=False)

    class Doubled(lstm_ext.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    model = nn.ModuleList([Doubled(3, 4), lstm_ext.LSTM(3, 4)])
    with pytest.warns(UserWarning, match="left 0 as it is.*its weights stay too"):
        freed(model)
    assert [n for n, _ in model.named_parameters()] == [
        f"0.{n}" for n, _ in lstm_ext.LSTM(3, 4).named_parameters()
    ]


@pytest.mark.parametrize("wrong", [None, 1, "no"])
def test_keep_weights_is_a_bool(wrong):
    name = type(wrong).__name__
    with pytest.raises(TypeError, match=f"keep_weights should be of type bool, got: {name}"):
        lstm_ext.freeze(lstm_ext.LSTM(3, 4).eval(), keep_weights=wrong)


def caught(call):
    with torch.no_grad(), pytest.raises(Exception) as error:  # noqa: PT011 - compared by callers
        call()
    return error.type, str(error.value)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"peephole": True}], ids=identify)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_a_module_with_weights(kind, options):
    kept, alone = both(kind(3, 4, **options))
    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    if kind is lstm_ext.LSTMCell:
        x, h = x[0], h[0]
    for arguments in (
        (x[..., :2],),
        (x[..., None, None],),
        (x, (h[..., :3], h)),
        (x, (h[..., :1, :], h)),
        (x, h[0]),
        (x.double(),),
        (x, (h.double(), h)),
        ("x",),
    ):
        expected = caught(lambda given=arguments: kept(*given))
        assert caught(lambda given=arguments: alone(*given)) == expected


def test_options_that_torch_would_judge():
    """With a plain copy, torch computes or refuses; without, what it would refuse is refused."""
    alone, x = freed(lstm_ext.LSTM(3, 3, num_layers=2)), torch.randn(5, 2, 3)
    one = lstm_ext.freeze(lstm_ext.LSTM(3, 3).eval())
    with torch.no_grad():
        alone.bias = 1
        with pytest.raises(TypeError, match="cannot be called like this: bias is no bool"):
            alone(x)
        alone.bias = True
        alone.num_layers = 3
        with pytest.raises(RuntimeError, match="incorrect number of RNN parameters"):
            alone(x)
        alone.num_layers = 1
        one._buffers.update({k: alone._buffers[k] for k in one._packed_names})
        assert torch.equal(alone(x)[0], one(x)[0])


# Copies and pickles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", WEIGHTS)
def test_copies_and_pickles(how, kind):
    module = kind(9, 40, peephole=how == "bfloat16", bias=how != "int8-int16")
    model, x = nn.Sequential(freed(module, **WEIGHTS[how])), torch.randn(3, 9)

    def saved(**options):
        file = io.BytesIO()
        torch.save(model, file, **options)
        file.seek(0)
        return torch.load(file, weights_only=False)

    with torch.no_grad():
        expected = model(x)
        for again in (
            copy.deepcopy(model),
            copy.copy(model[0]),
            pickle.loads(pickle.dumps(model)),
            pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model)))),
            saved(),
            saved(_use_new_zipfile_serialization=False),
        ):
            torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
            with pytest.raises(RuntimeError, match=FREED):
                lstm_ext.unfreeze(again)
            with pytest.raises(RuntimeError, match=f"cannot be trained.*{FREED}"):
                again.train()
        deep = copy.deepcopy(model[0])
        model[0].packed_0[100:].zero_()  # a copy has its own
        torch.testing.assert_close(deep(x), expected, rtol=0, atol=0)


def test_a_pickle_is_not_loaded_to_another_device():
    file = io.BytesIO()
    torch.save(freed(lstm_ext.LSTM(3, 4)), file)
    file.seek(0)
    with pytest.raises(ValueError, match=r"unpickled module is on meta.*for the CPU"):
        torch.load(file, weights_only=False, map_location="meta")


LOADS = """
import sys, torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(x)[0], expected)
print("the same bits")
"""


@pytest.mark.parametrize("how", slow_but(["int8"], WEIGHTS))
def test_a_pickle_is_for_kernels_that_pack_alike(how, tmp_path):
    """Nothing but the kernels' name may tell: SSE2 and AVX2 pack the same numbers differently."""
    model, x = freed(lstm_ext.LSTM(9, 40, num_layers=2), **WEIGHTS[how]), torch.randn(3, 2, 9)
    with torch.no_grad():
        torch.save((model, x, model(x)[0]), tmp_path / "model.pt")

    def load(**variables):
        environment = {**os.environ, **variables}
        command = [sys.executable, "-c", LOADS, str(tmp_path / "model.pt")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    alike = load()
    assert alike.stdout == "the same bits\n", alike.stderr
    here = lstm_ext.build_info()["cpu_instruction_set"]
    if here == "DEFAULT":
        pytest.skip("this machine has no other kernels")
    other = load(ATEN_CPU_CAPABILITY="default")
    assert other.returncode != 0
    last = other.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"RuntimeError: this frozen module has weights that were packed for the {here} kernels, "
        "and cannot be used with the DEFAULT kernels here: lstm_ext.freeze(.., keep_weights=False)"
    )
    assert "Freeze the original here" in last


def test_a_pickle_of_another_layout_is_refused(monkeypatch):
    """As of a version of this package whose kernels have the same name and pack differently."""
    pickled = pickle.dumps(freed(lstm_ext.LSTM(3, 4)))
    _frozen_weights.layout_of.cache_clear()
    pack = _ops.lstm_layer_pack
    monkeypatch.setattr(_ops, "lstm_layer_pack", lambda *args: pack(*args).roll(1))
    try:
        with pytest.raises(RuntimeError, match=f"another version of lstm_ext.*{FREED}"):
            pickle.loads(pickled)
    finally:
        _frozen_weights.layout_of.cache_clear()
    monkeypatch.undo()
    pickle.loads(pickled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layout_is_known_by_a_small_layer(dtype):
    """Whatever memory it is packed into; and each type of weights has another."""
    layout = _frozen_weights.layout_of.__wrapped__
    kinds = range(4 if dtype == torch.float32 else 1)
    found = [layout(dtype, kind) for kind in kinds]
    assert len(set(found)) == len(found)
    for size in (10_000, 30_000, 50_000, 100_000, 200_000):
        dirt = [torch.full((size,), 255, dtype=torch.uint8) for _ in range(20)]
        del dirt
        assert [layout(dtype, kind) for kind in kinds] == found


# Tools


@pytest.mark.usefixtures("allow_rnn")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_exported(kind):
    alone, x = freed(kind(3, 4)), torch.randn(2, 3)
    x = x if kind is lstm_ext.LSTMCell else x[None]
    with torch.no_grad():
        compiled = torch.compile(alone, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), alone(x), rtol=0, atol=0)
        exported = torch.export.export(alone, (x,)).module()
        torch.testing.assert_close(exported(x), alone(x), rtol=0, atol=0)
