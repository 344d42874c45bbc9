"""Modules whose weights are packed once, for inference: :func:`freeze` and :func:`unfreeze`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lstm_ext import _call, _fx, _ops
from lstm_ext._call import States
from lstm_ext.cell import LSTMCell
from lstm_ext.layer import LSTM

Module = TypeVar("Module", bound=nn.Module)
_FUSED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def freeze(module: nn.Module) -> nn.Module:
    """Pack the weights of every :class:`LSTM` and :class:`LSTMCell`, once, for inference.

    An ordinary call packs the weights into the kernels' layout anew, since they may have changed;
    that is little in a long sequence and much in one step of a few samples. A frozen module does
    not: it computes with the weights as they were when it was frozen, whatever is written to them
    afterwards. It gives the same numbers, cannot be trained, converted or loaded into, and keeps
    the plain weights (its state dict is the original's), so that they are in memory twice.

    Args:
        module: an :class:`LSTM` or an :class:`LSTMCell`, or a model that has them somewhere: there
            they are replaced in place, but for subclasses, whose forward may do something else. In
            evaluation mode, on the CPU.

    Returns:
        The frozen module, or the model itself. :func:`unfreeze` undoes it.

    Raises:
        RuntimeError: the module is in training mode.
        ValueError: it has nothing to freeze, or something that has no packed form: projections,
            another device or dtype than the CPU kernels know.

    Example::

        model = lstm_ext.freeze(model.eval())
        with torch.inference_mode():
            output, state = model(step, state)
    """
    found = {name: m for name, m in module.named_modules() if plain_kind(m) in (LSTM, LSTMCell)}
    if not found:
        raise ValueError(
            f"freeze: {type(module).__name__} has no lstm_ext.LSTM or lstm_ext.LSTMCell to freeze, "
            "or only frozen ones"
        )
    # All first: a model is frozen whole or not at all.
    return _replace(module, {m: _freeze_one(m, name) for name, m in found.items()})


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


def plain_kind(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, or the one that a parametrization was put over."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _freeze_one(module: nn.Module, name: str) -> _Frozen:
    where = f"freeze: {name or type(module).__name__}"
    if module.training:
        raise RuntimeError(
            f"{where} is in training mode: frozen weights are for inference. Call .eval() first"
        )
    if isinstance(module, LSTM):
        if module.proj_size:
            raise ValueError(f"{where} has projections (proj_size), which have no packed form")
        return FrozenLSTM(module, where)
    assert isinstance(module, LSTMCell)
    return FrozenLSTMCell(module, where)


def _pack(where: str, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> list[Tensor | None]:
    if w_ih.device.type != "cpu" or w_ih.dtype not in _FUSED:
        raise ValueError(
            f"{where} is {w_ih.dtype} on {w_ih.device}: weights are packed for the CPU's kernels, "
            "in float32, float64, bfloat16 or float16"
        )
    with torch.no_grad():
        copies = [None if b is None else b.detach().clone() for b in biases]
        return [_ops.lstm_layer_pack(w_ih, w_hh), *copies]


class _Frozen(nn.Module):
    """What frozen modules have in common.

    Parameters, submodules and hooks are the original's own, so that state dict, parameters and
    hooks are the same; the packed weights are buffers outside the state dict.
    """

    def __init__(self, original: nn.Module, where: str) -> None:
        nn.Module.__init__(self)  # the construction was the original's
        self.__dict__.update(original.__dict__)
        self._buffers: dict[str, Tensor | None] = dict(original._buffers)
        self._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        # Not a submodule: its weights would appear twice.
        self.__dict__["original"] = original
        names = []
        for k, tensor in enumerate(self._pack_original(where)):
            names.append(f"packed_{k}")
            self.register_buffer(names[-1], tensor, persistent=False)
        self._packed_names = names

    original: nn.Module

    def _pack_original(self, where: str) -> list[Tensor | None]:
        raise NotImplementedError

    def _packed(self) -> tuple[Tensor | None, ...]:
        buffers = self._buffers
        return tuple([buffers[name] for name in self._packed_names])

    def train(self: Module, mode: bool = True) -> Module:
        """Stay in evaluation mode."""
        if mode:
            _refuse("be trained")
        self.training = False
        return self

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        for p in self.parameters():
            after = fn(p.detach())
            if (after.dtype, after.device) != (p.dtype, p.device):
                _refuse(f"become {after.dtype} on {after.device}")
        applied: Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _load_from_state_dict(self, *_: Any) -> NoReturn:
        _refuse("load a state dict")

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are for the processor that packed them.
        state = getattr(super(), "__getstate__", self.__dict__.copy)()
        return {**state, "_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        packed = self._pack_original("unpickled module")
        self._buffers = dict(zip(self._packed_names, packed, strict=True))

    def extra_repr(self) -> str:
        """Describe the module as the original does, and say that it is frozen."""
        return f"{self.original.extra_repr()}, frozen"


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
        for weights in _call.read(self.original).layers():
            packed += _pack(where, *weights[:4])
        return packed

    _direct = staticmethod(_ops.fast_frozen_lstm)

    def _run(self, input: Any, hx: Any, reset: Tensor | None) -> tuple[Any, States]:
        return _call.run_frozen(self, self._packed(), input, hx, reset)


class FrozenLSTMCell(_Frozen, LSTMCell):
    """An :class:`LSTMCell` with packed weights; made by :func:`freeze`, called as before."""

    original: LSTMCell

    def _pack_original(self, where: str) -> list[Tensor | None]:
        m = self.original
        return _pack(where, m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh)

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Compute (h', c') from the input and the states."""
        if not torch.compiler.is_compiling():
            out = _ops.fast_frozen_cell(self.__dict__, input, hx)
            if out is None:
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
                _, h_n, c_n = _ops.lstm_layer_packed(*step, *self._packed(), None, None, False)
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
