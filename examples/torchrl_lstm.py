"""TorchRL's LSTMModule with its recurrent mode in one call a layer, of lstm_ext.

    module = LSTMModule(input_size=3, hidden_size=64, in_key="observation", out_key="features")

In its recurrent mode, TorchRL (0.14) cuts a batch of trajectories where ``is_init`` says that a new
one begins, pads and packs the pieces, and puts their outputs together again. Here ``is_init`` is
the layer's ``reset``: nothing is cut. As there, a trajectory begins with the state that the
tensordict has for its first step (``reset_hx``), and the states that come out are those at the ends
of trajectories, zero elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrl import modules

import lstm_ext

States = tuple[Tensor, Tensor]


class LSTMModule(modules.LSTMModule):
    """A drop-in for ``torchrl.modules.LSTMModule``; bidirectional and projecting ones stay as are.

    Arguments, keys and shapes are TorchRL's.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        lstm_ext.convert(self)
        ours = isinstance(self.lstm, lstm_ext.LSTM)
        if ours and not (self.lstm.bidirectional or self.lstm.proj_size):
            self.recurrent_backend = "scan"  # the one that cuts nothing

    def _lstm_scan_with_resets(
        self,
        input: Tensor,
        hidden0_in: Tensor,
        hidden1_in: Tensor,
        initial_hidden: States,
        is_init: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run (B, T, I) from the states (B, T, layers, H) of each step that is_init (B, T) names.

        Returns the outputs (B, T, H), and h and c, (B, T, layers, H), where trajectories end.
        """
        x, reset = input.transpose(0, 1), is_init.transpose(0, 1)
        reset_hx = [s.permute(2, 1, 0, 3) for s in (hidden0_in, hidden1_in)]
        outputs, cells = [], []
        # Layer by layer, for the states of each are asked for.
        for k, weights in enumerate(self._weights()):
            if k > 0 and self.training and self.lstm.dropout:
                x = torch.dropout(x, self.lstm.dropout, True)
            h, c = (s[k : k + 1] for s in initial_hidden)
            to = reset_hx[0][k : k + 1], reset_hx[1][k : k + 1]
            x, _, _, of_c = lstm_ext.lstm(
                x, (h, c), [weights], reset=reset, reset_hx=to, return_cell_states=True
            )
            outputs.append(x)
            cells.append(of_c)
        ends = torch.cat([is_init[:, 1:], torch.ones_like(is_init[:, :1])], 1)[..., None, None]
        h, c = (torch.where(ends, torch.stack(s, 2).transpose(0, 1), 0) for s in (outputs, cells))
        return x.transpose(0, 1), h, c

    def _weights(self) -> list[lstm_ext.LayerWeights]:
        return [
            lstm_ext.LayerWeights(*(getattr(self.lstm, name) for name in names))
            for names in self.lstm._all_weights
        ]
