"""Pictures of a gate trace. Needs matplotlib.

Every function returns a matplotlib figure, and opens no window. ``figure.savefig("gates.png")`` (or
``"gates.svg"``) writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 128  # of a gate, beyond which units are drawn together
CLASSES = 12  # of a prediction, beyond which the likeliest are drawn
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


class Trace(Protocol):
    """What these functions need of a trace. :class:`lstm_ext.GateTrace` has it, and explains it."""

    @property
    def i(self) -> Tensor:
        """The input gate, and with it the sizes (K, L, N, H) of them all."""

    @property
    def lengths(self) -> Tensor | None:
        """Of a packed sequence."""

    @property
    def bidirectional(self) -> bool:
        """Whether every second of K reads from the end."""

    def select(self, layer: int = 0, direction: int = 0) -> Trace:
        """Return one layer in one direction."""

    def valid(self) -> Tensor:
        """Return which steps are not padding, (L, N)."""

    def saturation(self, margin: float = 0.1) -> dict[str, float]:
        """Count the share of gates that are nearly shut or open."""

    def half_life(self) -> Tensor:
        """Return after how many steps half is forgotten, (K, H)."""


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "lstm_ext.plot needs matplotlib: pip install matplotlib, or lstm_ext[plot]"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def gates(
    trace: Trace,
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
    """Draw two heat maps with one row a step: i, f, o; and g, c, h beside the prediction.

    Blue is -1, white 0, red 1. More than 128 units share 128 columns: a column then shows the mean
    of a group of neighbours for a gate, and for g, c and h the value farthest from zero. Of more
    than 12 classes, the 12 that are likeliest in some step are drawn.

    Args:
        trace: from :func:`lstm_ext.trace_gates`.
        layer: which layer; the last by default.
        direction: 0 forward, 1 backward.
        sample: which sample of the batch.
        last: draw only this many steps from the end. All by default.
        tokens: a label for the input of each step, as many as the trace (or the sample) has steps.
        yhat: (L, V), probabilities to draw beside h.
        classes: V labels for yhat; their numbers by default.
        title: a title above both maps.

    Raises:
        ImportError: matplotlib is missing.
        IndexError: there is no such layer, direction or sample.
        ValueError: tokens, yhat or classes do not fit the steps, or last is not positive.

    Example:
        >>> trace = lstm_ext.trace_gates(lstm_ext.LSTM(3, 4), torch.randn(6, 2, 3))
        >>> figure = lstm_ext.plot.gates(trace, sample=1, tokens="abcabc")
        >>> figure.savefig("gates.png")
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
        chances = yhat[first:L].detach().float().cpu()
        likeliest = chances.amax(0).topk(min(CLASSES, chances.shape[1])).indices.sort().values
        values["yhat"] = chances[:, likeliest]
        classes = [str(k if classes is None else classes[k]) for k in likeliest.tolist()]
    labels = [f"{t}" if tokens is None else f"{t}  {tokens[t]!r}"[:24] for t in rows]
    figure = _figure(14, max(3.2, min(0.28 * len(rows) + 1.6, 16)))
    units = values["c"].shape[1]
    widths = dict.fromkeys(values, 1.0)
    if yhat is not None:
        widths["yhat"] = min(1.5, max(0.6, values["yhat"].shape[1] / units))
    # A gap between the two maps.
    ratios = [
        *(widths[name] for name in "ifo"),
        0.15,
        *(widths[n] for n in values if n not in "ifo"),
    ]
    grid = figure.add_gridspec(1, len(ratios), width_ratios=ratios, wspace=0.03)
    axes: list[Axes] = []
    for place, name in zip([k for k in range(len(ratios)) if k != 3], values, strict=True):
        axis = figure.add_subplot(grid[place], sharey=axes[0] if axes else None, label=name)
        image = _heat_map(axis, name, values[name], classes or ())
        axis.tick_params(labelleft=not axes)
        axes.append(axis)
    every = max(1, -(-len(labels) // STEPS))
    axes[0].set_yticks(range(0, len(labels), every), labels[::every], fontsize="small")
    axes[0].set_ylabel("time step" + ("" if tokens is None else " and input"))
    beyond = len(rows) > 0 and float(values["c"].abs().max()) > 1
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01, extend="both" if beyond else "neither")
    if title is not None:
        figure.suptitle(title)
    return figure


def _heat_map(axis: Axes, name: str, values: Tensor, classes: Sequence[str]) -> Any:
    """Draw one gate or state, (L, H), or the prediction; a column a unit or a group of them."""
    units = values.shape[1]
    pooled = values if name == "yhat" else pool(values, COLUMNS, signed=name in "gch")
    width = pooled.shape[1]
    together = -(-units // width)
    image = axis.imshow(
        pooled.numpy(), cmap="bwr", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    axis.set_title(MEANINGS[name], fontsize="medium")
    if name == "yhat":
        axis.set_xticks(range(width), list(classes), fontsize="small")
        axis.set_xlabel("next")
    else:
        each = max(1, -(-width // (8 if units <= 100 else 4)))  # room for the numbers
        ticks = range(0, width, each)
        axis.set_xticks(ticks, [str(k * together) for k in ticks], fontsize="small")
        axis.set_xlabel("unit" if together == 1 else f"unit, {together} a column")
    return image


def pool(values: Tensor, columns: int, signed: bool) -> Tensor:
    """Put neighbouring units together, so that they fit: (L, H) -> (L, at most ``columns``).

    Args:
        values: (L, H).
        columns: the largest number of columns.
        signed: whether a group becomes the value farthest from zero, and not the mean.

    Example:
        >>> lstm_ext.plot.pool(torch.tensor([[0.1, -0.9, 0.2, 0.4]]), 2, signed=True)
        tensor([[-0.9000,  0.4000]])
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


def histogram(trace: Trace, *, layer: int = -1, direction: int = 0) -> Figure:
    """Draw histograms of i, f, o, g, c and h, over all steps, samples and units.

    Args:
        trace: from :func:`lstm_ext.trace_gates`.
        layer: which layer; the last by default.
        direction: 0 forward, 1 backward.

    Raises:
        ImportError: matplotlib is missing.
        IndexError: there is no such layer or direction.

    Example:
        >>> trace = lstm_ext.trace_gates(lstm_ext.LSTM(3, 4), torch.randn(6, 2, 3))
        >>> figure = lstm_ext.plot.histogram(trace)
        >>> figure.savefig("histogram.png")
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


def saturation(trace: Trace, *, margin: float = 0.1) -> Figure:
    """Draw the shares of :meth:`lstm_ext.GateTrace.saturation`, a bar for each layer and direction.

    Args:
        trace: from :func:`lstm_ext.trace_gates`.
        margin: how near to 0 or 1 a value counts as near.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> trace = lstm_ext.trace_gates(lstm_ext.LSTM(3, 4), torch.randn(6, 2, 3))
        >>> figure = lstm_ext.plot.saturation(trace)
        >>> figure.savefig("saturation.png")
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


def half_life(trace: Trace) -> Figure:
    """Draw how many steps each unit remembers: :meth:`lstm_ext.GateTrace.half_life`, sorted.

    Args:
        trace: from :func:`lstm_ext.trace_gates`.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> trace = lstm_ext.trace_gates(lstm_ext.LSTM(3, 4), torch.randn(6, 2, 3))
        >>> figure = lstm_ext.plot.half_life(trace)
        >>> figure.savefig("half_life.png")
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
    axis.yaxis.set_minor_formatter(
        lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else ""  # the others have no room
    )
    if trace.i.shape[0] > 1:
        axis.legend()
    return figure


class Errors(Protocol):
    """What :func:`frozen_error` needs of an error. :class:`lstm_ext.FrozenError` has it."""

    @property
    def output(self) -> float:
        """Of all outputs."""

    @property
    def over_time(self) -> Tensor:
        """Of each step, (L,)."""


def frozen_error(errors: Mapping[str, Errors]) -> Figure:
    """Draw the error of frozen modules over time, in percent, one line for each module.

    Args:
        errors: from :func:`lstm_ext.frozen_error`.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> model = lstm_ext.freeze(lstm_ext.LSTM(10, 20).eval(), weights="int8")
        >>> errors = lstm_ext.frozen_error(model, torch.randn(50, 8, 10))
        >>> figure = lstm_ext.plot.frozen_error(errors)
    """
    figure = _figure(8, 4)
    axis = figure.subplots()
    for name, error in errors.items():
        label = f"{name or 'the module'}, {error.output:.2%} in all"
        steps = range(len(error.over_time))
        marker = "o-" if len(steps) < STEPS else "-"
        axis.plot(steps, 100 * error.over_time.cpu().numpy(), marker, markersize=3, label=label)
    axis.set(
        title="error of the outputs of frozen modules",
        xlabel="step",
        ylabel="percent of the outputs",
    )
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="x", integer=True)
    axis.legend()
    return figure


def _parts(trace: Trace) -> dict[str, Trace]:
    directions = 2 if trace.bidirectional else 1
    parts = {}
    for k in range(trace.i.shape[0]):
        layer, direction = divmod(k, directions)
        label = f"layer {layer}" + (
            "" if directions == 1 else (", forward", ", backward")[direction]
        )
        parts[label] = trace.select(layer, direction)
    return parts
