"""Three models as people build them on torch's LSTM modules: they know nothing of lstm_ext.

``lstm_ext.convert(model)`` makes them use ours. tests/test_models.py trains each both ways,
benchmarks/bench_models.py times them.

N batch, L time; each has ``example(N, L)``, which draws (inputs, targets) to train on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Example = tuple[tuple[Any, ...], Tensor]


class AttentionDecoder(nn.Module):
    """A captioning decoder: at each step it looks at the picture, and steps an LSTMCell.

    After "Show, Attend and Tell" (Xu et al. 2015): soft attention, a gate on it, states from the
    mean of the features, teacher forcing over sorted captions of differing lengths.

    Args:
        words: size of the vocabulary.
        features: number of features of a region of the picture.
        hidden: number of features of the states.
        embedding: number of features of a word.
    """

    def __init__(
        self, words: int = 11, features: int = 7, hidden: int = 9, embedding: int = 5
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        self.attend_features, self.attend_hidden = (
            nn.Linear(features, hidden),
            nn.Linear(hidden, hidden),
        )
        self.score, self.gate = nn.Linear(hidden, 1), nn.Linear(hidden, features)
        self.start_h, self.start_c = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.cell = nn.LSTMCell(embedding + features, hidden)
        self.head = nn.Linear(hidden, words)

    def forward(self, features: Tensor, captions: Tensor, lengths: list[int]) -> Tensor:
        """Map regions (N, R, F), words (N, L) and N descending lengths to logits (N, L, W)."""
        counts = [sum(length > t for length in lengths) for t in range(captions.shape[1])]
        h, c = self.start_h(features.mean(1)), self.start_c(features.mean(1))
        keys = self.attend_features(features)
        words = self.embedding(captions)
        states = []
        for t, n in enumerate(counts):  # n captions go on
            scores = self.score(torch.tanh(keys[:n] + self.attend_hidden(h[:n])[:, None]))
            context = (scores.softmax(1) * features[:n]).sum(1)
            context = torch.sigmoid(self.gate(h[:n])) * context
            h, c = self.cell(torch.cat([words[:n, t], context], 1), (h[:n], c[:n]))
            states.append(nn.functional.pad(h, (0, 0, 0, len(words) - n)))
        return self.head(torch.stack(states, 1))

    def example(self, N: int = 4, L: int = 6) -> Example:
        """Draw pictures of 8 regions, and captions of lengths from L down to 2."""
        lengths = torch.linspace(L, 2, N).long().tolist()
        captions = torch.randint(self.head.out_features, (N, L))
        return (torch.randn(N, 8, self.start_h.in_features), captions, lengths), captions


class RecurrentPolicy(nn.Module):
    """An actor-critic over pieces of experience in which episodes end: states masked by hand.

    Args:
        observation: number of features observed.
        hidden: number of features of the states.
        actions: number of actions to choose from.
    """

    def __init__(self, observation: int = 4, hidden: int = 10, actions: int = 3) -> None:
        super().__init__()
        self.observe = nn.Sequential(nn.Linear(observation, hidden), nn.Tanh())
        self.lstm = nn.LSTM(hidden, hidden)
        self.actor, self.critic = nn.Linear(hidden, actions), nn.Linear(hidden, 1)

    def forward(self, observations: Tensor, done: Tensor) -> Tensor:
        """Map observations (L, N, O) and ends (L, N) to the actions' logits and a value."""
        N = observations.shape[1]
        h = c = observations.new_zeros(1, N, self.lstm.hidden_size)
        outputs = []
        for x, d in zip(self.observe(observations), done, strict=True):
            keep = 1 - d[None, :, None]
            output, (h, c) = self.lstm(x[None], (h * keep, c * keep))
            outputs.append(output)
        output = torch.cat(outputs)
        return torch.cat([self.actor(output), self.critic(output)], -1)

    def example(self, N: int = 5, L: int = 12) -> Example:
        """Draw experience whose episodes end at one step in five, and which output to raise."""
        done = (torch.rand(L, N) < 0.2).float()
        inputs = torch.randn(L, N, self.observe[0].in_features), done
        return inputs, torch.randint(self.actor.out_features + 1, (L, N))


class Tagger(nn.Module):
    """A bidirectional tagger of two layers over packed sentences, with dropout between layers.

    Args:
        words: size of the vocabulary.
        embedding: number of features of a word.
        hidden: number of features of the states of a direction.
        tags: number of tags.
    """

    def __init__(self, words: int = 20, embedding: int = 6, hidden: int = 7, tags: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        self.lstm = nn.LSTM(embedding, hidden, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.head = nn.Linear(2 * hidden, tags)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Map words (N, L) and lengths (N), in any order, to logits (N, L, tags)."""
        packed = pack_padded_sequence(
            self.embedding(words), lengths, batch_first=True, enforce_sorted=False
        )
        output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(output)

    def example(self, N: int = 6, L: int = 9) -> Example:
        """Draw sentences of 1 to L words."""
        words = torch.randint(self.embedding.num_embeddings, (N, L))
        lengths = torch.randint(1, L + 1, (N,))
        lengths[1] = L
        return (words, lengths), words % self.head.out_features
