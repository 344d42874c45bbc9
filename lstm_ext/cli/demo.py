"""``python -m lstm_ext demo``: train the lecture's model, check the numbers, show the speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lstm_ext
from lstm_ext.cli import bench, lecture


def run(epochs: int, picture: Path, save: Path | None = None) -> dict[str, Any]:
    """Run the demo and print what it finds.

    Args:
        epochs: passes over the text, for our cell and both layers; torch's cell, which takes
            longest by far, makes a fifth of them.
        picture: where to save the chart.
        save: where to write the trained model of a layer, if anywhere.

    Returns:
        ``agreed``, whether every number did; ``losses`` after training by module; ``speed``, the
        rows of :func:`lstm_ext.cli.bench.measure`.

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
        seconds, common = [], epochs
        for kind, package in zip(kinds, ("lstm_ext", "torch.nn"), strict=True):
            name = f"{package}.{kind.__name__}"
            model = build(kind)
            passes = max(1, epochs // 5) if kind is nn.LSTMCell else epochs
            start = time.perf_counter()
            losses[name] = lecture.train(model, tqdm(range(passes), desc=f"training {name}"))
            seconds.append((time.perf_counter() - start) / passes)
            common = min(common, passes)
            if save is not None and kind is lstm_ext.LSTM:
                torch.save(
                    {"state_dict": model.state_dict(), "vocabulary": lecture.VOCABULARY}, save
                )
            first, last = losses[name][0], losses[name][-1]
            guess = lecture.next_characters(model, "abaBabaB")
            print(f"  {passes} epochs: loss {first:.4f} -> {last:.6f}; after abaBabaB: {guess}")
        ours, torchs = (1e3 * s for s in seconds)
        print(f"  {ours:.1f} ms and {torchs:.1f} ms an epoch: {torchs / ours:.1f} times as fast")
        at_common = [curve[common - 1] for curve in list(losses.values())[-2:]]
        agreed &= report(
            f"loss after {common} epochs", abs(at_common[0] - at_common[1]) < 0.01 * at_common[1]
        )
    print()

    threads = torch.get_num_threads()
    print(f"Speed, microseconds per call on {threads} thread(s), ours and torch's:")
    speed = bench.measure(bench.CELLS)
    for row in speed:
        print(bench.line(row))
    draw(losses, speed, picture)
    print(f"\nPicture: {picture}")
    if save is not None:
        print(
            f"Model: {save}; look inside: python -m lstm_ext gates --checkpoint {save} --text abaB"
        )
    return {
        "agreed": agreed,
        "losses": {name: curve[-1] for name, curve in losses.items()},
        "speed": speed,
    }


def report(what: str, right: bool) -> bool:
    """Print one checked fact and return it."""
    print(f"  {'ok   ' if right else 'WRONG'} {what}")
    return right


def check_numbers() -> bool:
    """Compare the untrained cell with torch's and with the reference, over the whole text."""
    x, _ = lecture.data()
    ours = lecture.seeded_model(lstm_ext.LSTMCell).cell
    torchs = lecture.seeded_model(nn.LSTMCell).cell
    w_ih, w_hh, b_ih, b_hh = torchs.parameters()
    agreed = True
    states = [(torch.zeros(1, 2), torch.zeros(1, 2))] * 3
    with torch.no_grad():
        for step, row in enumerate(x.unsqueeze(1)):
            states = [
                ours(row, states[0]),
                torchs(row, states[1]),
                lstm_ext.reference.lstm_cell(row, states[2], w_ih, w_hh, b_ih, b_hh),
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


def draw(
    losses: dict[str, list[float]],
    speed: list[dict[str, Any]],
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
    for k, mode in enumerate(bench.MODES):
        ratios = [row["ratio"] for row in speed if row["mode"] == mode]
        bars = right.bar(
            [i + (k - 0.5) * width for i in range(len(ratios))], ratios, width, label=mode
        )
        right.bar_label(bars, fmt="%.1f")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xticks(range(len(bench.CELLS)), [bench.name(shape) for shape in bench.CELLS])
    right.set(title="Speed relative to torch.nn.LSTMCell (= 1)", xlabel="batch x input -> hidden")
    right.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
