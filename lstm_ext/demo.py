"""``python -m lstm_ext demo``: train the lecture's model, check the numbers, show the speed."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import benchmark

import lstm_ext
from lstm_ext import lecture

# Batch, input size, hidden size.
SHAPES = [(1, 3, 2), (16, 128, 128), (64, 512, 512)]


def run(epochs: int, picture: Path) -> bool:
    """Run the demo and print what it finds.

    Args:
        epochs: passes over the text, for each of the two cells and two layers.
        picture: where to save the chart.

    Returns:
        Whether every number agreed.

    Raises:
        ImportError: if tqdm or matplotlib is missing (``pip install lstm_ext[demo]``).
    """
    from tqdm import tqdm

    print(f"The text is {lecture.TEXT[:12]}..., {len(lecture.TEXT)} characters; the model predicts")
    print(f"the next one with LSTMCell(3, {lecture.HIDDEN_SIZE}), then LSTM, and a linear layer.\n")
    agreed = check_numbers()

    losses: dict[str, list[float]] = {}
    lecture.train(lecture.seeded_model(nn.LSTMCell), range(1))  # the first step imports, untimed
    for build, kinds in (
        (lecture.seeded_model, (lstm_ext.LSTMCell, nn.LSTMCell)),
        (lecture.seeded_layer_model, (lstm_ext.LSTM, nn.LSTM)),
    ):
        seconds, final = [], []
        for kind, package in zip(kinds, ("lstm_ext", "torch.nn"), strict=True):
            name = f"{package}.{kind.__name__}"
            model = build(kind)
            start = time.perf_counter()
            losses[name] = lecture.train(model, tqdm(range(epochs), desc=f"training {name}"))
            seconds.append(time.perf_counter() - start)
            final.append(losses[name][-1])
            guess = lecture.next_characters(model, "abaBabaB")
            print(f"  loss {losses[name][0]:.4f} -> {final[-1]:.6f}; after abaBabaB: {guess}")
        ours, torchs = seconds
        print(f"  {ours:.2f} s and {torchs:.2f} s: {torchs / ours:.1f} times as fast")
        agreed &= report("loss after training", abs(final[0] - final[1]) < 0.01 * final[1])
    print()

    speed = compare_speed()
    draw(losses, speed, picture)
    print(f"\nPicture: {picture}")
    return agreed


def report(what: str, right: bool) -> bool:
    """Print one checked fact and return it."""
    print(f"  {'ok   ' if right else 'WRONG'} {what}")
    return right


def check_numbers() -> bool:
    """Compare the untrained cell with torch's and with the reference, over the whole text."""
    x, _ = lecture.data()
    ours = lecture.seeded_model(lstm_ext.LSTMCell).cell
    torchs = lecture.seeded_model(nn.LSTMCell).cell
    weights = tuple(torchs.parameters())
    agreed = True
    states = [(torch.zeros(1, 2), torch.zeros(1, 2))] * 3
    with torch.no_grad():
        for step, row in enumerate(x.unsqueeze(1)):
            states = [
                ours(row, states[0]),
                torchs(row, states[1]),
                lstm_ext.reference.lstm_cell(row, states[2], *weights),
            ]
            if step in (0, len(x) - 1):
                print(f"step {step + 1}: {show('h', states[0][0])}, {show('c', states[0][1])}")
                for name, other in (("torch.nn.LSTMCell", states[1]), ("reference", states[2])):
                    same = all(
                        torch.allclose(a, b, atol=1e-6)
                        for a, b in zip(states[0], other, strict=True)
                    )
                    agreed &= report(f"equal to {name}'s", same)
    print()
    return agreed


def show(name: str, state: Tensor) -> str:
    """Format a state to four decimals."""
    return f"{name} = ({', '.join(f'{value:.4f}' for value in state.flatten().tolist())})"


def compare_speed() -> dict[str, dict[str, tuple[float, float]]]:
    """Time both cells on a few shapes; microseconds of (ours, torch's) by mode and shape."""
    threads = torch.get_num_threads()
    print(f"Speed, microseconds per call on {threads} thread(s), ours and torch's:")
    speed: dict[str, dict[str, tuple[float, float]]] = {"inference": {}, "training step": {}}
    for N, I, H in SHAPES:
        x, h, c, grad = (torch.randn(N, size) for size in (I, H, H, H))
        for mode in speed:
            times = []
            for cell in (lstm_ext.LSTMCell(I, H), nn.LSTMCell(I, H)):
                names = {"cell": cell, "x": x, "hx": (h, c), "grads": (grad, grad), "torch": torch}
                statement = "cell(x, hx)"
                if mode == "training step":
                    statement = "torch.autograd.backward(cell(x, hx), grads)"
                with torch.set_grad_enabled(mode == "training step"):
                    timer = benchmark.Timer(statement, globals=names, num_threads=threads)
                    times.append(timer.blocked_autorange(min_run_time=0.3).median * 1e6)
            speed[mode][f"{N} x {I} -> {H}"] = (times[0], times[1])
            print(
                f"  {mode:13} {N:3} x {I:3} -> {H:3}: {times[0]:9.1f} {times[1]:9.1f}   "
                f"{times[1] / times[0]:.1f} times as fast"
            )
    return speed


def draw(
    losses: dict[str, list[float]],
    speed: dict[str, dict[str, tuple[float, float]]],
    picture: Path,
) -> None:
    """Save the loss curves and the speed-up bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for k, (name, curve) in enumerate(losses.items()):
        left.semilogy(curve, ("-", "--", "-.", ":")[k], label=name)
    left.set(title="Loss on the lecture's text", xlabel="epoch", ylabel="cross-entropy")
    left.legend()
    width = 0.4
    for k, (mode, rows) in enumerate(speed.items()):
        ratios = [torchs / ours for ours, torchs in rows.values()]
        bars = right.bar(
            [i + (k - 0.5) * width for i in range(len(rows))], ratios, width, label=mode
        )
        right.bar_label(bars, fmt="%.1f")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xticks(range(len(SHAPES)), [f"{N} x {I} -> {H}" for N, I, H in SHAPES])
    right.set(title="Speed relative to torch.nn.LSTMCell (= 1)", xlabel="batch x input -> hidden")
    right.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
