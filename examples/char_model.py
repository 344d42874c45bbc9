"""A character model of Python's own standard library: trains, writes some text, tells the speed.

    python examples/char_model.py                       some two minutes on two cores
    python examples/char_model.py --steps 2000 --layers 2 --prompt "def "
    python examples/char_model.py --save model.pt       and then look inside:
    python -m lstm_ext gates --checkpoint model.pt --text "def main():"

Trains the same model with ``torch.nn.LSTM`` and ``lstm_ext.LSTM``, step by step in turn, from the
same seed on the same text, by truncated backpropagation: the states go on from piece to piece, the
gradients do not. Then it writes text character by character with the second one, frozen
(``lstm_ext.freeze``), and reports tokens (characters) per second of both.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lstm_ext

States = tuple[Tensor, Tensor]
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))


def read_text(modules: int) -> str:
    """Join the sources of the standard library's largest modules, what is not ASCII left out."""
    paths = Path(sysconfig.get_path("stdlib")).glob("*.py")
    largest = sorted(paths, key=lambda path: (-path.stat().st_size, path.name))[:modules]
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in largest)
    return "".join(c for c in text.replace("\t", "    ") if c in set(CHARACTERS))


def encode(text: str) -> Tensor:
    """Map a text to the numbers of its characters, int64 (len(text))."""
    index = {c: k for k, c in enumerate(CHARACTERS)}
    return torch.tensor([index[c] for c in text])


def pieces(text: Tensor, N: int, L: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (L, N): N places of the text, read side by side, over and over."""
    length = (len(text) - 1) // N
    x, y = text[: N * length].view(N, length).t(), text[1 : N * length + 1].view(N, length).t()
    while True:
        for t in range(0, length - L + 1, L):
            yield x[t : t + L], y[t : t + L]


class CharModel(nn.Module):
    """Embedding, LSTM, linear layer: logits of the next character.

    Args:
        lstm_type: ``lstm_ext.LSTM`` or ``torch.nn.LSTM``; the same seed gives the same weights.
        hidden: number of features of the embedding and of the states.
        layers: of the LSTM.
    """

    def __init__(self, lstm_type: Callable[..., nn.Module], hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), hidden)
        self.lstm = lstm_type(hidden, hidden, num_layers=layers)
        self.linear = nn.Linear(hidden, len(CHARACTERS))

    def forward(self, x: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Map characters (L, N) to logits (L, N, 96), and the states to go on from."""
        output, states = self.lstm(self.embedding(x), states)
        return self.linear(output), states


def seeded_model(lstm_type: Callable[..., nn.Module], hidden: int, layers: int) -> CharModel:
    """Build the model; every call gives the same weights."""
    torch.manual_seed(0)
    return CharModel(lstm_type, hidden, layers)


class Trainer:
    """A model, its optimizer, the states of its text, and the time it has taken."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        self.states: States | None = None
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        """Learn from one piece of the text."""
        start = time.perf_counter()
        if self.states is not None:
            self.states = (self.states[0].detach(), self.states[1].detach())
        logits, self.states = self.model(x, self.states)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start


@torch.inference_mode()
def write(model: CharModel, prompt: str, length: int, seed: int) -> tuple[str, float]:
    """Continue the prompt character by character; return the text and characters per second."""
    generator = torch.Generator().manual_seed(seed)
    logits, states = model(encode(prompt).unsqueeze(1))
    text = prompt
    start = time.perf_counter()
    for _ in range(length):
        # A little colder than the model's own probabilities: fewer misspellings.
        k = torch.multinomial((logits[-1, 0] / 0.7).softmax(0), 1, generator=generator)
        text += CHARACTERS[int(k)]
        logits, states = model(k.unsqueeze(1), states)
    return text, length / (time.perf_counter() - start)


def main() -> int:
    """Train both, compare them, write; return the exit status: 1 if their losses differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="pieces of text to learn from")
    parser.add_argument("--modules", type=int, default=40, help="modules of the library to read")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="places of the text, side by side")
    parser.add_argument("--length", type=int, default=64, help="characters of a piece")
    parser.add_argument("--prompt", default="class ", help="what the text begins with (ASCII)")
    parser.add_argument("--save", type=Path, help="write the model here: python -m lstm_ext gates")
    parser.add_argument("--write", type=int, default=400, help="characters to write")
    options = parser.parse_args()

    text = encode(read_text(options.modules))
    print(f"{len(text):,} characters of Python's library, {len(CHARACTERS)} different ones")
    if len(text) <= options.batch * options.length:
        parser.error("the text is too short for this batch and length")
    models = [seeded_model(k, options.hidden, options.layers) for k in (nn.LSTM, lstm_ext.LSTM)]
    trainers = [Trainer(model) for model in models]
    data = pieces(text, options.batch, options.length)
    bar = tqdm(range(options.steps), desc="training both")
    for _ in bar:
        x, y = next(data)
        for trainer in trainers:
            trainer.step(x, y)
        bar.set_postfix(loss=f"{trainers[1].losses[-1]:.3f}")

    torchs, ours = trainers
    tokens = options.steps * options.batch * options.length
    print("\ntraining:  loss               characters per second")
    for name, trainer in (("torch.nn.LSTM", torchs), ("lstm_ext.LSTM", ours)):
        first, last = trainer.losses[0], trainer.losses[-1]
        print(f"  {name}  {first:.3f} -> {last:.3f}   {tokens / trainer.seconds:10,.0f}")
    print(f"  {torchs.seconds / ours.seconds:.2f} times as fast, the rest of the model included")

    if options.save is not None:
        state = models[1].state_dict()
        torch.save({"state_dict": state, "vocabulary": CHARACTERS}, options.save)
    _, torchs_rate = write(models[0].eval(), options.prompt, options.write, seed=1)
    lstm_ext.freeze(models[1].eval())
    written, rate = write(models[1], options.prompt, options.write, seed=1)
    print("\nwriting, one character a call:  characters per second")
    print(f"  torch.nn.LSTM          {torchs_rate:10,.0f}")
    print(f"  lstm_ext.LSTM, frozen  {rate:10,.0f}   {rate / torchs_rate:.2f} times as fast")
    print(f"\n{written}")

    # Rounding grows as training goes on: the first steps tell whether both do the same.
    early = range(min(10, options.steps))
    same = all(abs(ours.losses[k] - torchs.losses[k]) < 1e-3 for k in early)
    print(f"\n{'ok   ' if same else 'WRONG'} both losses are the same over the first steps")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
