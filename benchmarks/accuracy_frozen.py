"""What fewer bits cost trained models: two that are trained here, and two published ones.

    python benchmarks/accuracy_frozen.py                 trains for some minutes, then prints tables
    pip install --no-deps resemblyzer silero-vad         their weights alone are read, if there

The character model is that of examples/char_model.py, trained on most of Python's library, and read
out on the modules that it has not seen: bits per character. The tagger, of one layer in two
directions, is trained on the same library and marks in its characters what Python's own tokenizer
finds (keywords, names that are defined or called, strings, comments, numbers): the F1 of whole
spans in modules that it has not seen, in percent. The speaker encoder (Wan et al. 2018, three
layers) is that of the package resemblyzer, on synthetic voices (vowels of a pulse train through
three resonances, with noise and pauses): the error of its embeddings, which have length 1.
silero-vad's cell, behind its own encoder, hears such voices for longer: how far its probability of
speech is off, on average, in percentage points.

Everyone computes the LSTM alone from the same inputs; the rest of the model is torch's, in float32.
Errors of outputs are those against float64, in percent.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import itertools
import json
import keyword
import math
import sys
import sysconfig
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol
import sequence_peers as peers
import torch
from bench_frozen import AO, KINDS, ORT_INT8, torch_ao
from torch import Tensor, nn
from tqdm import tqdm

import lstm_ext

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import char_model


def outputs(lstm: nn.LSTM, x: Tensor) -> dict[str, Tensor]:
    """Run a trained layer in every way, on x (L, N, I) from zero states."""
    sizes = lstm.input_size, lstm.hidden_size, lstm.num_layers
    ours = lstm_ext.LSTM(*sizes, bidirectional=lstm.bidirectional).eval()
    ours.load_state_dict(lstm.state_dict())
    layers = lstm.num_layers * (2 if lstm.bidirectional else 1)
    zeros = torch.zeros(layers, x.shape[1], lstm.hidden_size)
    found = {"float64": copy.deepcopy(lstm).double()(x.double())[0]}
    for kind, options in KINDS.items():
        found[f"lstm_ext {kind}"] = lstm_ext.freeze(copy.deepcopy(ours), **options)(x)[0]
    found[AO] = torch_ao(lstm)(x)[0]
    for name in (peers.ORT, ORT_INT8):
        worker = peers.Onnxruntime(ours, x, (zeros, zeros), quantized=name == ORT_INT8)
        found[name] = worker.output
        worker.close()
    return found


def table(found: dict[str, Tensor], measure: Callable[[Tensor], float]) -> dict[str, Any]:
    """Of each: the error of the outputs in percent, and what the model makes of them."""
    exact = found["float64"]
    return {
        name: {
            "error_percent": float(100 * (output - exact).norm() / exact.norm()),
            "measure": measure(output),
        }
        for name, output in found.items()
    }


def characters(steps: int) -> dict[str, Any]:
    """Bits per character of text that the model has not seen."""
    text = char_model.encode(char_model.read_text(60))
    held_out = len(text) // 10
    model = char_model.seeded_model(lstm_ext.LSTM, 256, 1)
    trainer = char_model.Trainer(model)
    data = char_model.pieces(text[:-held_out], 32, 64)
    for _ in tqdm(range(steps), desc="characters"):
        trainer.step(*next(data))
    model.eval()
    x, y = next(char_model.pieces(text[-held_out:], 8, 4000))
    plain = nn.LSTM(256, 256).eval()
    plain.load_state_dict(model.lstm.state_dict())

    def bits(output: Tensor) -> float:
        logits = model.linear.to(output.dtype)(output)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        return float(loss) / math.log(2)

    with torch.no_grad():
        return table(outputs(plain, model.embedding(x)), bits)


# What the tagger finds; 0 is all else.
KEYWORD, DEFINED, CALLED, STRING, COMMENT, NUMBER = range(1, 7)
TOKENS = {tokenize.STRING: STRING, tokenize.COMMENT: COMMENT, tokenize.NUMBER: NUMBER}


def tags(text: str) -> list[int]:
    """The tag of each character of a Python source."""
    found = [0] * len(text)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for before, token, after in zip(
        [tokens[0], *tokens[:-1]], tokens, [*tokens[1:], tokens[-1]], strict=True
    ):
        tag = TOKENS.get(token.type, 0)
        if token.type == tokenize.NAME:
            if keyword.iskeyword(token.string):
                tag = KEYWORD
            elif before.string in ("def", "class"):
                tag = DEFINED
            elif after.string == "(":
                tag = CALLED
        begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        found[begin:end] = [tag] * (end - begin)
    return found


def spans(row: list[int]) -> set[tuple[int, int, int]]:
    """Where the tags of a text begin and end, and which they are."""
    edges = [k for k in range(len(row) + 1) if k in (0, len(row)) or row[k] != row[k - 1]]
    return {(a, b, row[a]) for a, b in itertools.pairwise(edges) if row[a]}


def f1(found: Tensor, right: Tensor) -> float:
    """Of spans that are right as a whole, over all rows of tags (N, L), in percent."""
    hits = total = 0
    for a, b in zip(found.tolist(), right.tolist(), strict=True):
        a_spans, b_spans = spans(a), spans(b)
        hits += 2 * len(a_spans & b_spans)
        total += len(a_spans) + len(b_spans)
    return 100 * hits / total


class Tagger(nn.Module):
    """Embedding, LSTM in two directions, linear layer: logits (L, N, 7) of characters (L, N)."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(char_model.CHARACTERS), 32)
        self.lstm = lstm_ext.LSTM(32, hidden, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters to logits."""
        logits: Tensor = self.linear(self.lstm(self.embedding(x))[0])
        return logits


def tagged_pieces(modules: int, L: int) -> tuple[Tensor, Tensor]:
    """Characters and tags (L, N) of the library's largest modules, cut into pieces."""
    paths = Path(sysconfig.get_path("stdlib")).glob("*.py")
    largest = sorted(paths, key=lambda path: (-path.stat().st_size, path.name))[:modules]
    x, y = [], []
    for path in largest:
        text = path.read_text(encoding="utf-8", errors="ignore").expandtabs(4)
        if not set(text) <= set(char_model.CHARACTERS):
            continue  # tags would stand elsewhere
        count = len(text) // L
        x.append(char_model.encode(text)[: count * L].view(count, L))
        y.append(torch.tensor(tags(text))[: count * L].view(count, L))
    return torch.cat(x).t(), torch.cat(y).t()


def tagger(steps: int) -> dict[str, Any]:
    """F1 of the spans in modules that the tagger has not seen, in percent."""
    x, y = tagged_pieces(80, 128)
    held_out = x.shape[1] // 10
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in tqdm(range(steps), desc="tagger"):
        rows = torch.randint(x.shape[1] - held_out, (32,))
        loss = nn.functional.cross_entropy(model(x[:, rows]).flatten(0, 1), y[:, rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    plain = nn.LSTM(32, model.lstm.hidden_size, bidirectional=True).eval()
    plain.load_state_dict(model.lstm.state_dict())
    x, y = x[:, -held_out:], y[:, -held_out:]

    def score(output: Tensor) -> float:
        return f1(model.linear.to(output.dtype)(output).argmax(-1).t(), y.t())

    with torch.no_grad():
        return table(outputs(plain, model.embedding(x)), score)


RATE = 16000  # of sound, a second


def voices(N: int, seconds: float) -> Tensor:
    """Sound (N, samples) of synthetic voices."""
    rate = RATE
    time = torch.arange(int(rate * seconds)) / rate
    generator = torch.Generator().manual_seed(0)
    waves = []
    for _ in range(N):
        low, *vowels = torch.rand(13, generator=generator).tolist()
        pitch = 90 + 150 * low + 10 * torch.sin(2 * math.pi * 3 * time)
        phase = torch.cumsum(pitch / rate, 0)
        wave = torch.zeros_like(time)
        for k in range(1, 40):
            loudness = torch.zeros_like(time)
            for j in range(3):  # resonances that move from one vowel to the next
                start, end = (500, 1500, 2500)[j] + 400 * vowels[j], 300 * vowels[j + 3] + 800 * j
                centre = start + (end - start) * (0.5 + 0.5 * torch.sin(2 * math.pi * 2 * time))
                loudness += torch.exp(-(((k * pitch - centre) / 120) ** 2)) / (j + 1)
            wave += loudness * torch.sin(2 * math.pi * k * phase)
        syllables = (torch.sin(2 * math.pi * (3 + 2 * vowels[-1]) * time) > -0.5).float()
        noise = 0.003 * torch.randn(len(time), generator=generator)
        waves.append(0.1 * wave / wave.abs().max() * syllables + noise)
    return torch.stack(waves)


def mel_spectra(waves: Tensor) -> Tensor:
    """Spectra (L, N, 40) as resemblyzer makes them of speech."""
    rate, window, hop = RATE, 400, 160
    spectrum = (
        torch.stft(waves, window, hop, window=torch.hann_window(window), return_complex=True).abs()
        ** 2
    )
    mel = torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), 42)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.linspace(0, rate / 2, spectrum.shape[1])
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp_min(0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (filters @ spectrum).permute(2, 0, 1)[:160].contiguous()


def speakers(weights: Path) -> dict[str, Any]:
    """Error of the embeddings, in percent; the embedding is of the last hidden state."""
    state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
    lstm, linear = nn.LSTM(40, 256, 3).eval(), nn.Linear(256, 256)
    lstm.load_state_dict({k.removeprefix("lstm."): v for k, v in state.items() if "lstm." in k})
    linear.load_state_dict(
        {k.removeprefix("linear."): v for k, v in state.items() if "linear." in k}
    )

    def embed(output: Tensor) -> Tensor:
        return nn.functional.normalize(linear.to(output.dtype)(output[-1]).relu().double(), dim=1)

    with torch.no_grad():
        found = outputs(lstm, mel_spectra(voices(32, 1.6)))
        exact = embed(found["float64"])
        return table(found, lambda output: float(100 * (embed(output) - exact).norm(dim=1).mean()))


def speech(path: Path) -> dict[str, Any]:
    """How far the probability of speech is off on average, in percentage points."""
    model = torch.jit.load(str(path), map_location="cpu")._model.eval()
    state = model.state_dict()
    lstm = nn.LSTM(128, 128).eval()
    lstm.load_state_dict(
        {f"{n}_l0": state[f"decoder.rnn.{n}"] for n in lstm_ext.LSTMCell(1, 1).state_dict()}
    )
    weight, bias = (state[f"decoder.decoder.2.{n}"] for n in ("weight", "bias"))
    step, context = 512, 64  # samples; of the step before

    def probability(output: Tensor) -> Tensor:
        logit = output.relu() @ weight[0, :, 0].to(output.dtype) + bias.to(output.dtype)
        return logit.sigmoid().double()

    with torch.no_grad():
        waves = nn.functional.pad(voices(16, 5.0), (context, 0))
        frames = waves.unfold(1, step + context, step).transpose(0, 1)  # (L, N, samples)
        features = model.encoder(model.stft(frames.flatten(0, 1))).squeeze(-1)
        found = outputs(lstm, features.unflatten(0, frames.shape[:2]))
        exact = probability(found["float64"])
        heard = float((exact > 0.5).double().mean())
        print(f"silero-vad hears speech in {heard:.0%} of the frames")
        return table(found, lambda output: float(100 * (probability(output) - exact).abs().mean()))


def find_in_package(package: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / file if places else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--resemblyzer", type=Path, help="its pretrained.pt")
    parser.add_argument("--silero", type=Path, help="its silero_vad.jit")
    default = Path(__file__).parent / "results" / "accuracy_frozen.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    tables = {
        "character model, bits per character": characters(options.steps),
        "tagger, F1 in percent": tagger(options.steps),
    }
    published = (
        (
            "speaker encoder, error of the embedding in percent",
            speakers,
            options.resemblyzer or find_in_package("resemblyzer", "pretrained.pt"),
        ),
        (
            "silero-vad, error of the probability in percentage points",
            speech,
            options.silero or find_in_package("silero_vad", "data/silero_vad.jit"),
        ),
    )
    for title, measure, weights in published:
        if weights is None:
            print(f"not installed, and left out: {title}")
        else:
            tables[title] = measure(weights)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": protocol.environment(), "tables": tables}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    for title, rows in tables.items():
        print(f"\n{title}\n{'':36}  outputs off by")
        for name, row in rows.items():
            print(f"{name:36} {row['error_percent']:12.4f} %  {row['measure']:8.4f}")


if __name__ == "__main__":
    main()
