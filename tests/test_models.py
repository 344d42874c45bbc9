"""Models as people build them, with torch's modules and after convert(): same training curve."""

import copy

import pytest
import torch
from limits import slow
from models import AttentionDecoder, RecurrentPolicy, Tagger
from torch import nn

import lstm_ext


@pytest.mark.parametrize("kind", [*slow(AttentionDecoder, RecurrentPolicy), Tagger])
def test_trains_alike(kind):
    torch.manual_seed(0)
    torchs = kind()
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert any(type(m) in (lstm_ext.LSTM, lstm_ext.LSTMCell) for m in ours.modules())
    inputs, targets = torchs.example()
    curves = []
    for model in (torchs, ours):
        torch.manual_seed(1)  # dropout
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            logits = model(*inputs)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
        model.eval()
    found, expected = torch.tensor(curves[1]), torch.tensor(curves[0])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert expected[-1] < 0.85 * expected[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), torchs(*inputs), rtol=1e-2, atol=1e-3)


def test_policy_by_reset():
    """What the policy does step by step, in one call of the layer."""
    torch.manual_seed(0)
    model = lstm_ext.convert(RecurrentPolicy())
    (observations, done), _ = model.example()
    expected = model(observations, done)
    output, _ = model.lstm(model.observe(observations), reset=done.bool())
    found = torch.cat([model.actor(output), model.critic(output)], -1)
    torch.testing.assert_close(found, expected)
