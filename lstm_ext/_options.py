"""What a module is built with, as :class:`torch.nn.LSTM` reads it: its options and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lstm_ext import _variants
from lstm_ext._steps import layer_suffixes
from lstm_ext.functional import LayerWeights


class _Fields(NamedTuple):
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    dropout: float  # 0 in evaluation
    weights: Sequence[Tensor]
    cell: _variants.Variant
    unit_weights: Sequence[Tensor | None]  # of each layer and direction


FEWER_LAYERS = "there are weights for more layers than num_layers says"


class Options(_Fields):
    """A module's options, of the types that torch's own call takes, and its weights.

    The weights are those of ``_flat_weights``: layer by layer, in each forward first, w_ih, w_hh,
    then b_ih and b_hh, then w_hr, where they exist. Those that another cell than torch's has for
    each of its units are apart.
    """

    __slots__ = ()
    # torch.nn.LSTM's own checks, and with them its words.
    check_forward_args: Any = nn.LSTM.check_forward_args
    check_input: Any = nn.LSTM.check_input
    check_hidden_size: Any = nn.LSTM.check_hidden_size
    get_expected_hidden_size: Any = nn.LSTM.get_expected_hidden_size
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size

    @property
    def _flat_weights(self) -> Sequence[Tensor]:
        return self.weights

    @property
    def directions(self) -> int:
        """2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    def layers(self) -> list[LayerWeights]:
        """Return the weights of each layer and direction."""
        size = _weights_per_layer(self)
        layers = []
        for k in range(0, len(self.weights), size):
            w = self.weights[k : k + size]
            b_ih, b_hh = (w[2], w[3]) if self.bias else (None, None)
            w_hr = w[-1] if self.proj_size else None
            units = self.unit_weights[k // size] if self.unit_weights else None
            layers.append(LayerWeights(w[0], w[1], b_ih, b_hh, w_hr, units))
        return layers


class TorchAnswersError(Exception):
    """Options or weights that are torch's to judge: with its result, or with its error.

    ``options`` are what is computed if torch raises none; None if torch always raises one.
    """

    def __init__(self, reason: str, options: Options | None = None) -> None:
        super().__init__(reason)
        self.options = options


def _weights_per_layer(options: Any) -> int:
    return 2 + 2 * int(options.bias) + int(options.proj_size > 0)


def flat_weights(module: Any) -> list[Any]:
    """Return the weights that torch.nn.LSTM would compute with.

    Those in ``_flat_weights``, unless an attribute has become another tensor since torch made that
    list, as under ``functional_call`` or with a parametrization: then what the attributes are.
    """
    if getattr(module, "_has_own_checks", False):
        module._update_flat_weights()  # which may be the class's own
        return list(module._flat_weights)
    found = _read_attributes(module)
    for ref, weight in zip(module._flat_weight_refs, found, strict=True):
        if weight is not None and ref is not None and ref() is not weight:
            if not torch.compiler.is_compiling() and all(map(_is_parameter, found)):
                # They have come to stay, as with a loader: torch makes its list anew, too.
                module._update_flat_weights()
            return found
    return list(module._flat_weights)


def weight_writer(hook: Any) -> str | None:
    """Return the name of the weight that a hook of torch.nn.utils computes at each call."""
    if isinstance(hook, (WeightNorm, SpectralNorm)):
        return str(hook.name)
    return str(hook._tensor_name) if isinstance(hook, BasePruningMethod) else None


def write_weights(module: nn.Module) -> set[str]:
    """Let such hooks write their weights, and return the names of these."""
    written = set()
    for hook in module._forward_pre_hooks.values():
        name = weight_writer(hook)
        if name is not None:
            hook(module, ())
            written.add(name)
    return written


def _is_parameter(weight: Any) -> bool:
    return type(weight) is nn.Parameter


# A parametrization that gives the same however often it is asked.
_PURE = (parametrizations._WeightNorm, parametrizations._Orthogonal)


def _read_attributes(module: Any) -> list[Any]:
    names = module._flat_weights_names
    if module.training and not torch.compiler.is_compiling():
        parametrized = module._modules.get("parametrizations", {})
        asked = [name for name in names if name in parametrized]
        if not all(isinstance(p, _PURE) for name in asked for p in parametrized[name]):
            # In training it may draw numbers, or take a step nearer to what it computes, each time
            # that it is asked: torch asks twice whether the first has changed, and then for all.
            names = [asked[0]] * 2 + [name for name in names for _ in range(2)]
            return [getattr(module, name, None) for name in names][3::2]
    return [getattr(module, name, None) for name in names]


def read(module: Any, packed: bool = False, weights: Sequence[Tensor] | None = None) -> Options:
    """Read an LSTM's options, and its weights if they are not given; torch's module or ours.

    Args:
        module: the LSTM.
        packed: whether it is called with a packed sequence, for which torch asks no batch_first.
        weights: where the module's own are not to be read.

    Raises:
        RuntimeError: the weights do not fit the options.
        TorchAnswersError: they are not what an LSTM is built with; says in what way.
    """
    for name in ("bias", "batch_first", "bidirectional", "training"):
        value = getattr(module, name)
        if type(value) is not bool and not (packed and name == "batch_first"):
            raise TorchAnswersError(f"{name} is no bool, but {value!r}")
    for name in ("input_size", "hidden_size", "proj_size", "num_layers"):
        value = getattr(module, name)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TorchAnswersError(f"{name} is no int, but {value!r}")
    dropout = module.dropout
    if not isinstance(dropout, (float, int)):
        raise TorchAnswersError(f"dropout is {dropout!r}")
    options = Options(
        module.input_size, module.hidden_size, module.proj_size, module.num_layers, module.bias,
        module.batch_first, module.bidirectional, float(dropout) if module.training else 0.0,
        flat_weights(module) if weights is None else weights, _variants.of_module(module), (),
    )  # fmt: skip
    if weights is None:
        _check_weights(options)
        if options.cell.unit_weights:
            units = [_variants.unit_weights(module, s) for s in layer_suffixes(options)]
            options = options._replace(unit_weights=units)
    return options


def _check_weights(options: Options) -> None:
    """Raise an error unless there are weights for each layer, of the sizes of the options."""
    if not options.weights or not all(isinstance(w, Tensor) for w in options.weights):
        raise TorchAnswersError("a weight is no tensor")
    per_layer = _weights_per_layer(options)
    expected = options.num_layers * options.directions * per_layer
    if len(options.weights) < expected or len(options.weights) % per_layer:
        # In torch's words.
        raise RuntimeError(
            "got an incorrect number of RNN parameters: "
            f"{options.num_layers} layers need {expected}, there are {len(options.weights)}"
        )
    H, P = options.hidden_size, options.proj_size or options.hidden_size
    for k, layer in enumerate(options.layers()[: options.num_layers * options.directions]):
        # The input is compared with the weights when it is there.
        I = layer.w_ih.shape[-1] if k < options.directions else P * options.directions
        shapes = (4 * H, I), (4 * H, P), (4 * H,), (4 * H,), (P, H)
        for weight, shape in zip(layer[:5], shapes, strict=True):
            # torch's fused LSTM reads memory that is not there, where its others raise an error.
            if weight is not None and weight.shape != shape:
                raise RuntimeError(
                    f"the LSTM's options want weights of shape {shape} in layer "
                    f"{k // options.directions}, got {list(weight.shape)}"
                )
    if len(options.weights) != expected:
        raise TorchAnswersError(FEWER_LAYERS, options)
