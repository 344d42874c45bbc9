"""Pictures of gate traces: what is drawn is what the trace holds, and every size can be."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext import plot


def trace_of(H=2, L=5, N=2, **options):
    return lstm_ext.trace_gates(nn.LSTM(3, H, **options), torch.randn(L, N, 3))


def image(axis):
    return np.asarray(axis.get_images()[0].get_array())


def test_gates_are_the_lectures_two_maps():
    trace = trace_of()
    yhat = torch.rand(5, 3).softmax(1)
    figure = trace.plot(sample=1, tokens="hello", yhat=yhat, classes="abB", title="hello")
    left, right, bar = figure.axes
    values = {name: getattr(trace, name)[0, :, 1].numpy() for name in "ifogch"}
    np.testing.assert_array_equal(image(left), np.hstack([values[k] for k in "ifo"]))
    np.testing.assert_array_equal(image(right), np.hstack([*(values[k] for k in "gch"), yhat]))
    for axis in (left, right):
        drawn = axis.get_images()[0]
        assert drawn.get_cmap().name == "bwr"
        assert drawn.get_clim() == (-1, 1)
    assert [label.get_text() for label in left.get_yticklabels()] == [
        f"{t}  {token!r}" for t, token in enumerate("hello")
    ]
    assert [label.get_text() for label in right.get_xticklabels()][-3:] == list("abB")
    assert [text.get_text().split(",")[0] for text in left.texts] == ["i", "f", "o"]
    assert [text.get_text().split(",")[0] for text in right.texts] == ["g", "c", "h", "ŷ"]
    assert left.get_ylabel() == "time step and input"
    assert figure.get_suptitle() == "hello"
    assert bar.get_ylim() == (-1, 1)


def test_last_steps_layers_and_directions():
    trace = trace_of(num_layers=2, bidirectional=True)
    figure = plot.gates(trace, layer=0, direction=1, last=2, tokens="hello")
    left = figure.axes[0]
    np.testing.assert_array_equal(image(left)[:, 2:4], trace.f[1, 3:, 0].numpy())
    assert [label.get_text() for label in left.get_yticklabels()] == ["3  'l'", "4  'o'"]
    assert len(image(plot.gates(trace, last=100).axes[0])) == 5


def test_wide_layers_are_pooled():
    trace = trace_of(H=512, L=3)
    left, right, _ = plot.gates(trace).axes
    assert image(left).shape == image(right).shape == (3, 96)
    f, h = trace.f[0, :, 0].view(3, 32, 16), trace.h[0, :, 0].view(3, 32, 16)
    np.testing.assert_allclose(image(left)[:, 32:64], f.mean(2).numpy(), rtol=1e-6)
    farthest = torch.where(h.amax(2) > -h.amin(2), h.amax(2), h.amin(2))
    np.testing.assert_array_equal(image(right)[:, 64:], farthest.numpy())
    assert "512 units, 16 a column" in left.texts[0].get_text()


@pytest.mark.parametrize("H", [1, 31, 32, 33, 65, 1000])
def test_any_width(H):
    pooled = plot.pool(torch.randn(4, H), 32, signed=True)
    assert pooled.shape[0] == 4
    assert min(H, 17) <= pooled.shape[1] <= 32
    left, _, _ = plot.gates(trace_of(H=H)).axes
    assert image(left).shape[1] == 3 * pooled.shape[1]


def test_long_sequences_have_room_for_their_labels():
    figure = plot.gates(trace_of(L=400), tokens="a" * 400)
    assert len(figure.axes[0].get_yticklabels()) <= 60
    assert figure.get_size_inches()[1] <= 16


def test_packed_sequences_are_drawn_as_long_as_they_are():
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([2, 5]), enforce_sorted=False)
    trace = lstm_ext.trace_gates(nn.LSTM(3, 2), packed)
    assert len(image(plot.gates(trace, sample=0).axes[0])) == 2
    assert len(image(plot.gates(trace, sample=1).axes[0])) == 5


def test_projected_and_half():
    assert image(trace_of(H=6, proj_size=2).plot().axes[1]).shape[1] == 6 + 6 + 2
    half = lstm_ext.trace_gates(nn.LSTM(3, 2).bfloat16(), torch.randn(4, 1, 3).bfloat16())
    assert image(half.plot().axes[0]).shape == (4, 6)


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


@pytest.mark.parametrize("end", ["png", "svg"])
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
