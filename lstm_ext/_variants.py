"""Which cells there are beside torch's: their names, numbers and parameters.

The numbers are those of csrc/core/cells.h; :data:`lstm_ext.reference.CELLS` has the formulas.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Variant(NamedTuple):
    """A cell.

    name is the option of the modules that chooses it, number the operators' argument
    ``variant``, unit_weights the names of the weights (H) that each unit has of its own, in the
    order of the operators' ``unit_weights``.
    """

    name: str
    number: int
    unit_weights: tuple[str, ...]


PLAIN = Variant("plain", 0, ())
PEEPHOLE = Variant("peephole", 1, ("weight_ci", "weight_cf", "weight_co"))
VARIANTS = {v.name: v for v in (PLAIN, PEEPHOLE)}


def find(name: str) -> Variant:
    """Return the cell of a name, or raise a ValueError."""
    if name not in VARIANTS:
        raise ValueError(f"variant should be one of {', '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name]


def of_module(module: nn.Module) -> Variant:
    """Return the cell of an LSTM or LSTMCell, torch's or ours."""
    return VARIANTS[getattr(module, "_variant", PLAIN.name)]


def options_of(parameters: Collection[str]) -> dict[str, Any]:
    """Return the module's options for the cell that has these parameters (of a first layer)."""
    return {
        v.name: True
        for v in VARIANTS.values()
        if v.unit_weights and f"{v.unit_weights[0]}_l0" in parameters
    }


def add_parameters(module: Any, chosen: Variant, suffixes: Sequence[str]) -> None:
    """Give a module that torch has built the weights of another cell, drawn as torch draws."""
    module._variant = chosen.name
    like = module.weight_hh if hasattr(module, "weight_hh") else module.weight_hh_l0
    bound = 1 / module.hidden_size**0.5 if module.hidden_size > 0 else 0
    for k, suffix in enumerate(suffixes):
        own = [name + suffix for name in chosen.unit_weights]
        for name in own:
            weight = nn.Parameter(like.new_empty(module.hidden_size))
            nn.init.uniform_(weight, -bound, bound)
            module.register_parameter(name, weight)
        if isinstance(module, nn.LSTM):
            module._all_weights[k] = [*module._all_weights[k], *own]  # of the property all_weights


def repr_of(module: nn.Module) -> str:
    """Return what a module's repr says of its cell: nothing of torch's."""
    cell = of_module(module)
    return "" if cell is PLAIN else f", {cell.name}=True"


def names(module: nn.Module, suffix: str = "") -> list[str]:
    """Return the names of the weights of a layer's units."""
    return [name + suffix for name in of_module(module).unit_weights]


def unit_weights(module: nn.Module, suffix: str = "") -> Tensor | None:
    """Return the weights of a layer's units as the operators take them, (P, H) or None."""
    found = [getattr(module, name) for name in names(module, suffix)]
    return torch.stack(found) if found else None
