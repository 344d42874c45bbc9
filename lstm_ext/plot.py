"""Pictures of a gate trace, in the lecture's layout and others. Needs matplotlib.

Every function returns a matplotlib figure that no window knows of: ``figure.savefig("gates.png")``
or ``"gates.svg"`` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lstm_ext.gates import GateTrace

COLUMNS = 32  # of a gate, beyond which units are drawn together
STEPS = 60  # beyond which not every step has a label
MEANINGS = {
    "i": "i, input gate",
    "f": "f, forget gate",
    "o": "o, output gate",
    "g": "g, what is written",
    "c": "c, cell state",
    "h": "h, hidden state",
    "yhat": "ŷ, prediction",
}


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "lstm_ext.plot needs matplotlib: pip install matplotlib, or lstm_ext[plot]"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def gates(
    trace: GateTrace,
    *,
    layer: int = -1,
    direction: int = 0,
    sample: int = 0,
    last: int | None = None,
    tokens: Sequence[str] | None = None,
    yhat: Tensor | None = None,
    classes: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw two heat maps, a row a step: the gates i, f, o, and g, c, h beside the prediction.

    Blue is -1, white 0, red 1. More than 32 units are drawn together in 32 columns: of each group,
    a gate's mean, and of g, c and h the value farthest from zero.

    Args:
        trace: of :func:`lstm_ext.trace_gates`.
        layer: which layer; the last by default.
        direction: 0 forward, 1 backward.
        sample: which of the batch.
        last: draw this many steps from the end. All by default.
        tokens: one label a step, the input's; as many as steps of the trace (or of the sample).
        yhat: (L, V), probabilities to draw beside h.
        classes: V labels for yhat.
        title: above both.

    Raises:
        ImportError: matplotlib is missing.
        IndexError: there is no such layer, direction or sample.
        ValueError: tokens, yhat or classes do not fit the steps, or last is not positive.
    """
    part = trace.select(layer, direction)
    L = len(part.i[0])
    N = part.i.shape[2]
    if not -N <= sample < N:
        raise IndexError(f"sample {sample} of {N}")
    if part.lengths is not None:
        L = int(part.lengths[sample])
    if tokens is not None and len(tokens) not in (L, part.i.shape[1]):
        raise ValueError(f"tokens: expected {L}, one a step, got {len(tokens)}")
    if yhat is not None and (yhat.dim() != 2 or len(yhat) not in (L, part.i.shape[1])):
        raise ValueError(f"yhat: expected ({L}, classes), got {tuple(yhat.shape)}")
    if yhat is not None and classes is not None and len(classes) != yhat.shape[1]:
        raise ValueError(f"classes: expected {yhat.shape[1]}, got {len(classes)}")
    if last is not None and last < 1:
        raise ValueError(f"last should be positive, got {last}")
    first = max(0, L - last) if last is not None else 0
    rows = range(first, L)
    values = {
        name: getattr(part, name)[0, first:L, sample].detach().float().cpu() for name in "ifogch"
    }
    if yhat is not None:
        values["yhat"] = yhat[first:L].detach().float().cpu()
    labels = [f"{t}" if tokens is None else f"{t}  {tokens[t]!r}"[:24] for t in rows]
    figure = _figure(13, max(3.5, min(0.28 * len(rows) + 2, 16)))
    left, right = figure.subplots(1, 2, sharey=True)
    _heat_map(left, {name: values[name] for name in "ifo"}, labels, None)
    image = _heat_map(
        right, {k: values[k] for k in ("g", "c", "h", "yhat") if k in values}, labels, classes
    )
    left.set_ylabel("time step" + ("" if tokens is None else " and input"))
    above = 36 if max(v.shape[1] for v in values.values()) > COLUMNS else 22  # the groups' names
    left.set_title("gates", pad=above)
    right.set_title("states" if yhat is None else "states and prediction", pad=above)
    beyond = float(values["c"].abs().max()) > 1 if len(rows) else False
    figure.colorbar(image, ax=[left, right], shrink=0.8, extend="both" if beyond else "neither")
    if title is not None:
        figure.suptitle(title)
    return figure


def _heat_map(
    axis: Axes, groups: dict[str, Tensor], labels: list[str], classes: Sequence[str] | None
) -> Any:
    """Draw groups of units side by side, each under its name."""
    drawn, ticks, names = [], [], []
    at = 0
    for name, values in groups.items():
        pooled = values if name == "yhat" else pool(values, COLUMNS, signed=name in "gch")
        units, width = values.shape[1], pooled.shape[1]
        drawn.append(pooled)
        heading = MEANINGS[name]
        if width < units:
            heading += f"\n{units} units, {-(-units // width)} a column"
        axis.text(
            at + width / 2 - 0.5, 1.01, heading, ha="center", va="bottom", fontsize="small",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        if at > 0:
            axis.axvline(at - 0.5, color="black", linewidth=1)
        each = max(1, -(-width // (8 if units <= 100 else 4)))  # room for the numbers
        for k in range(0, width, each):
            ticks.append(at + k)
            unit = k * -(-units // width)
            names.append(str(unit) if name != "yhat" or classes is None else str(classes[k]))
        at += width
    image = axis.imshow(
        torch.cat(drawn, 1).numpy(), cmap="bwr", vmin=-1, vmax=1, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    axis.set_xticks(ticks, names, fontsize="small")
    axis.set_xlabel("unit" if "yhat" not in groups else "unit, class")
    every = max(1, -(-len(labels) // STEPS))
    axis.set_yticks(range(0, len(labels), every), labels[::every], fontsize="small")
    return image


def pool(values: Tensor, columns: int, signed: bool) -> Tensor:
    """Draw units together, (L, H) -> (L, at most columns), in groups of neighbours.

    Args:
        values: (L, H).
        columns: how many there may be.
        signed: take the value farthest from zero of each group, not the mean.
    """
    H = values.shape[1]
    if columns >= H:
        return values
    groups = torch.split(values, -(-H // columns), dim=1)
    if not signed:
        return torch.stack([group.mean(1) for group in groups], 1)
    return torch.stack(
        [group.gather(1, group.abs().argmax(1, keepdim=True))[:, 0] for group in groups], 1
    )


def histogram(trace: GateTrace, *, layer: int = -1, direction: int = 0) -> Figure:
    """Draw how the values of i, f, o, g, c and h spread, over all steps, samples and units.

    Args:
        trace: of :func:`lstm_ext.trace_gates`.
        layer: which layer; the last by default.
        direction: 0 forward, 1 backward.

    Raises:
        ImportError: matplotlib is missing.
        IndexError: there is no such layer or direction.
    """
    part = trace.select(layer, direction)
    valid = part.valid()
    figure = _figure(11, 5.5)
    for axis, name in zip(figure.subplots(2, 3).flat, "ifogch", strict=True):
        values = getattr(part, name)[0][valid].detach().float().flatten().cpu()
        low, high = (0.0, 1.0) if name in "ifo" else (-1.0, 1.0)
        if name == "c" and len(values):
            high = max(1.0, float(values.abs().max()))
            low = -high
        axis.hist(values.numpy(), bins=40, range=(low, high), density=True, color="tab:blue")
        axis.set(title=MEANINGS[name], xlim=(low, high), ylabel="density")
    return figure


def saturation(trace: GateTrace, *, margin: float = 0.1) -> Figure:
    """Draw the shares of :meth:`lstm_ext.GateTrace.saturation`, a bar for each layer and direction.

    Args:
        trace: of :func:`lstm_ext.trace_gates`.
        margin: what counts as near 0 or 1.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(10, 4)
    axis = figure.subplots()
    parts = _parts(trace)
    width = 0.8 / len(parts)
    for k, (label, part) in enumerate(parts.items()):
        shares = part.saturation(margin)
        places = [x + (k - (len(parts) - 1) / 2) * width for x in range(len(shares))]
        axis.bar(places, list(shares.values()), width, label=label)
        axis.set_xticks(range(len(shares)), list(shares))
    axis.set(ylim=(0, 1), ylabel="share of steps and units", title="nearly shut, nearly open")
    if len(parts) > 1:
        axis.legend()
    return figure


def half_life(trace: GateTrace) -> Figure:
    """Draw how many steps each unit remembers: :meth:`lstm_ext.GateTrace.half_life`, sorted.

    Args:
        trace: of :func:`lstm_ext.trace_gates`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(8, 4)
    axis = figure.subplots()
    for label, part in _parts(trace).items():
        steps = part.half_life()[0].sort(descending=True).values.cpu()
        axis.plot(range(1, len(steps) + 1), steps.numpy(), "o-", markersize=3, label=label)
    axis.set(
        title="how long the forget gate lets each unit remember",
        xlabel="units, the longest memory first",
        ylabel="steps until half is forgotten",
        yscale="log",
    )
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    if trace.i.shape[0] > 1:
        axis.legend()
    return figure


def _parts(trace: GateTrace) -> dict[str, GateTrace]:
    directions = 2 if trace.bidirectional else 1
    parts = {}
    for k in range(trace.i.shape[0]):
        layer, direction = divmod(k, directions)
        label = f"layer {layer}" + (
            "" if directions == 1 else (", forward", ", backward")[direction]
        )
        parts[label] = trace.select(layer, direction)
    return parts
