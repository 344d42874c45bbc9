"""LSTMs with layer normalisation, in the forms that published code has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lstm_ext import _steps, _variants
from lstm_ext.cell import LSTMCell
from lstm_ext.layer import LSTM

_FORMS = ("apart", "sum")


class LayerNormLSTM(LSTM):
    r"""An LSTM with layer normalisation (Ba, Kiros & Hinton 2016), each layer one fused operation.

    With LN(v) = (v - mean) / sqrt(variance + eps), of each row, a step is::

        i, f, g, o = the four quarters of   norm_ih * LN(W_ih x) + norm_hh * LN(W_hh h) + bias
        i, f, o, g = sigmoid(i), sigmoid(f), sigmoid(o), tanh(g)
        c'         = f * c + i * g
        n          = norm_c * LN(c') + bias_c
        h'         = o * tanh(n)

    Bias is ``bias_ih + bias_hh``. Two switches make it the forms in use:

    - ``normalize="apart"``, the formula above: the form of Ba et al. and of haste's LayerNormLSTM.
    - The same with ``carry_norm=True``, where the next step starts from n instead of c': the form
      of PyTorch's fastrnns benchmark, and of TensorFlow Addons (``eps=1e-3``).
    - ``normalize="sum"``, with ``norm_gates * LN(W_ih x + W_hh h)`` in place of the two terms, and
      ``carry_norm=True``: the form of torchaudio's RNN-T models.

    Parameters beside those of torch.nn.LSTM, for each layer and direction (``_l0``,
    ``_l0_reverse``, ..): ``norm_ih`` and ``norm_hh`` (4H), or ``norm_gates`` (4H) with "sum";
    ``norm_c`` (H); with ``bias``, ``bias_c`` (H). Norms begin at one, biases at zero, and the
    weights as torch draws them.

    Input, states and outputs are those of :class:`lstm_ext.LSTM`: batches, single sequences, packed
    and nested ones, ``reset``. ``reset_hx``, ``return_cell_states``, ``checkpoint_every``, freezing
    and ``torch.jit`` are not for it and raise an error.

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the states.
        num_layers: as of torch.nn.LSTM, and the next six.
        bias: whether there are ``bias_ih``, ``bias_hh`` and ``bias_c``.
        batch_first: as of torch.nn.LSTM.
        dropout: as of torch.nn.LSTM.
        bidirectional: as of torch.nn.LSTM.
        proj_size: as of torch.nn.LSTM.
        device: device of the parameters.
        dtype: dtype of the parameters.
        normalize: by keyword, as all that follow: "apart" for the products of x and h each by
            itself, "sum" for their sum.
        carry_norm: whether the next step starts from n instead of c'.
        eps: what is added to the variances.
        options: zoneout, dropouts and clips of :class:`lstm_ext.LSTM`. The clip of c comes before
            its normalisation.

    Raises:
        ValueError: normalize is neither; eps is not positive; or as :class:`lstm_ext.LSTM`.

    Example:
        >>> lstm = lstm_ext.LayerNormLSTM(10, 20, normalize="sum", carry_norm=True)
        >>> output, (h, c) = lstm(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    _step_options: dict[str, Any] | None = {}  # noqa: RUF012 - replaced, never written to

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        normalize: Literal["apart", "sum"] = "apart",
        carry_norm: bool = False,
        eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype, **options,
        )  # fmt: skip
        _refuse(self, options, "LSTM")
        _add_norms(self, _steps.layer_suffixes(self), normalize, carry_norm, eps)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as torch does; norms become one and biases zero."""
        super().reset_parameters()
        _reset_norms(self)

    def extra_repr(self) -> str:
        """Describe the options as torch.nn.LSTM does, and the form."""
        return super().extra_repr() + _form_of(self)

    @classmethod
    def from_torchaudio(
        cls, state_dict: Mapping[str, Tensor], prefix: str = "", *, eps: float = 1e-5
    ) -> LayerNormLSTM:
        """Build one layer with the weights of an LSTM of torchaudio's RNN-T models.

        Args:
            state_dict: of a ``torchaudio.models.rnnt._CustomLSTM`` with layer normalisation, or of
                a model that has one: a predictor's are at ``"predictor.lstm_layers.0."``.
            prefix: what the names begin with.
            eps: of its layer normalisation, 1e-3 in ``emformer_rnnt_base``.

        Raises:
            KeyError: a weight is missing.

        Example:
            >>> names = {"x2g.weight": (80, 10), "p2g.weight": (80, 20), "g_norm.weight": (80,)}
            >>> names |= {"g_norm.bias": (80,), "c_norm.weight": (20,), "c_norm.bias": (20,)}
            >>> weights = {name: torch.randn(shape) for name, shape in names.items()}
            >>> lstm_ext.LayerNormLSTM.from_torchaudio(weights)
            LayerNormLSTM(10, 20, normalize=sum, carry_norm=True, eps=1e-05)
        """
        w = {name: state_dict[prefix + name] for name in _TORCHAUDIO}
        H, I = w["p2g.weight"].shape[1], w["x2g.weight"].shape[1]
        like = w["x2g.weight"]
        module = cls(
            I, H, device=like.device, dtype=like.dtype, normalize="sum", carry_norm=True, eps=eps
        )
        _fill(module, {f"{ours}_l0": w[name] for name, ours in _TORCHAUDIO.items()})
        return module

    @classmethod
    def from_haste(
        cls, state_dict: Mapping[str, Tensor], prefix: str = "", *, zoneout: float = 0.0
    ) -> LayerNormLSTM:
        """Build one layer with the weights of haste's ``LayerNormLSTM``.

        Its gates are in the order i, g, f, o, and its matrices are transposed.

        Args:
            state_dict: with ``kernel`` (I, 4H), ``recurrent_kernel`` (H, 4H), ``bias`` (4H),
                ``gamma`` (2, 4H), ``gamma_h`` (H) and ``beta_h`` (H).
            prefix: what the names begin with.
            zoneout: its rate of zoneout, which is that of h.

        Raises:
            KeyError: a weight is missing.

        Example:
            >>> names = {"kernel": (10, 80), "recurrent_kernel": (20, 80), "bias": (80,)}
            >>> names |= {"gamma": (2, 80), "gamma_h": (20,), "beta_h": (20,)}
            >>> weights = {name: torch.randn(shape) for name, shape in names.items()}
            >>> lstm_ext.LayerNormLSTM.from_haste(weights, zoneout=0.1)
            LayerNormLSTM(10, 20, zoneout_h=0.1, normalize=apart, carry_norm=False, eps=1e-05)
        """
        names = ("kernel", "recurrent_kernel", "bias", "gamma", "gamma_h", "beta_h")
        w = {name: state_dict[prefix + name] for name in names}
        I, H = w["kernel"].shape[0], w["recurrent_kernel"].shape[0]

        def order(t: Tensor) -> Tensor:
            i, g, f, o = t.chunk(4)
            return torch.cat([i, f, g, o])

        like = w["kernel"]
        module = cls(I, H, device=like.device, dtype=like.dtype, zoneout_h=zoneout)
        weights = {
            "weight_ih_l0": order(w["kernel"].mT),
            "weight_hh_l0": order(w["recurrent_kernel"].mT),
            "bias_ih_l0": order(w["bias"]),
            "norm_ih_l0": order(w["gamma"][0]),
            "norm_hh_l0": order(w["gamma"][1]),
            "norm_c_l0": w["gamma_h"],
            "bias_c_l0": w["beta_h"],
        }
        _fill(module, weights)
        return module


class LayerNormLSTMCell(LSTMCell):
    r"""One step of :class:`LayerNormLSTM`, which has the formula and the forms.

    Parameters: those of torch.nn.LSTMCell; ``norm_ih`` and ``norm_hh`` (4H), or ``norm_gates`` (4H)
    with "sum"; ``norm_c`` (H); with ``bias``, ``bias_c`` (H).

    Args:
        input_size: number of features I of the input.
        hidden_size: number of features H of the states.
        bias: whether there are ``bias_ih``, ``bias_hh`` and ``bias_c``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        normalize: by keyword, as all that follow: as of LayerNormLSTM.
        carry_norm: as of LayerNormLSTM.
        eps: as of LayerNormLSTM.
        options: zoneout, dropouts and clip of :class:`lstm_ext.LSTMCell`.

    Raises:
        ValueError: normalize is neither; eps is not positive; or as :class:`lstm_ext.LSTMCell`.

    Example:
        >>> cell = lstm_ext.LayerNormLSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """

    _step_options: dict[str, Any] | None = {}  # noqa: RUF012 - replaced, never written to

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        normalize: Literal["apart", "sum"] = "apart",
        carry_norm: bool = False,
        eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, **options)
        _refuse(self, options, "LSTMCell")
        _add_norms(self, [""], normalize, carry_norm, eps)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as torch does; norms become one and biases zero."""
        super().reset_parameters()
        _reset_norms(self)

    def extra_repr(self) -> str:
        """Describe the options as torch.nn.LSTMCell does, and the form."""
        return super().extra_repr() + _form_of(self)


def _refuse(module: Any, options: dict[str, Any], kind: str) -> None:
    names = [name for name in ("checkpoint_every", "coupled_gates") if options.get(name)]
    cell = _variants.of_module(module)
    if cell is not _variants.PLAIN:
        names.append(cell.name)
    for name in names:
        raise ValueError(f"{name} is not for an {kind} with layer normalization")


_TORCHAUDIO = {
    "x2g.weight": "weight_ih",
    "p2g.weight": "weight_hh",
    "g_norm.weight": "norm_gates",
    "g_norm.bias": "bias_ih",
    "c_norm.weight": "norm_c",
    "c_norm.bias": "bias_c",
}


def _add_norms(module: Any, ends: list[str], normalize: str, carry_norm: bool, eps: float) -> None:
    if normalize not in _FORMS:
        raise ValueError(f"normalize should be 'apart' or 'sum', got {normalize!r}")
    if not isinstance(carry_norm, bool):
        raise TypeError(f"carry_norm should be of type bool, got: {type(carry_norm).__name__}")
    if not eps > 0:
        raise ValueError(f"eps should be positive, got {eps!r}")
    module._layer_norm = (normalize == "sum", carry_norm, float(eps))
    H = module.hidden_size
    names = {"norm_gates": 4 * H} if normalize == "sum" else {"norm_ih": 4 * H, "norm_hh": 4 * H}
    names["norm_c"] = H
    if module.bias:
        names["bias_c"] = H
    like = module.weight_hh if hasattr(module, "weight_hh") else module.weight_hh_l0
    for k, end in enumerate(ends):
        for name, size in names.items():
            module.register_parameter(name + end, nn.Parameter(like.new_empty(size)))
        if isinstance(module, nn.LSTM):
            own = [name + end for name in names]
            module._all_weights[k] = [*module._all_weights[k], *own]  # of the property all_weights
    _reset_norms(module)


def _reset_norms(module: Any) -> None:
    if module._layer_norm is None:  # torch's constructor is at work
        return
    with torch.no_grad():
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("norm_"):
                parameter.fill_(1)
            elif name.startswith("bias_"):
                parameter.zero_()


def _form_of(module: Any) -> str:
    joint, carry, eps = module._layer_norm
    return f", normalize={_FORMS[joint]}, carry_norm={carry}, eps={eps}"


def _fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set these parameters; the others are zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
            else:
                parameter.zero_()
