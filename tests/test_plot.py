"""Pictures of gate traces: what is drawn is what the trace holds, and every size can be."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from limits import slow
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext import plot


def trace_of(H=2, L=5, N=2, **options):
    return lstm_ext.trace_gates(nn.LSTM(3, H, **options), torch.randn(L, N, 3))


def axis_of(figure, name):
    (axis,) = (axis for axis in figure.axes if axis.get_label() == name)
    return axis


def image(figure, name):
    return np.asarray(axis_of(figure, name).get_images()[0].get_array())


def texts(labels):
    return [label.get_text() for label in labels]


def test_gates_are_the_lectures_maps():
    trace = trace_of()
    yhat = torch.rand(5, 3).softmax(1)
    figure = trace.plot(sample=1, tokens="hello", yhat=yhat, classes="abB", title="hello")
    for name in "ifogch":
        np.testing.assert_array_equal(image(figure, name), getattr(trace, name)[0, :, 1].numpy())
    np.testing.assert_array_equal(image(figure, "yhat"), yhat.numpy())
    drawn = [axis.get_label() for axis in figure.axes[:-1]]
    assert drawn == [*"ifogch", "yhat"]
    for name in drawn:
        picture = axis_of(figure, name).get_images()[0]
        assert picture.get_cmap().name == "bwr"
        assert picture.get_clim() == (-1, 1)
        assert axis_of(figure, name).get_title().startswith(name if name != "yhat" else "ŷ")
    left = axis_of(figure, "i")
    assert texts(left.get_yticklabels()) == [f"{t}  {c!r}" for t, c in enumerate("hello")]
    assert texts(axis_of(figure, "yhat").get_xticklabels()) == list("abB")
    assert texts(axis_of(figure, "h").get_xticklabels()) == ["0", "1"]
    assert left.get_ylabel() == "time step and input"
    assert figure.get_suptitle() == "hello"
    assert figure.axes[-1].get_ylim() == (-1, 1)


def test_last_steps_layers_and_directions():
    trace = trace_of(num_layers=2, bidirectional=True)
    figure = plot.gates(trace, layer=0, direction=1, last=2, tokens="hello")
    np.testing.assert_array_equal(image(figure, "f"), trace.f[1, 3:, 0].numpy())
    assert texts(axis_of(figure, "i").get_yticklabels()) == ["3  'l'", "4  'o'"]
    assert len(image(plot.gates(trace, last=100), "i")) == 5


def test_wide_layers_are_pooled():
    trace = trace_of(H=512, L=3)
    figure = plot.gates(trace)
    f, h = trace.f[0, :, 0].view(3, 128, 4), trace.h[0, :, 0].view(3, 128, 4)
    np.testing.assert_allclose(image(figure, "f"), f.mean(2).numpy(), rtol=1e-6)
    farthest = torch.where(h.amax(2) > -h.amin(2), h.amax(2), h.amin(2))
    np.testing.assert_array_equal(image(figure, "h"), farthest.numpy())
    assert axis_of(figure, "f").get_xlabel() == "unit, 4 a column"


def test_many_classes():
    """The likeliest of them, under their own names."""
    trace, yhat = trace_of(), torch.full((5, 90), 1e-3)
    yhat[torch.arange(5), torch.tensor([7, 3, 88, 7, 50])] = 0.9
    yhat[2, 20:29] = 0.01
    names = [chr(33 + k) for k in range(90)]
    shown = [3, 7, *range(20, 29), 50, 88]
    figure = plot.gates(trace, yhat=yhat, classes=names)
    labels = texts(axis_of(figure, "yhat").get_xticklabels())
    assert len(labels) == 12
    assert {"$", "(", "S", "y"} <= set(labels) <= {names[k] for k in shown}
    np.testing.assert_array_equal(image(figure, "yhat")[:, -1], yhat[:, 88].numpy())
    assert texts(axis_of(plot.gates(trace, yhat=yhat), "yhat").get_xticklabels())[-1] == "88"


@pytest.mark.parametrize("H", [1, 127, 128, 129, 257, 1000])
def test_any_width(H):
    pooled = plot.pool(torch.randn(4, H), 128, signed=True)
    assert pooled.shape[0] == 4
    assert min(H, 65) <= pooled.shape[1] <= 128
    assert image(plot.gates(trace_of(H=H)), "o").shape[1] == pooled.shape[1]


def test_long_sequences_have_room_for_their_labels():
    figure = plot.gates(trace_of(L=400), tokens="a" * 400)
    assert len(figure.axes[0].get_yticklabels()) <= 60
    assert figure.get_size_inches()[1] <= 16


def test_packed_sequences_are_drawn_as_long_as_they_are():
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([2, 5]), enforce_sorted=False)
    trace = lstm_ext.trace_gates(nn.LSTM(3, 2), packed)
    assert len(image(plot.gates(trace, sample=0), "c")) == 2
    assert len(image(plot.gates(trace, sample=1), "c")) == 5


def test_projected_and_half():
    figure = trace_of(H=6, proj_size=2).plot()
    assert (image(figure, "c").shape[1], image(figure, "h").shape[1]) == (6, 2)
    half = lstm_ext.trace_gates(nn.LSTM(3, 2).bfloat16(), torch.randn(4, 1, 3).bfloat16())
    assert image(half.plot(), "g").shape == (4, 2)


def test_wrong_options():
    trace = trace_of()
    for options, error in (
        ({"layer": 1}, IndexError), ({"direction": 1}, IndexError), ({"sample": 2}, IndexError),
        ({"tokens": "abc"}, ValueError), ({"yhat": torch.rand(4, 3)}, ValueError),
        ({"yhat": torch.rand(5)}, ValueError), ({"last": 0}, ValueError),
        ({"yhat": torch.rand(5, 3), "classes": "ab"}, ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            plot.gates(trace, **options)


def test_saturation_and_half_life_draw_the_traces_own_figures():
    trace = trace_of(H=4, num_layers=2, bidirectional=True)
    bars = plot.saturation(trace).axes[0]
    heights = [patch.get_height() for patch in bars.patches]
    wanted = [
        share for k in range(4) for share in trace.select(k // 2, k % 2).saturation().values()
    ]
    np.testing.assert_allclose(heights, wanted)
    labels = [text.get_text() for text in bars.get_legend().get_texts()]
    assert labels[1] == "layer 0, backward"
    lines = plot.half_life(trace).axes[0].lines
    for k, line in enumerate(lines):
        np.testing.assert_allclose(
            line.get_ydata(), trace.half_life()[k].sort(descending=True).values.numpy()
        )


def test_histogram_holds_all_values():
    trace = trace_of(H=8)
    axes = plot.histogram(trace).axes
    for axis, name in zip(axes, "ifogch", strict=True):
        values = getattr(trace, name).flatten()
        low, high = axis.get_xlim()
        assert low <= values.min()
        assert values.max() <= high
        bins = [(p.get_x(), p.get_width(), p.get_height()) for p in axis.patches]
        assert sum(width * height for _, width, height in bins) == pytest.approx(1)
        mean = sum((x + width / 2) * width * height for x, width, height in bins)
        assert mean == pytest.approx(values.mean().item(), abs=(high - low) / 80)


@pytest.mark.parametrize("end", ["png", *slow("svg")])
def test_files(end, tmp_path):
    trace = trace_of(H=40)
    for figure in (
        trace.plot(), plot.histogram(trace), plot.saturation(trace), plot.half_life(trace),
    ):  # fmt: skip
        assert isinstance(figure, Figure)
        file = tmp_path / f"picture.{end}"
        figure.savefig(file)
        assert file.stat().st_size > 5000


def test_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "import torch, lstm_ext\n"
        "trace = lstm_ext.trace_gates(torch.nn.LSTM(3, 2), torch.randn(4, 1, 3))\n"
        "trace.plot()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "lstm_ext.plot needs matplotlib: pip install matplotlib" in result.stderr
