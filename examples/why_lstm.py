"""Why an LSTM? The lecture's claim, measured: RNN and LSTM trained alike, over several seeds.

    python examples/why_lstm.py                    some twenty minutes on one core
    python examples/why_lstm.py --quick            the script itself, in seconds
    python examples/why_lstm.py --out docs/why_lstm        writes why_lstm.json and why_lstm.png

The claim: an LSTM remembers longer than an RNN, partly because its h can hold values away from -1
and 1. Two tasks: the lecture's text, where the next character depends on what came two steps
before; and recall, where the first symbol of a sequence is asked for k steps later, with symbols
that do not matter between. Measured on each: the loss, the share of right answers, and the share of
h with |h| > 0.9. "RNN" has as many units as the LSTM, "RNN, wide" as many parameters; "LSTM, open"
starts with its forget gates open: FORGET_BIAS is added to their bias, which torch draws about zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lstm_ext
from lstm_ext.cli import lecture

SYMBOLS = 4  # to remember one of
FORGET_BIAS = 3.0  # sigmoid(3) = 0.95: half of c is left after 14 steps
GAPS = [2, 3, 5, 7, 10, 14, 20, 28, 40, 50]
Results = list[dict[str, Any]]


class Model(nn.Module):
    """A recurrent layer and a linear one.

    Args:
        kind: ``nn.RNN`` or ``lstm_ext.LSTM``.
        inputs: number of features of a step.
        hidden: number of units.
        classes: number of answers.
    """

    def __init__(self, kind: Callable[..., nn.Module], inputs: int, hidden: int, classes: int):
        super().__init__()
        self.layer = kind(inputs, hidden)
        self.linear = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (L, N, I) to logits (L, N, classes) and the h of every step (L, N, H)."""
        output, _ = self.layer(x)
        return self.linear(output), output


def open_lstm(inputs: int, hidden: int) -> nn.Module:
    """Build an LSTM whose forget gates are open at first (Gers et al. 2000; Jozefowicz 2015)."""
    layer = lstm_ext.LSTM(inputs, hidden)
    with torch.no_grad():
        layer.bias_ih_l0[hidden : 2 * hidden] += FORGET_BIAS
    return layer


def kinds(inputs: int, hidden: int) -> dict[str, tuple[Callable[..., nn.Module], int]]:
    """Name the layers and their sizes; the wide RNN's gives it the LSTM's parameters."""
    wanted = sum(p.numel() for p in lstm_ext.LSTM(inputs, hidden).parameters())
    wide = hidden
    while sum(p.numel() for p in nn.RNN(inputs, wide).parameters()) < wanted:
        wide += 1
    return {
        "RNN": (nn.RNN, hidden),
        "RNN, wide": (nn.RNN, wide),
        "LSTM": (lstm_ext.LSTM, hidden),
        "LSTM, open": (open_lstm, hidden),
    }


def saturated(h: Tensor) -> float:
    """Return the share of |h| > 0.9."""
    return (h.abs() > 0.9).double().mean().item()


def recall(gap: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences of gap + 1 steps; the first step's symbol is the answer after the last.

    Returns:
        x, (gap + 1, batch, SYMBOLS + 1): one-hot symbols, and in the last place, at the last step,
        the question; and the answers (batch).
    """
    symbols = torch.randint(SYMBOLS, (gap + 1, batch), generator=generator)
    x = nn.functional.one_hot(symbols, SYMBOLS + 1).float()
    x[-1] = 0
    x[-1, :, -1] = 1
    return x, symbols[0]


def learn_recall(name: str, gap: int, seed: int, steps: int, hidden: int) -> dict[str, Any]:
    """Train one layer on one gap, and measure it on sequences it has not seen."""
    torch.manual_seed(seed)
    kind, size = kinds(SYMBOLS + 1, hidden)[name]
    model = Model(kind, SYMBOLS + 1, size, SYMBOLS)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = recall(gap, 64, generator)
        loss = nn.functional.cross_entropy(model(x)[0][-1], y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        x, y = recall(gap, 2000, torch.Generator().manual_seed(10_000 + seed))
        logits, h = model(x)
        return {
            "loss": nn.functional.cross_entropy(logits[-1], y).item(),
            "accuracy": (logits[-1].argmax(1) == y).double().mean().item(),
            "saturated": saturated(h),
        }


def learn_text(name: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one layer on the lecture's text, as the lecture does."""
    torch.manual_seed(seed)
    kind, size = kinds(len(lecture.VOCABULARY), lecture.HIDDEN_SIZE)[name]
    model = Model(kind, len(lecture.VOCABULARY), size, len(lecture.VOCABULARY))
    x, y = lecture.data()
    optimizer = torch.optim.Adam(model.parameters(), lr=lecture.LEARNING_RATE)
    for _ in range(epochs):
        loss = nn.functional.cross_entropy(model(x.unsqueeze(1))[0][:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits, h = model(x.unsqueeze(1))
        return {
            "loss": nn.functional.cross_entropy(logits[:, 0], y).item(),
            "accuracy": (logits[:, 0].argmax(1) == y.argmax(1)).double().mean().item(),
            "saturated": saturated(h),
        }


def study(options: argparse.Namespace) -> Results:
    """Run both tasks over all seeds; a dict a run."""
    names = list(kinds(1, 1))
    runs: Results = [
        {"task": "text", "layer": name, "gap": 2, "seed": seed}
        for name in names
        for seed in range(options.seeds)
    ]
    runs += [
        {"task": "recall", "layer": name, "gap": gap, "seed": seed}
        for gap in options.gaps
        for name in names
        for seed in range(options.seeds)
    ]
    for run in tqdm(runs, desc="runs"):
        if run["task"] == "text":
            run.update(learn_text(run["layer"], run["seed"], options.epochs))
        else:
            run.update(
                learn_recall(run["layer"], run["gap"], run["seed"], options.steps, options.hidden)
            )
    return runs


def rows(runs: Results) -> list[tuple[str, str, int, Results]]:
    """Group the runs by task, layer and gap."""
    groups: dict[tuple[str, str, int], Results] = {}
    for run in runs:
        groups.setdefault((run["task"], run["layer"], run["gap"]), []).append(run)
    return [(*key, group) for key, group in groups.items()]


def middle(group: Results, what: str) -> float:
    """Return the median over the seeds."""
    return statistics.median(run[what] for run in group)


def correlation(runs: Results) -> float:
    """Return Spearman's rank correlation of the share of saturated h with the loss."""
    if len(runs) < 3:
        return float("nan")
    ranks = []
    for what in ("saturated", "loss"):
        values = torch.tensor([run[what] for run in runs], dtype=torch.float64)
        ranks.append(values.argsort().argsort().double())
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def table(runs: Results) -> str:
    """Write a Markdown table: medians over the seeds, the worst and best in brackets."""
    lines = [
        "| task | steps back | layer | right answers | loss | h with abs > 0.9 |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for task, layer, gap, group in rows(runs):
        right = [run["accuracy"] for run in group]
        lines.append(
            f"| {task} | {gap} | {layer} | {statistics.median(right):.1%} "
            f"({min(right):.0%} - {max(right):.0%}) | {middle(group, 'loss'):.4f} "
            f"| {middle(group, 'saturated'):.0%} |"
        )
    return "\n".join(lines)


def draw(runs: Results, picture: Path) -> None:
    """Save accuracy and saturation against the gap: the median, and the band of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    grouped = [row for row in rows(runs) if row[0] == "recall"]
    for axis, what, label in (
        (axes[0], "accuracy", "right answers"),
        (axes[1], "saturated", "share of h with |h| > 0.9"),
    ):
        for name in dict.fromkeys(row[1] for row in grouped):
            points = [(gap, group) for _, layer, gap, group in grouped if layer == name]
            gaps = [gap for gap, _ in points]
            (line,) = axis.plot(
                gaps, [middle(group, what) for _, group in points], "o-", label=name
            )
            axis.fill_between(
                gaps,
                [min(run[what] for run in group) for _, group in points],
                [max(run[what] for run in group) for _, group in points],
                color=line.get_color(),
                alpha=0.15,
            )
        axis.set(xlabel="steps between symbol and question", ylabel=label, ylim=(0, 1.03))
    axes[0].axhline(1 / SYMBOLS, color="black", linewidth=0.8, linestyle=":", label="guessing")
    axes[0].legend(loc="lower left")
    figure.suptitle("Recall of the first symbol: median and range over the seeds")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the study, print its table and what it says of the claim."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--gaps", type=int, nargs="+", default=GAPS)
    parser.add_argument("--hidden", type=int, default=32, help="units, in the task of recall")
    parser.add_argument(
        "--steps", type=int, default=1500, help="batches of 64 sequences to learn from"
    )
    parser.add_argument("--epochs", type=int, default=1000, help="passes over the lecture's text")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--out", type=Path, help="path of .json and .png, without the ending")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.gaps, options.steps, options.epochs = 2, [2, 5], 5, 5
    runs = study(options)
    print("\n" + table(runs))
    for name in dict.fromkeys(run["layer"] for run in runs):
        own = [run for run in runs if run["layer"] == name and run["task"] == "recall"]
        print(f"{name}: rank correlation of saturated h with the loss {correlation(own):+.2f}")
    if options.out is not None:
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        content = {"torch": torch.__version__, "settings": settings, "runs": runs}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        draw(runs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
