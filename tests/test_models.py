"""Models as people build them, with torch's modules and after convert(): same training curve."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_ext


class AttentionDecoder(nn.Module):
    """A captioning decoder: at each step it looks at the picture, and steps an LSTMCell.

    After "Show, Attend and Tell" (Xu et al. 2015): soft attention, a gate on it, states from the
    mean of the features, teacher forcing over sorted captions of differing lengths.
    """

    def __init__(self, words=11, features=7, hidden=9):
        super().__init__()
        self.embedding = nn.Embedding(words, 5)
        self.attend_features, self.attend_hidden = nn.Linear(features, 6), nn.Linear(hidden, 6)
        self.score, self.gate = nn.Linear(6, 1), nn.Linear(hidden, features)
        self.start_h, self.start_c = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.cell = nn.LSTMCell(5 + features, hidden)
        self.head = nn.Linear(hidden, words)

    def forward(self, features, captions, lengths):
        h, c = self.start_h(features.mean(1)), self.start_c(features.mean(1))
        words = self.embedding(captions)
        logits = words.new_zeros(*captions.shape, self.head.out_features)
        for t in range(max(lengths)):
            n = sum(length > t for length in lengths)  # captions that go on
            scores = self.score(
                torch.tanh(self.attend_features(features[:n]) + self.attend_hidden(h[:n])[:, None])
            )
            context = (scores.softmax(1) * features[:n]).sum(1)
            context = torch.sigmoid(self.gate(h[:n])) * context
            h, c = self.cell(torch.cat([words[:n, t], context], 1), (h[:n], c[:n]))
            logits[:n, t] = self.head(h)
        return logits

    @staticmethod
    def data():
        lengths = [6, 5, 5, 2]
        captions = torch.randint(11, (4, 6))
        return (torch.randn(4, 8, 7), captions, lengths), captions


class RecurrentPolicy(nn.Module):
    """An actor-critic over pieces of experience in which episodes end: states masked by hand."""

    def __init__(self):
        super().__init__()
        self.observe = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.lstm = nn.LSTM(8, 10)
        self.actor, self.critic = nn.Linear(10, 3), nn.Linear(10, 1)

    def forward(self, observations, done):
        state = (torch.zeros(1, observations.shape[1], 10),) * 2
        outputs = []
        for x, d in zip(self.observe(observations), done, strict=True):
            keep = 1 - d[None, :, None]
            output, state = self.lstm(x[None], (state[0] * keep, state[1] * keep))
            outputs.append(output)
        output = torch.cat(outputs)
        return torch.cat([self.actor(output), self.critic(output)], -1)

    @staticmethod
    def data():
        done = (torch.rand(12, 5) < 0.2).float()
        return (torch.randn(12, 5, 4), done), torch.randint(4, (12, 5))


class Tagger(nn.Module):
    """A bidirectional tagger of two layers over packed sentences, with dropout between layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.head = nn.Linear(14, 5)

    def forward(self, words, lengths):
        packed = pack_padded_sequence(
            self.embedding(words), lengths, batch_first=True, enforce_sorted=False
        )
        output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(output)

    @staticmethod
    def data():
        words = torch.randint(20, (6, 9))
        return (words, torch.tensor([4, 9, 1, 7, 9, 2])), words % 5


@pytest.mark.parametrize("kind", [AttentionDecoder, RecurrentPolicy, Tagger])
def test_trains_alike(kind):
    torch.manual_seed(0)
    torchs = kind()
    ours = lstm_ext.convert(copy.deepcopy(torchs))
    assert any(type(m) in (lstm_ext.LSTM, lstm_ext.LSTMCell) for m in ours.modules())
    inputs, targets = kind.data()
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
    (observations, done), _ = RecurrentPolicy.data()
    expected = model(observations, done)
    output, _ = model.lstm(model.observe(observations), reset=done.bool())
    found = torch.cat([model.actor(output), model.critic(output)], -1)
    torch.testing.assert_close(found, expected)
