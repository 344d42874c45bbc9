"""The examples of PyTorch's documentation and tutorials, with ours in torch's place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
    pad_sequence,
)

import lstm_ext


def both(example):
    """Run an example with torch's modules and with ours, from the same seed; compare."""
    found = []
    for package in (nn, lstm_ext):
        torch.manual_seed(1)
        found.append(example(package))
    torch.testing.assert_close(found[1], found[0])
    return found[1]


def test_layer():
    """torch.nn.LSTM's own example."""

    def example(package):
        rnn = package.LSTM(10, 20, 2)
        x = torch.randn(5, 3, 10)
        h0, c0 = torch.randn(2, 3, 20), torch.randn(2, 3, 20)
        output, (hn, cn) = rnn(x, (h0, c0))
        return output, hn, cn

    output, hn, cn = both(example)
    assert output.shape == (5, 3, 20)
    assert hn.shape == cn.shape == (2, 3, 20)


def test_cell():
    """torch.nn.LSTMCell's own example."""

    def example(package):
        rnn = package.LSTMCell(10, 20)
        x = torch.randn(2, 3, 10)
        hx, cx = torch.randn(3, 20), torch.randn(3, 20)
        output = []
        for i in range(x.size()[0]):
            hx, cx = rnn(x[i], (hx, cx))
            output.append(hx)
        return torch.stack(output, dim=0)

    assert both(example).shape == (2, 3, 20)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packing(bidirectional):
    """pack_padded_sequence and pad_packed_sequence around a layer, batch first, not sorted."""

    def example(package):
        seq = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]])
        lens = [2, 1, 3]
        embedding = nn.Embedding(7, 4, padding_idx=0)
        rnn = package.LSTM(4, 5, batch_first=True, bidirectional=bidirectional)
        packed = pack_padded_sequence(embedding(seq), lens, batch_first=True, enforce_sorted=False)
        output, (hn, cn) = rnn(packed)
        assert isinstance(output, PackedSequence)
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        assert lengths.tolist() == lens
        assert not padded[1, 1:].any()
        return padded, hn, cn

    both(example)


def test_padded_to_a_total_length():
    """The FAQ's recipe for data parallelism: pad back to the length that went in."""

    def example(package):
        rnn = package.LSTM(4, 5, batch_first=True)
        x = pad_sequence([torch.randn(n, 4) for n in (6, 3)], batch_first=True)
        packed = pack_padded_sequence(x, [6, 3], batch_first=True)
        output, _ = rnn(packed)
        return pad_packed_sequence(output, batch_first=True, total_length=9)[0]

    assert both(example).shape == (2, 9, 5)


def test_tutorial_one_step_at_a_time_or_all_at_once():
    """The sequence models tutorial, its first part."""

    def example(package):
        lstm = package.LSTM(3, 3)
        inputs = [torch.randn(1, 3) for _ in range(5)]
        first = hidden = (torch.randn(1, 1, 3), torch.randn(1, 1, 3))
        for i in inputs:
            _, hidden = lstm(i.view(1, 1, -1), hidden)
        out, last = lstm(torch.cat(inputs).view(len(inputs), 1, -1), first)
        torch.testing.assert_close(hidden, last)
        return out, last

    both(example)


class Tagger(nn.Module):
    """The tutorial's part-of-speech tagger."""

    def __init__(self, package, words, tags):
        super().__init__()
        self.embeddings = nn.Embedding(words, 6)
        self.lstm = package.LSTM(6, 6)
        self.hidden2tag = nn.Linear(6, tags)

    def forward(self, sentence):
        embeds = self.embeddings(sentence)
        out, _ = self.lstm(embeds.view(len(sentence), 1, -1))
        return F.log_softmax(self.hidden2tag(out.view(len(sentence), -1)), dim=1)


def test_tutorial_tagger():
    data = [
        (["The", "dog", "ate", "the", "apple"], ["DET", "NN", "V", "DET", "NN"]),
        (["Everybody", "read", "that", "book"], ["NN", "V", "DET", "NN"]),
    ]
    words = {w: k for k, w in enumerate(dict.fromkeys(w for s, _ in data for w in s))}
    tags = {"DET": 0, "NN": 1, "V": 2}
    pairs = [
        (torch.tensor([words[w] for w in s]), torch.tensor([tags[t] for t in ts])) for s, ts in data
    ]

    def example(package):
        model = Tagger(package, len(words), len(tags))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(300):
            for sentence, targets in pairs:
                model.zero_grad()
                F.nll_loss(model(sentence), targets).backward()
                optimizer.step()
        with torch.no_grad():
            return model(pairs[0][0])

    assert both(example).argmax(1).tolist() == [0, 1, 2, 0, 1]
