"""Modules whose weights are packed once, for inference: :func:`freeze` and :func:`unfreeze`."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lstm_ext import (
    _call,
    _fx,
    _guard,
    _ops,
    _options,
    _step_options,
    _variants,
)
from lstm_ext._call import States
from lstm_ext._frozen_weights import (
    compute_weights,
    hash_of,
    layout_of,
    same_bits,
    stored_weights,
    weight_names,
)
from lstm_ext.cell import LSTMCell
from lstm_ext.layer import LSTM

Module = TypeVar("Module", bound=nn.Module)
# How packed weights are stored, and rows that they multiply: the operators' argument `weights`.
_WEIGHT_TYPES = {(None, None): 0, ("bfloat16", None): 1, ("int8", None): 2, ("int8", "int16"): 3}
_FUSED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_packing = threading.Lock()
_FREED = "lstm_ext.freeze(.., keep_weights=False) freed its plain weights"


def freeze(
    module: nn.Module,
    *,
    weights: str | None = None,
    activations: str | None = None,
    keep_weights: bool = True,
) -> nn.Module:
    """Pack the weights of every :class:`LSTM` and :class:`LSTMCell`, once, for inference.

    An ordinary call packs the weights into the kernels' layout each time, since they may have
    changed. For a long sequence that is little work; for one step of a few samples it is much. A
    frozen module packs once. It gives the same numbers, and differs in these points:

    - It computes with the weights as they were when it was frozen, whatever is written to them
      afterwards. So do its copies and pickles.
    - It cannot be trained or converted, and no state dict can be loaded into it.
    - It keeps the plain weights beside the packed ones, unless ``keep_weights=False``. Its state
      dict is the original's. The weights are in memory twice then, and those of a cell three times:
      for few rows a cell is faster from a plain copy.
    - Under autocast it computes in its own precision. Its results have the dtype that the
      original's would have.
    - A pickle in torch's older format (``_use_new_zipfile_serialization=False``) is packed at its
      first call after loading. Before that call, writing to its weights, compiling and exporting it
      raise a RuntimeError.

    Args:
        module: an :class:`LSTM` or an :class:`LSTMCell`, or a model that contains some: there they
            are replaced in place. In evaluation mode, on the CPU.
        weights: how the packed weights are stored, for modules in float32.

            - None: as they are.
            - "bfloat16": rounded to bfloat16, in half the memory. The error of the outputs is about
              0.2 to 0.5 %. On a processor with AVX2 alone it is slower than None.
            - "int8": rounded to 8-bit integers with a scale for each row of the matrices, in a
              quarter of the memory. Input and hidden state are rounded as well, with a scale for
              each row at each step, and the products are summed exactly. Biases, gates and cell
              state stay in float32. The error is about 0.5 to 2 % where the numbers of a row are of
              similar size. It is far larger where they are not (28 % for power spectra): measure it
              with :func:`lstm_ext.frozen_error`. Rows whose numbers are all below 2^-100 count as
              zero.
        activations: how input and hidden state are rounded, for weights="int8". None: to 8-bit
            integers. "int16": to 16 bits, or to as many bits as the sums have room for. That halves
            the error, and is slower where the processor multiplies 8-bit integers.
        keep_weights: False: keep only the packed weights, one copy of the matrices in all. The
            parameters of the original are gone, and their memory is free as soon as nothing else
            holds them (the module itself, an optimizer). The numbers are those of True, except for
            a cell with weights=None: it computes few rows from packed weights too, more slowly, and
            the last bits may differ. There is no way back: :func:`unfreeze` and ``state_dict()``
            raise a RuntimeError. A pickle has the packed weights. A process whose kernels pack
            differently (another instruction set, or a version of lstm_ext with another layout)
            refuses to load it.

    Returns:
        The frozen module, or the model itself. :func:`unfreeze` undoes it, if weights are kept.

    Raises:
        TypeError: keep_weights is no bool.
        RuntimeError: the module is in training mode.
        ValueError: weights or activations is unknown, or not for the module's dtype; or the model
            has nothing to freeze; or it has something without a packed form: a device or dtype that
            the CPU kernels do not have, a weight that something writes at each call (for example a
            dropout of weights), a ``forward`` put on the instance. What weight_norm, spectral_norm
            and prune of torch.nn.utils write is computed first.

    Warns:
        UserWarning: for each subclass that was left as it is, because it has a ``forward`` of its
            own; for a module that ``.compile()`` was called on, since the frozen one is not
            compiled.

    Example:
        >>> model = lstm_ext.freeze(lstm_ext.LSTM(10, 20).eval())
        >>> state = None
        >>> with torch.inference_mode():
        ...     for step in torch.randn(6, 1, 3, 10):  # one step a call
        ...         output, state = model(step, state)
        >>> model
        FrozenLSTM(10, 20, frozen)
    """
    _check_types(weights, activations)
    if not isinstance(keep_weights, bool):
        got = type(keep_weights).__name__
        raise TypeError(f"keep_weights should be of type bool, got: {got}")
    found = {}
    for name, m in module.named_modules():
        if isinstance(m, (LSTM, LSTMCell)) and not isinstance(m, _Frozen):
            plain = type(m).forward in (LSTM.forward, LSTMCell.forward)
            if plain and not getattr(m, "_has_own_checks", False):
                found[name] = m
            else:
                warnings.warn(
                    f"lstm_ext.freeze left {name or type(m).__name__} as it is: its class has a "
                    "forward or checks of its own"
                    + ("" if keep_weights else "; its weights stay too"),
                    stacklevel=2,
                )
    if not found:
        raise ValueError(
            f"freeze: {type(module).__name__} has no lstm_ext.LSTM or lstm_ext.LSTMCell to freeze, "
            "or only frozen ones, or only such as have a forward or checks of their own"
        )
    # All first: a model is frozen whole or not at all.
    _guard.install(_Frozen)
    how = (weights, activations, keep_weights)
    return _replace(module, {m: _freeze_one(m, name, how) for name, m in found.items()})


def _check_types(weights: object, activations: object) -> None:
    if weights not in [name for name, _ in _WEIGHT_TYPES]:
        raise ValueError(f"weights should be None, 'bfloat16' or 'int8', got {weights!r}")
    if activations not in (None, "int16"):
        raise ValueError(f"activations should be None or 'int16', got {activations!r}")
    if (weights, activations) not in list(_WEIGHT_TYPES):
        raise ValueError(f"activations={activations!r} is for weights='int8', got {weights!r}")


def unfreeze(module: nn.Module) -> nn.Module:
    """Put back the modules that :func:`freeze` replaced, the same objects as before.

    Args:
        module: what freeze returned.

    Returns:
        The original module, or the model itself. What is not frozen stays as it is.

    Raises:
        RuntimeError: a module was frozen with ``keep_weights=False``; then nothing is put back.

    Example:
        >>> lstm = lstm_ext.LSTM(10, 20).eval()
        >>> lstm_ext.unfreeze(lstm_ext.freeze(lstm)) is lstm
        True
    """
    found = {n: m for n, m in module.named_modules() if isinstance(m, _Frozen)}
    return _replace(
        module,
        {m: m.find_original(f"unfreeze: {n or type(m).__name__}") for n, m in found.items()},
    )


def _replace(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    # In every place: a module may stand in several.
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(module, module)


def _freeze_one(module: nn.Module, name: str, how: tuple[str | None, str | None, bool]) -> _Frozen:
    where = f"freeze: {name or type(module).__name__}"
    if module.training:
        raise RuntimeError(
            f"{where} is in training mode: frozen weights are for inference. Call .eval() first"
        )
    beyond = _step_options.names(module, in_evaluation=True)
    if beyond:
        raise ValueError(f"{where} has {', '.join(beyond)}, of which there is no frozen form")
    if "forward" in vars(module):
        raise ValueError(
            f"{where} has a forward of its own as an attribute, which would go on with the "
            "unfrozen weights; freeze before it is put there"
        )
    compute_weights(module, where)
    if vars(module).get("_compiled_call_impl") is not None:
        warnings.warn(
            f"lstm_ext.{where} was compiled by .compile(); call it on the frozen module again",
            stacklevel=3,
        )
    if isinstance(module, LSTM):
        return FrozenLSTM(module, where, *how)
    assert isinstance(module, LSTMCell)
    return FrozenLSTMCell(module, where, *how)


class _Frozen(nn.Module):
    """What frozen modules have in common.

    Submodules and hooks are the original's own; parameters too, if weights are kept, so that the
    state dict is the same. The packed weights are buffers outside the state dict.

    A pickle, or a copy, of a module that keeps plain weights has those alone, which any processor
    can pack, and a hash of them. Whether they are there when the module is made is known by the
    hash only: torch's older format (and ``torch.serialization.skip_data``) makes all objects first
    and reads their numbers then. If they are not, the module has no ``_packed_names``, which the
    direct calls leave to Python, and is packed at its first use, if the hash says that they are
    there now. Where plain weights have been written to since the module was frozen, they are no
    longer what it computes with, and the packed ones are saved.
    """

    # Modules that were pickled before have these defaults.
    _weights: str | None = None  # how the packed weights are stored
    _activations: str | None = None
    _freed: tuple[str, ...] | None = None  # what has gone with the original, unless it is kept
    _expected: str | None = None  # the hash of plain weights that are still to be packed

    def __init__(
        self,
        original: nn.Module,
        where: str,
        weights: str | None,
        activations: str | None,
        keep_weights: bool,
    ) -> None:
        nn.Module.__init__(self)  # the construction was the original's
        self.__dict__.update(original.__dict__)
        self._buffers: dict[str, Tensor | None] = dict(original._buffers)
        self._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        hooks = original._forward_pre_hooks.items()
        self._forward_pre_hooks = OrderedDict(
            (key, hook) for key, hook in hooks if _options.weight_writer(hook) is None
        )
        self._compiled_call_impl = None  # it calls the original
        if weights is not None:
            self._weights = weights
        if activations is not None:
            self._activations = activations
        if keep_weights:
            # Not a submodule: its weights would appear twice.
            self.__dict__["original"] = original
        else:
            self._free_weights(original)
        self._hold_packed_weights(original, where)

    def _free_weights(self, original: nn.Module) -> None:
        names = weight_names(original)
        written = {_options.weight_writer(hook) for hook in original._forward_pre_hooks.values()}
        # What torch.nn.utils' weight_norm, spectral_norm and prune make weights of.
        parts = [f"{n}_{k}" for n in names if n in written for k in ("g", "v", "orig", "u", "mask")]
        self._freed = (*names, *parts, "parametrizations", "all_weights", "original")
        for table in ("_parameters", "_buffers", "_modules"):
            held = getattr(original, table).items()
            setattr(self, table, {k: v for k, v in held if k not in self._freed})
        for name in self._freed:
            self.__dict__.pop(name, None)
        if isinstance(original, LSTM):
            nothing = [None] * len(original._flat_weights_names)
            self.__dict__.update(_flat_weights=nothing, _flat_weight_refs=list(nothing))
        # Nothing is saved or loaded; weight_norm's, for one, could not be pickled.
        for hooks in _STATE_DICT_HOOKS:
            setattr(self, hooks, OrderedDict())
        self._repr = original.extra_repr()

    def __getattr__(self, name: str) -> Any:
        if name in (self.__dict__.get("_freed") or ()):
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute '{name}': {_FREED}"
            )
        return super().__getattr__(name)

    def find_original(self, where: str) -> nn.Module:
        """Return the module that was frozen, or raise an error where it was not kept."""
        if self._freed is not None:
            raise RuntimeError(f"{where} has no original any more: {_FREED}")
        original: nn.Module = self.__dict__["original"]
        return original

    def _hold_packed_weights(self, original: Any, where: str) -> None:
        packed = self._pack_original(original, where)
        names = [f"packed_{k}" for k in range(len(packed))]
        self._buffers.update(zip(names, packed, strict=True))
        self._non_persistent_buffers_set.update(names)
        # As the first weight that was packed, without its numbers.
        first = original.weight_ih_l0 if hasattr(original, "weight_ih_l0") else original.weight_ih
        self.like_weights = torch.empty_like(first, device="meta", requires_grad=False)
        self._packed_names = names  # last: by them another thread knows that all is there

    def _pack_original(self, original: Any, where: str) -> list[Tensor | None]:
        raise NotImplementedError

    def _own_layout(self) -> str:
        projects = getattr(self, "proj_size", 0) > 0
        return layout_of(self.like_weights.dtype, self._kind, projects)

    @property
    def _kind(self) -> int:
        return _WEIGHT_TYPES[self._weights, self._activations]

    def _pack(
        self,
        where: str,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None = None,
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
            copies = [None if b is None else b.detach().clone() for b in (b_ih, b_hh)]
            return [_ops.lstm_layer_pack(w_ih, w_hh, self._kind, w_hr), *copies]

    def _packed(self) -> tuple[Tensor | None, ...]:
        if self._is_unpacked():
            self._pack_stored_weights()
        buffers = self._buffers
        return tuple([buffers[name] for name in self._packed_names])

    def _is_unpacked(self) -> bool:
        """Whether the plain weights' numbers were not there yet when the module was unpickled."""
        return "_packed_names" not in self.__dict__

    def _pack_stored_weights(self) -> None:
        if torch.compiler.is_compiling():
            # There, weights have no numbers.
            raise RuntimeError(
                "this frozen module was loaded from a file whose numbers came after it, and its "
                "weights are not packed yet: call it once before torch.compile or torch.export"
            )
        with _packing, ThreadPoolExecutor(1) as thread:
            # In a thread of its own: whatever mode, autocast or transformation the caller is in,
            # the weights outlive it.
            if self._is_unpacked():
                thread.submit(self._pack_if_as_saved, "unpickled module").result()

    def _pack_if_as_saved(self, where: str) -> None:
        expected = self._expected
        # Older pickles have no hash.
        if expected is not None and hash_of(stored_weights(self.original)) != expected:
            raise RuntimeError(
                "this frozen module's plain weights are not those that it was saved with: they "
                "were written to before its first call, or never loaded. "
                "lstm_ext.freeze(lstm_ext.unfreeze(model)) freezes it with what they are now"
            )
        self._hold_packed_weights(self.original, where)
        self.__dict__.pop("_expected", None)

    def _is_as_packed(self) -> bool:
        """Whether the plain weights are what they were when they were packed."""
        held = self._packed()
        try:
            fresh = self._pack_original(self.original, "pickled module")
            return len(held) == len(fresh) and all(map(same_bits, held, fresh))
        except Exception:  # whatever has become of them
            return False

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode."""
        self._check_train(mode)
        self.training = False
        return self

    def _refuse(self, what: str) -> NoReturn:
        why = ". lstm_ext.unfreeze(model) gives back the original"
        if self._freed is not None:
            why = f", and it has no original any more: {_FREED}"
        raise RuntimeError(
            f"a frozen module cannot {what}: its weights are packed for inference{why}"
        )

    def _check_apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise an error if half(), to() or their like would change dtype or device."""
        packed = [b for b in self._packed() if b is not None]
        # Of the weights' own dtype there may be nothing left.
        own = torch.zeros(1, dtype=self.like_weights.dtype, device="cpu")
        for t in (own, *self.parameters(), *packed):
            after = fn(t.detach())
            if (after.dtype, after.device) != (t.dtype, t.device):
                self._refuse(f"become {after.dtype} on {after.device}")

    def _check_train(self, mode: bool) -> None:
        """Raise an error for train(), none for eval()."""
        if mode:
            self._refuse("be trained")

    def _check_load_state_dict(self) -> None:
        """Raise an error in any case."""
        self._refuse("load a state dict")

    def _check_to_empty(self) -> None:
        """Raise an error in any case: the packed weights would be lost."""
        self._refuse("be emptied")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._check_apply(fn)
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _load_from_state_dict(self, *_: Any) -> NoReturn:
        self._refuse("load a state dict")

    def _save_to_state_dict(self, *arguments: Any) -> None:
        # Without an error, a checkpoint would lack the weights, and nobody would know.
        if self._freed is not None:
            raise RuntimeError(
                f"this frozen module has no state dict: {_FREED}. Save the state dict before, or "
                "the whole model after (torch.save(model, ..))"
            )
        super()._save_to_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(getattr(super(), "__getstate__", self.__dict__.copy)())
        if self._is_unpacked():
            return state
        if self._freed is None:
            if isinstance(self.original, LSTM):
                # As when it is pickled itself, which is later.
                self.original._update_flat_weights()
            digest = hash_of(stored_weights(self.original)) if self._is_as_packed() else None
            if digest is not None:
                # Packed weights are for the processor that packed them.
                names = state.pop("_packed_names")
                plain = {k: b for k, b in self._buffers.items() if k not in names}
                return {**state, "_buffers": plain, "_expected": digest}
        return {**state, "_packed_for": self._own_layout()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed_for = state.get("_packed_for")
        state = {k: v for k, v in state.items() if k != "_packed_for"}
        comes_packed = packed_for is not None or state.get("_freed") is not None
        if not comes_packed:
            state.pop("_packed_names", None)  # older: they held names of what was left out
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _guard.install(_Frozen)
        if comes_packed:
            self._check_layout(packed_for)
        # Without attributes yet: the pickle began at the original, which refers to this one.
        elif "_parameters" in vars(self.original):
            stored = stored_weights(self.original)
            fake = any(isinstance(t, FakeTensor) for t in stored)
            if not fake:
                self._check_devices(stored)
            # Numbers that come later give another hash, or are none at all.
            if fake or (self._expected is not None and hash_of(stored) == self._expected):
                self._hold_packed_weights(self.original, "unpickled module")
                self.__dict__.pop("_expected", None)

    def _check_devices(self, tensors: Iterable[Tensor | None]) -> None:
        devices = {str(t.device) for t in tensors if t is not None and not t.is_cpu}
        if devices:
            raise ValueError(
                f"unpickled module is on {', '.join(sorted(devices))}: weights are packed for the "
                "CPU's kernels"
            )

    def _check_layout(self, packed_for: Any) -> None:
        """Raise an error if weights that came with a pickle are not for these kernels."""
        here = self._own_layout()
        if packed_for != here:
            theirs, ours = str(packed_for).split()[0], here.split()[0]
            versions = "" if theirs != ours else " of another version of lstm_ext"
            why = _FREED
            if self._freed is None:
                why = "its plain weights were written to since it was frozen"
            raise RuntimeError(
                f"this frozen module has weights that were packed for the {theirs} kernels"
                f"{versions}, and cannot be used with the {ours} kernels here: {why}. Freeze "
                "the original here, or pickle it as it was frozen with keep_weights=True, of which "
                "weights are packed anew"
            )
        self._check_devices(self._packed())

    def extra_repr(self) -> str:
        """Describe the module as the original does, and say that it is frozen."""
        how = "" if self._weights is None else f" in {self._weights}"
        how += "" if self._activations is None else f", activations in {self._activations}"
        if self._freed is not None:
            return f"{self._repr}, frozen{how}, plain weights freed"
        return f"{self.original.extra_repr()}, frozen{how}"


class FrozenLSTM(_Frozen, LSTM):
    """A :class:`lstm_ext.LSTM` with packed weights, which :func:`lstm_ext.freeze` makes."""

    original: LSTM

    def _pack_original(self, original: Any, where: str) -> list[Tensor | None]:
        packed: list[Tensor | None] = []
        try:
            options = _options.read(original)
        except _options.TorchAnswersError as error:
            raise TypeError(f"{where}: {error}") from None
        for weights in options.layers():
            packed += self._pack(where, *weights[:5])
            if weights.unit_weights is not None:
                packed.append(weights.unit_weights.detach())
        return packed

    _direct = staticmethod(_ops.fast_frozen_lstm)

    def _run(
        self,
        input: Any,
        hx: Any,
        reset: Tensor | None,
        reset_hx: States | None,
        return_cell_states: bool,
    ) -> tuple[Any, ...]:
        if return_cell_states or reset_hx is not None:
            raise RuntimeError(
                "a frozen module has neither return_cell_states nor reset_hx; the module that was "
                "frozen has (lstm_ext.unfreeze)"
            )
        if self._is_unpacked():
            self._pack_stored_weights()
            return LSTM.forward(self, input, hx, reset=reset)
        return _call.run_frozen(self, self._packed(), input, hx, reset)


class FrozenLSTMCell(_Frozen, LSTMCell):
    """A :class:`lstm_ext.LSTMCell` with packed weights, which :func:`lstm_ext.freeze` makes."""

    original: LSTMCell

    def _pack_original(self, original: Any, where: str) -> list[Tensor | None]:
        m = original
        # And the plain weights as they are now: for few rows they are faster (ops/cell.h).
        plain: list[Tensor | None] = [None, None]
        if self._weights is None and self._freed is None:
            plain = [w.detach().clone() for w in (m.weight_ih, m.weight_hh)]
        units = _variants.unit_weights(m)
        own = [] if units is None else [units.detach()]
        return [*self._pack(where, m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh), *plain, *own]

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Compute (h', c') from the input and the states."""
        if not torch.compiler.is_compiling():
            out = _ops.fast_frozen_cell(self.__dict__, input, hx)
            if out is None and self._is_unpacked():
                self._pack_stored_weights()
                out = _ops.fast_frozen_cell(self.__dict__, input, hx)
            if out is None:
                self._log_refusal(input, hx)
                out = _fx.record_call(self, input, hx)
            if out is not None:
                return out
        if isinstance(input, Tensor) and input.dim() in (1, 2):
            if hx is None:
                hx = self._zero_state(input)
            input, hx, low = self._as_autocast(input, hx)
            if self._fits(input, hx):
                h, c = hx
                if input.dim() == 1:
                    step = input[None, None], h.unsqueeze(0), c.unsqueeze(0)
                else:
                    step = input.unsqueeze(0), h, c
                packed, b_ih, b_hh, _, _, *own = self._packed()
                cell = own[0] if own else None, _variants.of_module(self).number
                with (
                    contextlib.nullcontext()
                    if low is None
                    else torch.autocast("cpu", enabled=False)
                ):
                    _, h_n, c_n = _ops.lstm_layer_packed(
                        *step, packed, b_ih, b_hh, None, None, False, *cell
                    )
                if low is not None:
                    h_n, c_n = h_n.to(low), c_n.to(low)
                return (h_n.squeeze(0), c_n.squeeze(0)) if input.dim() == 1 else (h_n, c_n)
        # torch's own errors; what it would compute nevertheless has no packed form.
        if self._freed is None:
            super().forward(input, hx)
        else:
            self._without_numbers()(input, hx)
        self._refuse("take these arguments")

    def _as_autocast(self, input: Tensor, hx: States) -> tuple[Tensor, States, torch.dtype | None]:
        """Under autocast, return what fits the packed weights, and the dtype of the results.

        That is the unfrozen cell's: of gates in the lower precision and of c, unless all have the
        dtype of the weights, which is that of the results then.
        """
        right = isinstance(hx, (tuple, list)) and len(hx) == 2
        if not (right and torch.is_autocast_enabled("cpu")):
            return input, hx, None
        own, tensors = self.like_weights.dtype, (input, *hx)
        dtypes = {own, *(t.dtype if isinstance(t, Tensor) else None for t in tensors)}
        # Autocast leaves float64 as it is.
        if len(dtypes) == 1 or not dtypes <= {*_FUSED} - {torch.float64}:
            return input, hx, None
        low = torch.promote_types(torch.get_autocast_dtype("cpu"), hx[1].dtype)
        input, h, c = (t.to(own) for t in tensors)
        return input, (h, c), low

    def _without_numbers(self) -> LSTMCell:
        """Return a plain cell of these sizes, of weights that take no memory."""
        cell = _variants.of_module(self)
        options: dict[str, Any] = {} if cell is _variants.PLAIN else {cell.name: True}
        plain = LSTMCell(self.input_size, self.hidden_size, self.bias, "meta", **options)
        zero = torch.zeros((), dtype=self.like_weights.dtype, device="cpu")
        for name, p in plain.named_parameters():
            plain._parameters[name] = nn.Parameter(zero.expand(p.shape), requires_grad=False)
        return plain

    def _fits(self, input: Tensor, hx: object) -> bool:
        if not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return False
        shape = (*input.shape[:-1], self.hidden_size)
        return input.shape[-1] == self.input_size and all(
            isinstance(s, Tensor) and s.shape == shape and s.dtype == input.dtype for s in hx
        )
