"""Published packages that know nothing of lstm_ext, on torch's modules and after convert().

    .venv/bin/python -m pytest -m published

They are an optional extra (``pip install -e ".[published]"``); plain test runs leave them out.
"""

import contextlib
import copy
import sys
import types
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lstm_ext

pytestmark = pytest.mark.published


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models: several threads only wait for each other, and long if the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def count(model):
    return sum(isinstance(m, (lstm_ext.LSTM, lstm_ext.LSTMCell)) for m in model.modules())


@contextlib.contextmanager
def operators():
    """Count the calls of operators that compute LSTMs: ours, and torch's."""
    calls = Counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield calls
    names = [event.name for event in profiler.events()]
    calls.update(n for n in names if n.startswith(("lstm_ext::", "aten::lstm", "aten::mkldnn_rnn")))


def assert_only_ours(calls):
    assert calls
    assert all(name.startswith("lstm_ext::") for name in calls), calls


def train_both(torchs, ours, loss_of, steps=20, **tolerances):
    """Train a model on torch's modules and the same one on ours: the same losses, all the way."""
    curves, calls = [], Counter()
    for model in (torchs, ours):
        torch.manual_seed(1)  # for dropout
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for step in range(steps):
            # The first alone: a profile of many small operations takes longer than they do.
            with operators() if step == 0 else contextlib.nullcontext(calls) as calls:
                loss = loss_of(model)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
        if model is torchs:
            assert calls
            assert not any(name.startswith("lstm_ext::") for name in calls), calls
        else:
            assert_only_ours(calls)
            assert any("backward" in name for name in calls), calls
    expected, found = curves
    np.testing.assert_allclose(found, expected, **{"rtol": 1e-3, "atol": 1e-5, **tolerances})
    assert expected[-1] < 0.9 * expected[0]


def recurrent_ppo(change, **options):
    """Train sb3-contrib's RecurrentPPO on the cart and pole; return it and what it logged."""
    RecurrentPPO = pytest.importorskip("sb3_contrib").RecurrentPPO
    from stable_baselines3.common.logger import Logger

    curve = []

    class Keep(Logger):
        def dump(self, step=0):
            curve.append({k: v for k, v in self.name_to_value.items() if "time" not in k})
            super().dump(step)

    model = RecurrentPPO(
        "MlpLstmPolicy",
        "CartPole-v1",
        n_steps=128,
        batch_size=128,
        n_epochs=10,
        learning_rate=3e-3,
        seed=3,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 32, **options},
    )
    model.set_logger(Keep(None, []))
    change(model.policy)
    model.learn(1280)  # then rounding flips an action, sooner or later
    return model, curve


# sb3-contrib's three ways to have a critic.
CRITICS = {"its own LSTM": {}, "shared": {"shared_lstm": True, "enable_critic_lstm": False}}


@pytest.mark.parametrize("critic", CRITICS)
def test_recurrent_ppo(critic, tmp_path):
    torchs, expected = recurrent_ppo(lambda policy: policy, **CRITICS[critic])
    ours, found = recurrent_ppo(lstm_ext.convert, **CRITICS[critic])
    assert count(torchs.policy) == 0
    assert count(ours.policy) == 1 + (critic == "its own LSTM")
    for name in ("train/loss", "train/value_loss", "rollout/ep_rew_mean"):
        mine, theirs = (
            [step[name] for step in curve if name in step] for curve in (found, expected)
        )
        assert len(theirs) >= 6
        np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-3)
    with operators() as calls:
        ours.predict(ours.get_env().reset(), None, np.array([True]))
    assert_only_ours(calls)
    rewards = [step["rollout/ep_rew_mean"] for step in expected if "rollout/ep_rew_mean" in step]
    assert rewards[-1] > 1.2 * rewards[0]  # it has learnt something
    # A file written by either is read by the package into torch's modules.
    ours.save(tmp_path / "ours")
    loaded = type(ours).load(tmp_path / "ours", device="cpu")
    assert count(loaded.policy) == 0
    observation, states = ours.get_env().reset(), None
    for step in range(5):
        start = np.array([step == 0])
        action, after = ours.predict(observation, states, start, deterministic=True)
        again, expected_after = loaded.predict(observation, states, start, deterministic=True)
        np.testing.assert_array_equal(action, again)
        np.testing.assert_allclose(after, expected_after, rtol=1e-4, atol=1e-5)
        states = after
        observation = ours.get_env().step(action)[0]


class GraphClassifier(nn.Module):
    """GraphSAGE with LSTM aggregation, jumping knowledge by an LSTM, and Set2Set as readout."""

    def __init__(self, features=5, hidden=8, classes=3):
        geometric = pytest.importorskip("torch_geometric.nn")
        super().__init__()
        self.convolutions = nn.ModuleList(
            [geometric.SAGEConv(n, hidden, aggr="lstm") for n in (features, hidden)]
        )
        self.jump = geometric.JumpingKnowledge("lstm", channels=hidden, num_layers=2)
        self.readout = geometric.Set2Set(hidden, processing_steps=3)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x, edges, graph):
        states = []
        for convolution in self.convolutions:
            x = convolution(x, edges).relu()
            states.append(x)
        return self.head(self.readout(self.jump(states), graph))


def random_graphs(graphs=6, nodes=10, features=5):
    from torch_geometric.utils import sort_edge_index

    graph = torch.arange(graphs).repeat_interleave(nodes)
    ends = torch.randint(nodes, (2, 4 * graphs * nodes))
    edges = ends + nodes * torch.arange(graphs).repeat_interleave(4 * nodes)
    return torch.randn(graphs * nodes, features), sort_edge_index(edges, sort_by_row=False), graph


def test_torch_geometric():
    torch.manual_seed(0)
    torchs = GraphClassifier()
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert count(ours) == 4
    data, classes = random_graphs(), torch.arange(6) % 3
    train_both(
        torchs, ours, lambda model: nn.functional.cross_entropy(model(*data), classes), steps=30
    )
    torch.testing.assert_close(ours(*data), torchs(*data), rtol=1e-2, atol=1e-3)


def stanza_model():
    """Its lemmatizer: a bidirectional encoder of packed words, a decoder that steps a cell."""
    seq2seq = pytest.importorskip("stanza.models.common.seq2seq_model")
    options = {"vocab_size": 20, "emb_dim": 8, "hidden_dim": 16, "num_layers": 2, "dropout": 0.0}
    return seq2seq.Seq2SeqModel({**options, "max_dec_len": 12, "attn_type": "soft", "copy": True})


def test_stanza_lemmatizer():
    torchs = stanza_model()
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert count(ours) == 2
    words, lengths = torch.randint(4, 20, (6, 9)), torch.tensor([9, 9, 7, 6, 4, 2])
    mask = torch.arange(9) >= lengths[:, None]
    words[mask] = 0  # padding
    start, end = torch.full((6, 1), 2), torch.full((6, 1), 3)
    backwards = torch.cat([words.flip(1), end], 1)

    def loss(model):
        found, _ = model(words, mask, torch.cat([start, backwards[:, :-1]], 1))
        return nn.functional.nll_loss(found.flatten(0, 1), backwards.flatten(), ignore_index=0)

    train_both(torchs, ours, loss)
    frozen = copy.deepcopy(ours)
    frozen.load_state_dict(torchs.state_dict())
    ours.load_state_dict(torchs.state_dict())
    lstm_ext.freeze(frozen.eval())
    for beams in (1, 3):  # greedily, and by a beam search that writes into the states
        torchs.eval(), ours.eval()
        expected, _ = torchs.predict(words, mask, beam_size=beams)
        assert any(map(len, expected))
        for model in (ours, frozen):
            with torch.no_grad(), operators() as calls:
                found, _ = model.predict(words, mask, beam_size=beams)
            assert found == expected
            assert_only_ours(calls)


def test_stanza_highway():
    """Cells that are stepped over a packed batch, which gets smaller, with recurrent dropout."""
    hlstm = pytest.importorskip("stanza.models.common.hlstm")
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3}
    torchs = hlstm.HighwayLSTM(5, 6, **options, rec_dropout=0.2, pad=True)
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert count(ours) == 4
    x, lengths = torch.randn(4, 7, 5), [7, 5, 5, 2]
    train_both(torchs, ours, lambda model: (model(x, lengths)[0] - 1).square().mean(), steps=8)


class WeightDrop(nn.Module):
    """pytorch-nlp's dropout of weights: in its subclass of nn.LSTM, and over torch's modules."""

    def __init__(self):
        dropping = pytest.importorskip("torchnlp.nn")
        super().__init__()
        self.subclass = dropping.WeightDropLSTM(5, 6, num_layers=2, weight_dropout=0.4)
        # Its wrapper has the wrapped module's forward, and nothing else of it.
        self.layer, self.cell = nn.LSTM(6, 6), nn.LSTMCell(6, 6)
        self.dropping_layer = dropping.WeightDrop(self.layer, ["weight_hh_l0", "bias_hh_l0"], 0.4)
        self.dropping_cell = dropping.WeightDrop(self.cell, ["weight_ih"], 0.4)

    def forward(self, x):
        x, _ = self.subclass(x)
        x, _ = self.dropping_layer(x)
        return self.dropping_cell(x[-1])[0]


def test_torchnlp_weight_drop():
    models = []
    for _ in range(2):  # its copies go on with the weights that they were copied from
        torch.manual_seed(0)
        models.append(WeightDrop())
    torchs, ours = models
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.convert(ours)
    assert count(ours) == 3
    assert type(ours.subclass).__name__ == "WeightDropLSTM"
    x = torch.randn(4, 3, 5)
    train_both(torchs, ours, lambda model: (model(x) - 0.5).square().mean(), steps=40)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-2, atol=1e-3)
    # Frozen weights would be dropped no more.
    with pytest.raises(ValueError, match="forward of its own as an attribute"):
        lstm_ext.freeze(ours)


class OutputsAlone(nn.LSTM):
    def forward(self, input):
        return super().forward(input)[0]


class LastOutput(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lstm = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        out = self.lstm(x)
        return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])


def private(model, x, mode="hooks"):
    grad_sample = pytest.importorskip("opacus.grad_sample.utils")
    model = grad_sample.wrap_model(
        model, grad_sample_mode=mode, batch_first=True, loss_reduction="sum"
    )
    model(x).square().sum().backward()
    return [p.grad_sample for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_opacus_gradients_by_sample(mode):
    torchs = LastOutput(OutputsAlone)
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert count(ours) == 1
    x = torch.randn(6, 5, 3)
    expected = private(torchs, x, mode)
    with operators() as calls:
        found = private(ours, x, mode)
    assert calls["lstm_ext::lstm_layer_backward"]
    assert not any(name.startswith("aten::") for name in calls), calls
    assert all(len(g) == 6 for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_replaces_torchs_modules_alone():
    """It has a layer of its own for nn.LSTM, and knows it by its exact class."""
    fix = pytest.importorskip("opacus.validators").ModuleValidator.fix
    plain = LastOutput(nn.LSTM)
    x = torch.randn(6, 5, 3)
    expected = private(fix(plain), x)
    converted = lstm_ext.convert(copy.deepcopy(plain))
    assert type(fix(converted).lstm) is lstm_ext.LSTM
    with pytest.raises(TypeError):  # as torch's, that was not replaced
        private(fix(converted), x)
    with pytest.raises(TypeError):
        private(copy.deepcopy(plain), x)
    reverted = lstm_ext.revert(copy.deepcopy(converted))
    torch.testing.assert_close(private(fix(reverted), x), expected)
    with pytest.warns(UserWarning, match=r"left lstm\.l0 \(DPLSTMCell\).*does not derive"):
        lstm_ext.convert(fix(plain))


def encodec():
    transformers = pytest.importorskip("transformers")
    return transformers.EncodecModel(
        transformers.EncodecConfig(
            num_filters=2,
            hidden_size=8,
            codebook_size=16,
            codebook_dim=8,
            num_lstm_layers=2,
            upsampling_ratios=[4, 2],
            sampling_rate=800,
            target_bandwidths=[1.0, 2.0],
        )
    )


def test_transformers_encodec(tmp_path):
    """Written and read by its class, with initial weights by the class of each module."""
    torchs = encodec()
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert count(ours) == 2
    layers = [m for m in ours.modules() if isinstance(m, nn.LSTM)]
    before = layers[0].weight_hh_l0.clone()
    for model in (torchs, ours):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.LSTM):
                model._init_weights(module)
    assert not torch.equal(layers[0].weight_hh_l0, before)
    assert not layers[0].bias_hh_l0.any()
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    x = torch.randn(2, 1, 160)
    train_both(torchs, ours, lambda model: (model(x).audio_values - 0.5).square().mean(), steps=10)
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path)
    assert count(loaded) == 0
    expected = loaded.eval()(x)
    again = lstm_ext.convert(type(ours).from_pretrained(tmp_path)).eval()
    for model in (ours.eval(), again, lstm_ext.freeze(again)):
        with torch.no_grad(), operators() as calls:
            found = model(x)
        assert_only_ours(calls)
        torch.testing.assert_close(found.audio_values, expected.audio_values)
        assert torch.equal(found.audio_codes, expected.audio_codes)


def cart_pole_policy():
    modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict.nn")
    torch.manual_seed(0)
    lstm = modules.LSTMModule(
        input_size=4,
        hidden_size=8,
        num_layers=2,
        in_keys=["observation", "h", "c"],
        out_keys=["features", ("next", "h"), ("next", "c")],
    )
    return tensordict.TensorDictSequential(
        lstm,
        tensordict.TensorDictModule(nn.Linear(8, 2), ["features"], ["scores"]),
        tensordict.TensorDictModule(
            lambda scores: nn.functional.one_hot(scores.argmax(-1), 2), ["scores"], ["action"]
        ),
    )


def roll_out(policy, steps=40):
    from torchrl import envs

    primer = policy[0].make_tensordict_primer()
    env = envs.TransformedEnv(envs.GymEnv("CartPole-v1"), envs.Compose(envs.InitTracker(), primer))
    env.set_seed(0)
    with torch.no_grad():
        return env.rollout(steps, policy, break_when_any_done=False)


def test_torchrl_resets():
    """Step by step in an environment, and whole trajectories, which it cuts where they begin."""
    torchs, ours = cart_pole_policy(), cart_pole_policy()
    from torchrl.modules import set_recurrent_mode

    lstm_ext.convert(ours)
    assert count(ours) == 1
    expected = roll_out(torchs)
    assert expected["is_init"].sum() > 2
    for change in (lambda model: model, lstm_ext.freeze):
        model = change(copy.deepcopy(ours).eval())
        with operators() as calls:
            found = roll_out(model)
        assert_only_ours(calls)
        assert torch.equal(found["action"], expected["action"])
        for key in ("features", ("next", "h"), ("next", "c")):
            torch.testing.assert_close(found[key], expected[key])

    def loss(model):
        with set_recurrent_mode(True):
            out = model(expected.exclude("features", "scores"))
        return (out["scores"] - expected["next", "observation"][:, :2]).square().mean()

    train_both(torchs, ours, loss, steps=15)
    # Its LSTM in Python is none of torch's: it stays, and that is said.
    ours[0].make_python_based()
    with pytest.warns(UserWarning, match="left module.0.lstm .*does not derive from torch.nn's"):
        lstm_ext.convert(ours)
    lstm_ext.convert(ours[0].make_cudnn_based())
    assert count(ours) == 1
    train_both(torchs, ours, loss, steps=2, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bias": False}], ids=str)
def test_torchrl_recurrent_mode_in_one_call(options):
    """The module of examples/torchrl_lstm.py: outputs, states and gradients; by no packed call."""
    modules, TensorDict = (
        pytest.importorskip("torchrl.modules"),
        pytest.importorskip("tensordict").TensorDict,
    )
    import torchrl_lstm

    keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    torchs = modules.LSTMModule(4, 8, **keys, **options)
    ours = torchrl_lstm.LSTMModule(4, 8, **keys, **options)
    ours.load_state_dict(torchs.state_dict())
    N, L, layers = 5, 12, options.get("num_layers", 1)
    data = TensorDict(
        {
            "x": torch.randn(N, L, 4),
            "h": torch.randn(N, L, layers, 8),  # as a rollout has stored them
            "c": torch.randn(N, L, layers, 8),
            "is_init": torch.rand(N, L, 1) < 0.2,
        },
        batch_size=[N, L],
    )
    assert data["is_init"][:, 1:].any()
    assert not data["is_init"][:, 0].all()
    found = []
    for module in (torchs, ours):
        with modules.set_recurrent_mode(True), operators() as calls:
            out = module(data.clone())
        results = [out["y"], out["next", "h"], out["next", "c"]]
        grads = [torch.ones_like(t) for t in results]
        found.append([*results, *torch.autograd.grad(results, list(module.parameters()), grads)])
    assert set(calls) == {"lstm_ext::lstm_layer_states", "lstm_ext::lstm_layer_states_forward"}
    assert calls["lstm_ext::lstm_layer_states"] == layers
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    # Step by step, as in an environment.
    step = data[:, 0]
    expected, found = (module(step.clone()) for module in (torchs, ours))
    for key in ("y", ("next", "h"), ("next", "c")):
        torch.testing.assert_close(found[key], expected[key])
    # What the example leaves to TorchRL's own way.
    both = [
        kind(4, 8, bidirectional=True, **keys)
        for kind in (modules.LSTMModule, torchrl_lstm.LSTMModule)
    ]
    both[1].load_state_dict(both[0].state_dict())
    del data["h"], data["c"]
    with modules.set_recurrent_mode(True):
        expected, found = (module(data.clone()) for module in both)
    torch.testing.assert_close(found["y"], expected["y"])


def forecasting_data():
    forecasting = pytest.importorskip("pytorch_forecasting")
    import pandas as pd

    rows = [(str(k), i, float(np.sin(i / 3 + k))) for k in range(4) for i in range(24)]
    return forecasting.TimeSeriesDataSet(
        pd.DataFrame(rows, columns=["series", "time", "value"]),
        time_idx="time",
        target="value",
        group_ids=["series"],
        min_encoder_length=2,
        max_encoder_length=8,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        static_categoricals=["series"],
        randomize_length=None,
    )


def test_pytorch_forecasting_deepar():
    """Its LSTM derives from nn.LSTM, and calls it from a forward with other arguments."""
    data = forecasting_data()
    from pytorch_forecasting import DeepAR

    torchs = DeepAR.from_dataset(data, hidden_size=8, rnn_layers=2, dropout=0.0)
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert count(ours) == 1
    assert isinstance(ours.rnn, type(torchs.rnn))
    x, y = next(iter(data.to_dataloader(train=False, batch_size=16)))
    train_both(torchs, ours, lambda model: model.loss(model(x).prediction, y), steps=15)
    predictions = []
    for model in (torchs.eval(), ours.eval()):
        torch.manual_seed(0)
        with torch.no_grad(), operators() as calls:
            predictions.append(model(x, n_samples=3).prediction)
    assert_only_ours(calls)
    torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-2, atol=1e-3)
    # Frozen, it would not take those arguments.
    with (
        pytest.warns(UserWarning, match="left rnn as it is: its class has a forward"),
        pytest.raises(ValueError, match="to freeze"),
    ):
        lstm_ext.freeze(ours)


@pytest.mark.parametrize("lengths", [[5, 0, 3], [0, 0, 0], None])
def test_pytorch_forecasting_empty_sequences(lengths):
    rnn = pytest.importorskip("pytorch_forecasting.models.nn.rnn")
    torchs = rnn.LSTM(3, 4, num_layers=2, batch_first=True)
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    x = torch.randn(3, 5, 3)
    lengths = lengths if lengths is None else torch.tensor(lengths)
    expected = torchs(x, lengths=lengths, enforce_sorted=False)
    with operators() as calls:
        found = ours(x, lengths=lengths, enforce_sorted=False)
    if lengths is None or lengths.any():
        assert_only_ours(calls)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def torchaudio_models(monkeypatch):
    """torchaudio's models, which need none of its binary: that of PyPI asks for torch with CUDA."""
    stub = types.ModuleType("torchaudio._extension")
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
    stub.fail_if_no_align = lambda function: function
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return pytest.importorskip("torchaudio.models")


def test_torchaudio_predictor(torchaudio_models):
    """Embedding, three normalised LSTMs that carry the normalised c, and a projection."""
    from torchaudio.models import rnnt

    torch.manual_seed(0)
    options = {"symbol_embedding_dim": 16, "num_lstm_layers": 3, "lstm_hidden_dim": 24}
    torchs = rnnt._Predictor(20, 12, **options, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3)
    ours = copy.deepcopy(torchs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.convert(ours)
    assert len({type(layer) for layer in (*ours.lstm_layers, *torchs.lstm_layers)}) == 2
    words, lengths = torch.randint(20, (4, 9)), torch.tensor([9, 9, 7, 4])
    expected, _, last = torchs(words, lengths)
    state, pieces = None, []
    for piece in words.split(3, 1):
        with operators() as calls:
            output, _, state = ours(piece, lengths.clamp(max=piece.shape[1]), state)
        assert_only_ours(calls)
        pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    grads = []
    for model in (torchs, ours):
        out, _, _ = model(words, lengths)
        loss = nn.functional.cross_entropy(out.flatten(0, 1), words.flatten() % 12)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=0, atol=0)
    assert all(type(layer) is rnnt._CustomLSTM for layer in lstm_ext.revert(ours).lstm_layers)


def test_torchaudio_emformer(torchaudio_models):
    """Its whole model, with three LSTMs in its predictor: beam search finds the same."""
    torch.manual_seed(0)
    torchs = torchaudio_models.emformer_rnnt_base(32).eval()
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    features, length = torch.randn(1, 20, 80), torch.tensor([20])
    found = []
    for model in (torchs, ours):
        search = torchaudio_models.RNNTBeamSearch(model, blank=31)
        with torch.no_grad():
            found.append(search(features, length, 3))
    assert found[0]
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert mine[0] == theirs[0]
        assert mine[3] == pytest.approx(theirs[3], rel=1e-4, abs=1e-3)
