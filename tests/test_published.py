"""Published packages that know nothing of lstm_ext, on torch's modules and after convert().

    .venv/bin/python -m pytest -m published

They are an optional extra (``pip install -e ".[published]"``); plain test runs leave them out.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lstm_ext

pytestmark = pytest.mark.published


def count(model):
    return sum(type(m) in (lstm_ext.LSTM, lstm_ext.LSTMCell) for m in model.modules())


def recurrent_ppo(change, **options):
    """Train sb3-contrib's RecurrentPPO on the cart and pole; return it and what it logged."""
    from sb3_contrib import RecurrentPPO
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
        from torch_geometric import nn as geometric

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
    curves = []
    for model in (torchs, ours):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            loss = nn.functional.cross_entropy(model(*data), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    torch.testing.assert_close(
        torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-3, atol=1e-4
    )
    assert curves[0][-1] < 0.7 * curves[0][0]
    torch.testing.assert_close(ours(*data), torchs(*data), rtol=1e-2, atol=1e-3)
