"""Modules whose weights are packed once, for inference: :func:`freeze` and :func:`unfreeze`."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lstm_ext import _call, _fx, _guard, _ops, _variants
from lstm_ext._call import States
from lstm_ext.cell import LSTMCell
from lstm_ext.layer import LSTM

Module = TypeVar("Module", bound=nn.Module)
_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# How packed weights are stored, and rows that they multiply: the operators' argument `weights`.
_WEIGHT_TYPES = {(None, None): 0, ("bfloat16", None): 1, ("int8", None): 2, ("int8", "int16"): 3}
_FUSED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def freeze(
    module: nn.Module, *, weights: str | None = None, activations: str | None = None
) -> nn.Module:
    """Pack the weights of every :class:`LSTM` and :class:`LSTMCell`, once, for inference.

    An ordinary call packs the weights into the kernels' layout anew, since they may have changed;
    that is little in a long sequence and much in one step of a few samples. A frozen module does
    not: it computes with the weights as they were when it was frozen, whatever is written to them
    afterwards. It gives the same numbers, cannot be trained, converted or loaded into, and keeps
    the plain weights (its state dict is the original's), so that they are in memory twice, and
    those of a cell, which is faster from plain ones for few rows, three times. Under autocast it
    computes in its own precision; its results have the dtype of the original's.

    Args:
        module: an :class:`LSTM` or an :class:`LSTMCell`, or a model that has them somewhere: there
            they are replaced in place. In evaluation mode, on the CPU.
        weights: how the packed weights are stored, for modules in float32. None: as they are.
            "bfloat16": rounded to bfloat16, in half the memory; the error of the outputs is some
            0.2 to 0.5 %. With AVX2 alone it is slower than None. "int8": rounded to 8-bit integers,
            with a scale for each row of the matrices, in a quarter of the memory. Input and hidden
            state are then rounded as well, with a scale for each row at each step, and the products
            summed exactly; biases, gates and cell state stay in float32. The error is some 0.5 to
            2 % where the numbers of a row are of like size, and far more where they are not (powers
            of a spectrum: 28 %); see :func:`lstm_ext.frozen_error`. Rows whose numbers are all
            below 2^-100 count as zero.
        activations: for weights="int8": how input and hidden state are rounded. None: to 8-bit
            integers. "int16": to 16 bits, or as many as sums of so many products have room for;
            half the error, and slower where the processor multiplies 8-bit integers.

    Returns:
        The frozen module, or the model itself. :func:`unfreeze` undoes it.

    Raises:
        RuntimeError: the module is in training mode.
        ValueError: weights or activations is unknown, or not for the module's dtype; the model has
            nothing to freeze, or something that has no packed form: projections, another device or
            dtype than the CPU kernels know, a weight that something writes at each call (a dropout
            of weights, for one), a ``forward`` put on the instance. What torch.nn.utils'
            weight_norm, spectral_norm and prune write is computed first.

    Warns:
        UserWarning: for each subclass that was left as it is, because it has a ``forward`` of its
            own; for a module that ``.compile()`` was called on, which the frozen one forgets.

    Example::

        model = lstm_ext.freeze(model.eval())
        with torch.inference_mode():
            output, state = model(step, state)
    """
    _check_types(weights, activations)
    found = {}
    for name, m in module.named_modules():
        if isinstance(m, (LSTM, LSTMCell)) and not isinstance(m, _Frozen):
            plain = type(m).forward in (LSTM.forward, LSTMCell.forward)
            if plain and not getattr(m, "_has_own_checks", False):
                found[name] = m
            else:
                warnings.warn(
                    f"lstm_ext.freeze left {name or type(m).__name__} as it is: its class has a "
                    "forward or checks of its own",
                    stacklevel=2,
                )
    if not found:
        raise ValueError(
            f"freeze: {type(module).__name__} has no lstm_ext.LSTM or lstm_ext.LSTMCell to freeze, "
            "or only frozen ones, or only such as have a forward or checks of their own"
        )
    # All first: a model is frozen whole or not at all.
    _guard.install(_Frozen)
    kind = (weights, activations)
    return _replace(module, {m: _freeze_one(m, name, kind) for name, m in found.items()})


def _check_types(weights: object, activations: object) -> None:
    if weights not in [name for name, _ in _WEIGHT_TYPES]:
        raise ValueError(f"weights should be None, 'bfloat16' or 'int8', got {weights!r}")
    if activations not in (None, "int16"):
        raise ValueError(f"activations should be None or 'int16', got {activations!r}")
    if (weights, activations) not in list(_WEIGHT_TYPES):
        raise ValueError(f"activations={activations!r} is for weights='int8', got {weights!r}")


def unfreeze(module: nn.Module) -> nn.Module:
    """Put back what :func:`freeze` replaced: the very same modules.

    Args:
        module: what freeze returned.

    Returns:
        The original module, or the model itself. What is not frozen stays as it is.
    """
    return _replace(module, {m: m.original for m in module.modules() if isinstance(m, _Frozen)})


def _replace(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    # In every place: a module may stand in several.
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(module, module)


def _freeze_one(module: nn.Module, name: str, kind: tuple[str | None, str | None]) -> _Frozen:
    where = f"freeze: {name or type(module).__name__}"
    if module.training:
        raise RuntimeError(
            f"{where} is in training mode: frozen weights are for inference. Call .eval() first"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{where} has a forward of its own as an attribute, which would go on with the "
            "unfrozen weights; freeze before it is put there"
        )
    _check_weights(module, where)
    if vars(module).get("_compiled_call_impl") is not None:
        warnings.warn(
            f"lstm_ext.{where} was compiled by .compile(); call it on the frozen module again",
            stacklevel=3,
        )
    if isinstance(module, LSTM):
        if module.proj_size:
            raise ValueError(f"{where} has projections (proj_size), which have no packed form")
        return FrozenLSTM(module, where, *kind)
    assert isinstance(module, LSTMCell)
    return FrozenLSTMCell(module, where, *kind)


def _weight_writer(hook: Any) -> str | None:
    """Return the name of the weight that a hook of torch.nn.utils computes at each call."""
    if isinstance(hook, (WeightNorm, SpectralNorm)):
        return str(hook.name)
    return str(hook._tensor_name) if isinstance(hook, BasePruningMethod) else None


def _check_weights(module: nn.Module, where: str) -> None:
    """Compute the weights that torch's own hooks write; raise an error for those of others."""
    computed = set()
    for hook in module._forward_pre_hooks.values():
        name = _weight_writer(hook)
        if name is not None:
            with torch.no_grad():
                hook(module, ())
            computed.add(name)
    for parameters in getattr(module, "parametrizations", {}):
        computed.add(parameters)
    if isinstance(module, LSTM):
        names, suffixes = list(module._flat_weights_names), _call.layer_suffixes(module)
    else:
        names, suffixes = list(_CELL_WEIGHTS), [""]
    for name in names + [n for suffix in suffixes for n in _variants.names(module, suffix)]:
        own = module._parameters.get(name, "missing")
        plain = own is None or (isinstance(own, nn.Parameter) and name not in vars(module))
        if name not in computed and not plain:
            raise ValueError(
                f"{where}.{name} is not a parameter, but written by something at each call (a "
                "hook or a wrapper), of which a frozen module would know nothing; remove that "
                f"first, so that {name} is a parameter again"
            )


class _Frozen(nn.Module):
    """What frozen modules have in common.

    Parameters, submodules and hooks are the original's own, so that state dict, parameters and
    hooks are the same; the packed weights are buffers outside the state dict.
    """

    # How the packed weights are stored; modules that were pickled before have the default.
    _weights: str | None = None
    _activations: str | None = None

    def __init__(
        self, original: nn.Module, where: str, weights: str | None, activations: str | None
    ) -> None:
        nn.Module.__init__(self)  # the construction was the original's
        self.__dict__.update(original.__dict__)
        self._buffers: dict[str, Tensor | None] = dict(original._buffers)
        self._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        hooks = original._forward_pre_hooks.items()
        self._forward_pre_hooks = OrderedDict(
            (key, hook) for key, hook in hooks if _weight_writer(hook) is None
        )
        self._compiled_call_impl = None  # it calls the original
        # Not a submodule: its weights would appear twice.
        self.__dict__["original"] = original
        if weights is not None:
            self._weights = weights
        if activations is not None:
            self._activations = activations
        self._hold_packed_weights(where)

    original: nn.Module

    def _hold_packed_weights(self, where: str) -> None:
        packed = self._pack_original(where)
        self._packed_names = [f"packed_{k}" for k in range(len(packed))]
        self._buffers.update(zip(self._packed_names, packed, strict=True))
        self._non_persistent_buffers_set.update(self._packed_names)
        # As the first weight that was packed, without its numbers.
        m: Any = self.original
        first: Tensor = m.weight_ih_l0 if hasattr(m, "weight_ih_l0") else m.weight_ih
        self.like_weights = torch.empty_like(first, device="meta", requires_grad=False)

    def _pack_original(self, where: str) -> list[Tensor | None]:
        raise NotImplementedError

    def _pack(
        self, where: str, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None
    ) -> list[Tensor | None]:
        if w_ih.device.type != "cpu" or w_ih.dtype not in _FUSED:
            raise ValueError(
                f"{where} is {w_ih.dtype} on {w_ih.device}: weights are packed for the CPU's "
                "kernels, in float32, float64, bfloat16 or float16"
            )
        if self._weights is not None and w_ih.dtype != torch.float32:
            raise ValueError(
                f"{where} is {w_ih.dtype}: weights={self._weights!r} is for modules in float32"
            )
        with torch.no_grad():
            copies = [None if b is None else b.detach().clone() for b in biases]
            kind = _WEIGHT_TYPES[self._weights, self._activations]
            return [_ops.lstm_layer_pack(w_ih, w_hh, kind), *copies]

    def _packed(self) -> tuple[Tensor | None, ...]:
        buffers = self._buffers
        return tuple([buffers[name] for name in self._packed_names])

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode."""
        self._check_train(mode)
        self.training = False
        return self

    def _check_apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise an error if half(), to() or their like would change dtype or device."""
        for p in self.parameters():
            after = fn(p.detach())
            if (after.dtype, after.device) != (p.dtype, p.device):
                _refuse(f"become {after.dtype} on {after.device}")

    def _check_train(self, mode: bool) -> None:
        """Raise an error for train(), none for eval()."""
        if mode:
            _refuse("be trained")

    def _check_load_state_dict(self) -> None:
        """Raise an error in any case."""
        _refuse("load a state dict")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._check_apply(fn)
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _load_from_state_dict(self, *_: Any) -> NoReturn:
        _refuse("load a state dict")

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are for the processor that packed them.
        state = getattr(super(), "__getstate__", self.__dict__.copy)()
        plain = {k: b for k, b in self._buffers.items() if k not in self._packed_names}
        return {**state, "_buffers": plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold_packed_weights("unpickled module")  # by older versions, with fewer of them
        _guard.install(_Frozen)

    def extra_repr(self) -> str:
        """Describe the module as the original does, and say that it is frozen."""
        how = "" if self._weights is None else f" in {self._weights}"
        how += "" if self._activations is None else f", activations in {self._activations}"
        return f"{self.original.extra_repr()}, frozen{how}"


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"a frozen module cannot {what}: its weights are packed for inference. "
        "lstm_ext.unfreeze(model) gives back the original"
    )


class FrozenLSTM(_Frozen, LSTM):
    """An :class:`LSTM` with packed weights; made by :func:`freeze`, called as before."""

    original: LSTM

    def _pack_original(self, where: str) -> list[Tensor | None]:
        packed: list[Tensor | None] = []
        try:
            options = _call.read(self.original)
        except _call.TorchAnswersError as error:
            raise TypeError(f"{where}: {error}") from None
        for weights in options.layers():
            packed += self._pack(where, *weights[:4])
            if weights.unit_weights is not None:
                packed.append(weights.unit_weights.detach())
        return packed

    _direct = staticmethod(_ops.fast_frozen_lstm)

    def _run(self, input: Any, hx: Any, reset: Tensor | None) -> tuple[Any, States]:
        return _call.run_frozen(self, self._packed(), input, hx, reset)


class FrozenLSTMCell(_Frozen, LSTMCell):
    """An :class:`LSTMCell` with packed weights; made by :func:`freeze`, called as before."""

    original: LSTMCell

    def _pack_original(self, where: str) -> list[Tensor | None]:
        m = self.original
        # And the plain weights as they are now: for few rows they are faster (ops/cell.h).
        plain: list[Tensor | None] = [None, None]
        if self._weights is None:
            plain = [w.detach().clone() for w in (m.weight_ih, m.weight_hh)]
        units = _variants.unit_weights(m)
        own = [] if units is None else [units.detach()]
        return [*self._pack(where, m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh), *plain, *own]

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Compute (h', c') from the input and the states."""
        if not torch.compiler.is_compiling():
            out = _ops.fast_frozen_cell(self.__dict__, input, hx)
            if out is None:
                self._log_refusal(input, hx)
                out = _fx.record_call(self, input, hx)
            if out is not None:
                return out
        if isinstance(input, Tensor) and input.dim() in (1, 2):
            if hx is None:
                hx = self._zero_state(input)
            if self._fits(input, hx):
                h, c = hx
                if input.dim() == 1:
                    step = input[None, None], h.unsqueeze(0), c.unsqueeze(0)
                else:
                    step = input.unsqueeze(0), h, c
                packed, b_ih, b_hh, _, _, *own = self._packed()
                cell = own[0] if own else None, _variants.of_module(self).number
                _, h_n, c_n = _ops.lstm_layer_packed(
                    *step, packed, b_ih, b_hh, None, None, False, *cell
                )
                return (h_n.squeeze(0), c_n.squeeze(0)) if input.dim() == 1 else (h_n, c_n)
        # torch's own errors; what it would compute nevertheless has no packed form.
        super().forward(input, hx)
        _refuse("take these arguments")

    def _fits(self, input: Tensor, hx: object) -> bool:
        if not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return False
        shape = (*input.shape[:-1], self.hidden_size)
        return input.shape[-1] == self.input_size and all(
            isinstance(s, Tensor) and s.shape == shape and s.dtype == input.dtype for s in hx
        )
