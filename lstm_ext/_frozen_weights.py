"""What frozen modules pack: the weights of a module, and what tells their copies apart."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from lstm_ext import _ops, _options, _steps, _variants
from lstm_ext.layer import LSTM

CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def weight_names(module: nn.Module) -> list[str]:
    """Return the names of all that is packed or copied."""
    if isinstance(module, LSTM):
        names, suffixes = list(module._flat_weights_names), _steps.layer_suffixes(module)
    else:
        names, suffixes = list(CELL_WEIGHTS), [""]
    return names + [n for suffix in suffixes for n in _variants.names(module, suffix)]


def compute_weights(module: nn.Module, where: str) -> None:
    """Compute the weights that torch's own hooks write; raise an error for those of others."""
    with torch.no_grad():
        computed = _options.write_weights(module)
    for parameters in getattr(module, "parametrizations", {}):
        computed.add(parameters)
    for name in weight_names(module):
        own = module._parameters.get(name, "missing")
        plain = own is None or (isinstance(own, nn.Parameter) and name not in vars(module))
        if name not in computed and not plain:
            raise ValueError(
                f"{where}.{name} is not a parameter, but written by something at each call (a "
                "hook or a wrapper), of which a frozen module would know nothing; remove that "
                f"first, so that {name} is a parameter again"
            )


@functools.cache
def layout_of(dtype: torch.dtype, kind: int, projects: bool = False) -> str:
    """Return what tells layouts of packed weights apart: the kernels' name, and how they pack.

    The latter is a hash of a small layer as they pack it, whose numbers are exact in every type.
    """
    I, H = 19, 70  # whole blocks and a part of one, for any width of vectors
    w = (torch.arange(4 * H * (I + H), device="cpu") * 7 % 255 - 127).to(dtype) / 128
    w = w.view(4 * H, -1)
    w_ih, w_hh = w[:, :I], w[:, I:]
    if projects:
        packed = _ops.lstm_layer_pack(w_ih, w_hh[:, : H - 1], kind, w_hh[: H - 1])
    else:
        packed = _ops.lstm_layer_pack(w_ih, w_hh, kind)
    digest = hashlib.sha256(bytes(packed.tolist())).hexdigest()
    return f"{_ops._C.build_info()['cpu_instruction_set']} {digest}"


def stored_weights(original: Any) -> list[Tensor]:
    """Return what packed weights are made of, as it is stored: nothing is computed."""
    found: list[Any] = []
    for name in weight_names(original):
        for table in (original._parameters, original._buffers, vars(original)):
            found.append(table.get(name))
    if parametrize.is_parametrized(original):
        written = original.parametrizations
        found += [*written.parameters(), *written.buffers()]
    elif isinstance(original, LSTM):
        found += original._flat_weights
    return list({id(t): t for t in found if isinstance(t, Tensor)}.values())


def hash_of(tensors: Iterable[Tensor]) -> str | None:
    """Return a hash of dtypes, shapes and bytes; None where there is no memory to be read."""
    digest = hashlib.sha256()
    for t in tensors:
        if isinstance(t, FakeTensor) or not t.is_cpu or t.layout != torch.strided:
            return None
        plain = t.detach().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)} ".encode())
        size = plain.numel() * plain.element_size()
        address = plain.data_ptr() if size else 0
        if address:
            digest.update((ctypes.c_ubyte * size).from_address(address))
        elif size:
            return None
    return digest.hexdigest()


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    bits = [t.contiguous().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
