"""lstm_ext.replacing: what others build inside the block is ours, and nothing else changes."""

import copy
import functools
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import LSTM as TORCHS_LSTM  # what code that was imported before holds

import lstm_ext

INITS = {cls: vars(cls)["__init__"] for cls in (nn.LSTM, nn.LSTMCell)}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    for cls, init in INITS.items():
        assert vars(cls)["__init__"] is init
        assert type(cls(2, 3)) is cls


class Model(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.encoder = TORCHS_LSTM(3, 4, 2, bidirectional=True, dropout=0.1, device=device)
        self.cells = nn.ModuleList([nn.LSTMCell(8, 8, device=device) for _ in range(2)])
        self.gru = nn.GRU(8, 8, device=device)

    def forward(self, x):
        h = self.encoder(x)[0][-1]
        for cell in self.cells:
            h, _ = cell(h)
        return self.gru(h.unsqueeze(0))[0]


def lstms(model):
    return [m for m in model.modules() if isinstance(m, (nn.LSTM, nn.LSTMCell))]


OURS = [lstm_ext.LSTM, lstm_ext.LSTMCell, lstm_ext.LSTMCell]
TORCHS = [nn.LSTM, nn.LSTMCell, nn.LSTMCell]


def test_a_model_of_somebody_else():
    torch.manual_seed(0)
    theirs = Model().eval()
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lstm_ext.replacing():
            mine = Model().eval()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [type(m) for m in lstms(mine)] == OURS
    assert type(mine.gru) is nn.GRU
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for p, expected in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, expected)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(mine(x), theirs(x))


def test_a_module_is_as_if_built_by_its_own_name():
    with lstm_ext.replacing():
        torch.manual_seed(0)
        made = nn.LSTM(3, 4, batch_first=True, proj_size=2, dtype=torch.float64)
    torch.manual_seed(0)
    own = lstm_ext.LSTM(3, 4, batch_first=True, proj_size=2, dtype=torch.float64)
    assert vars(made).keys() == vars(own).keys()
    assert made.checkpoint_every is None
    for name, p in own.named_parameters():
        assert torch.equal(getattr(made, name), p)
    # Copied, pickled and loaded outside, it stays one of ours.
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is lstm_ext.LSTM


def test_loaded_onto_meta_first():
    """As from_pretrained() does: built without memory, then filled."""
    state = Model().state_dict()
    with lstm_ext.replacing(), torch.device("meta"):
        model = Model()
    model.load_state_dict(state, assign=True)
    assert [type(m) for m in lstms(model)] == OURS
    expected = Model()
    expected.load_state_dict(state)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(model.eval()(x), expected.eval()(x))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell])
def test_errors_are_torchs(cls):
    def error(*arguments, **options):
        with pytest.raises((TypeError, ValueError)) as raised:
            cls(*arguments, **options)
        return type(raised.value), str(raised.value)

    calls = [((3,), {}), ((3, 4), {"hidden": 1}), ((3, 4), {"peephole": True}), (("a", 4), {})]
    expected = [error(*a, **o) for a, o in calls]
    with pytest.warns(UserWarning, match="was built"), lstm_ext.replacing():
        assert [error(*a, **o) for a, o in calls] == expected


def test_nested_and_after_exceptions():
    with lstm_ext.replacing():
        with lstm_ext.replacing():
            assert type(nn.LSTM(2, 3)) is lstm_ext.LSTM
        assert type(nn.LSTM(2, 3)) is lstm_ext.LSTM
        with pytest.raises(ZeroDivisionError), lstm_ext.replacing():
            _ = 1 / 0
        assert type(nn.LSTMCell(2, 3)) is lstm_ext.LSTMCell
    assert type(nn.LSTM(2, 3)) is nn.LSTM


def test_an_outer_block_counts_what_an_inner_one_builds():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lstm_ext.replacing(), lstm_ext.replacing():
            nn.LSTM(2, 3)


def test_an_exception_comes_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), lstm_ext.replacing():
            _ = 1 / 0


def test_as_a_decorator():
    @lstm_ext.replacing()
    def build():
        return nn.LSTM(2, 3)

    assert [type(build()) for _ in range(2)] == [lstm_ext.LSTM] * 2
    assert type(nn.LSTM(2, 3)) is nn.LSTM


def test_other_threads_build_torchs():
    inside, built, left = threading.Event(), threading.Event(), threading.Event()
    kinds = {}

    def other():
        inside.wait()
        kinds["outside, the other inside"] = type(nn.LSTM(2, 3))
        with lstm_ext.replacing():
            kinds["both inside"] = type(nn.LSTM(2, 3))
            built.set()
            left.wait()
            kinds["inside, the other outside"] = type(nn.LSTM(2, 3))
        kinds["none inside"] = type(nn.LSTM(2, 3))

    thread = threading.Thread(target=other)
    thread.start()
    with lstm_ext.replacing():
        inside.set()
        built.wait()
        kinds["here inside"] = type(nn.LSTM(2, 3))
    kinds["here outside, the other inside"] = type(nn.LSTM(2, 3))
    left.set()
    thread.join()
    assert kinds == {
        "outside, the other inside": nn.LSTM,
        "both inside": lstm_ext.LSTM,
        "here inside": lstm_ext.LSTM,
        "here outside, the other inside": nn.LSTM,
        "inside, the other outside": lstm_ext.LSTM,
        "none inside": nn.LSTM,
    }


def test_many_threads():
    wrong, start = [], threading.Barrier(8)

    def work(inside):
        start.wait()
        for _ in range(100):
            if inside:
                with lstm_ext.replacing():
                    kind = type(nn.LSTMCell(2, 3))
            else:
                kind = type(nn.LSTMCell(2, 3))
            if kind is not (lstm_ext.LSTMCell if inside else nn.LSTMCell):
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(k % 2 == 0,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_generator_that_another_thread_ends():
    def building():
        with lstm_ext.replacing():
            yield type(nn.LSTM(2, 3))

    generator = building()
    assert next(generator) is lstm_ext.LSTM
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert type(nn.LSTM(2, 3)) is nn.LSTM


class Wrapped(nn.LSTM):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.note = "mine"

    def extra_repr(self):
        return self.note

    def forward(self, input, hx=None):
        return super().forward(input, hx)[0]


class Scaled(nn.LSTMCell):
    def forward(self, input, hx=None):
        return 2 * input, hx


class OfOurs(lstm_ext.LSTM):
    pass


def test_subclasses_stay_and_are_named():
    with warnings.catch_warnings(record=True) as caught, lstm_ext.replacing():
        warnings.simplefilter("always")
        kept = [Wrapped(2, 3), Wrapped(2, 3), Scaled(2, 3)]
        ours = [OfOurs(2, 3), lstm_ext.LSTMCell(2, 3)]
    assert [type(m) for m in kept] == [Wrapped, Wrapped, Scaled]
    assert [type(m) for m in ours] == [OfOurs, lstm_ext.LSTMCell]
    first, second = (str(w.message) for w in caught)  # once for each class
    assert first == (
        "lstm_ext.replacing left Wrapped as it is: its class derives from nn.LSTM; "
        "lstm_ext.convert(model) takes it"
    )
    assert "left Scaled as it is: its forward is its own" in second
    assert {w.filename for w in caught} == {__file__}
    assert isinstance(lstm_ext.convert(kept[0]), lstm_ext.LSTM)


def test_a_subclass_in_nested_blocks_is_named_once():
    with warnings.catch_warnings(record=True) as caught, lstm_ext.replacing():
        warnings.simplefilter("always")
        with lstm_ext.replacing():
            Wrapped(2, 3)
        Wrapped(2, 3)
    assert len(caught) == 1
    assert "left Wrapped" in str(caught[0].message)


def test_nothing_built_is_said():
    with (
        pytest.warns(UserWarning, match=r"no torch.nn.LSTM or .* was built") as caught,
        lstm_ext.replacing(),
    ):
        nn.GRU(2, 3)
    assert [w.filename for w in caught] == [__file__]


def test_report(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lstm_ext.replacing(report=True):
            nn.LSTM(2, 3, num_layers=2)
            Wrapped(2, 3)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "lstm_ext.replacing:",
        "  LSTM(2, 3, num_layers=2): one of lstm_ext's",
        "  Wrapped(2, 3): left as it is: its class derives from nn.LSTM; lstm_ext.convert(model) "
        "takes it",
    ]


def test_copies_inside_keep_their_class():
    theirs = nn.LSTM(2, 3)
    file = io.BytesIO()
    torch.save(theirs, file)
    file.seek(0)
    with lstm_ext.replacing():
        assert type(nn.LSTM(2, 3)) is lstm_ext.LSTM
        copies = [copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))]
        copies.append(torch.load(file, weights_only=False))
    assert [type(m) for m in copies] == [nn.LSTM] * 3


def test_script():
    theirs = nn.Sequential(nn.LSTM(2, 3))
    with lstm_ext.replacing():
        mine = nn.Sequential(nn.LSTM(2, 3))
        scripted = torch.jit.script(theirs)
        with pytest.raises(RuntimeError, match=r"lstm_ext\.revert"):
            torch.jit.script(mine)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 2)
    torch.testing.assert_close(torch.jit.script(lstm_ext.revert(mine))(x), scripted(x))


def test_compile_and_export():
    torch._dynamo.reset()
    with lstm_ext.replacing():
        model = nn.ModuleDict({"layer": nn.LSTM(2, 3), "cell": nn.LSTMCell(2, 3)})
    x = torch.randn(4, 2, 2)
    for module, input in ((model["layer"], x), (model["cell"], x[0])):
        expected = module(input)
        torch.testing.assert_close(torch.compile(module, backend="aot_eager")(input), expected)
        program = torch.export.export(module, (input,))
        torch.testing.assert_close(program.module()(input), expected)
        assert any("lstm_ext" in str(node.target) for node in program.graph.nodes)
    torch._dynamo.reset()  # it would not try the layer again, where a switch allows it


def test_another_library_patches_the_constructor_too():
    """Inside the block and taken away inside, or around: each finds what it put there."""
    count = []

    def patched(old):
        @functools.wraps(old)
        def init(self, *arguments, **options):
            count.append(1)
            old(self, *arguments, **options)

        return init

    original = nn.LSTM.__init__
    nn.LSTM.__init__ = around = patched(original)
    try:
        with lstm_ext.replacing():
            ours = nn.LSTM.__init__
            nn.LSTM.__init__ = patched(ours)
            assert type(nn.LSTM(2, 3)) is lstm_ext.LSTM
            nn.LSTM.__init__ = ours
        assert nn.LSTM.__init__ is around
        assert len(count) == 2
    finally:
        nn.LSTM.__init__ = original


def test_another_library_leaves_later():
    """It puts its own on top, and takes it away after the block: ours below does nothing."""
    original = nn.LSTM.__init__

    def on_top(self, *arguments, **options):
        below(self, *arguments, **options)

    try:
        with lstm_ext.replacing():
            below = nn.LSTM.__init__
            nn.LSTM.__init__ = on_top
            assert type(nn.LSTM(2, 3)) is lstm_ext.LSTM
        assert nn.LSTM.__init__ is on_top
        assert type(nn.LSTM(2, 3)) is nn.LSTM
        nn.LSTM.__init__ = below
        assert type(nn.LSTM(2, 3)) is nn.LSTM
        with lstm_ext.replacing():
            assert type(nn.LSTM(2, 3)) is lstm_ext.LSTM
    finally:
        nn.LSTM.__init__ = original
