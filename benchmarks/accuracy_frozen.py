"""What fewer bits cost trained models: a character model, and a published speaker encoder.

    python benchmarks/accuracy_frozen.py                 trains for some minutes, then prints tables
    pip install --no-deps resemblyzer                    its weights alone are read, if it is there

The character model is that of examples/char_model.py, trained on most of Python's library, and read
out on the modules that it has not seen: bits per character. The speaker encoder (Wan et al. 2018,
three layers) is that of the package resemblyzer, on synthetic voices (vowels of a pulse train
through three resonances, with noise and pauses): the error of its embeddings, which have length 1.
Everyone computes the LSTM alone from the same inputs; the rest of the model is torch's, in float32.
Errors of outputs are those against float64, in percent.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import sys
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
    ours = lstm_ext.LSTM(lstm.input_size, lstm.hidden_size, lstm.num_layers).eval()
    ours.load_state_dict(lstm.state_dict())
    zeros = torch.zeros(lstm.num_layers, x.shape[1], lstm.hidden_size)
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


def voices(N: int, seconds: float = 1.6) -> Tensor:
    """Mel spectra (L, N, 40) of synthetic voices at 16 kHz, as resemblyzer makes them of speech."""
    rate, window, hop = 16000, 400, 160
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
    spectrum = (
        torch.stft(
            torch.stack(waves), window, hop, window=torch.hann_window(window), return_complex=True
        ).abs()
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
        found = outputs(lstm, voices(32))
        exact = embed(found["float64"])
        return table(found, lambda output: float(100 * (embed(output) - exact).norm(dim=1).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--resemblyzer", type=Path, help="its pretrained.pt")
    default = Path(__file__).parent / "results" / "accuracy_frozen.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    tables = {"character model, bits per character": characters(options.steps)}
    package = importlib.util.find_spec("resemblyzer")
    weights = options.resemblyzer
    if weights is None and package is not None and package.submodule_search_locations:
        weights = Path(package.submodule_search_locations[0]) / "pretrained.pt"
    if weights is None:
        print("no resemblyzer: the speaker encoder is left out")
    else:
        tables["speaker encoder, error of the embedding in percent"] = speakers(weights)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": protocol.environment(), "tables": tables}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    for title, rows in tables.items():
        print(f"\n{title}\n{'':36}  outputs off by")
        for name, row in rows.items():
            print(f"{name:36} {row['error_percent']:12.4f} %  {row['measure']:8.4f}")


if __name__ == "__main__":
    main()
