"""Character models from saved weights: what ``python -m lstm_ext gates`` looks into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lstm_ext import _variants
from lstm_ext.inspect.gates import GateTrace, trace_gates
from lstm_ext.layer import LSTM


class CharacterModel:
    """An LSTM over characters, from the weights of any model that has one.

    Attributes:
        lstm: its LSTM.
        vocabulary: V characters, in the order of the model's numbers.
        embedding: (V, I), or None: characters enter one-hot, and I = V.
        linear: weight (V, D H) and bias (V) or None, to the logits of the next character; or None.
    """

    def __init__(
        self,
        lstm: LSTM,
        vocabulary: str,
        embedding: Tensor | None = None,
        linear: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.lstm = lstm.eval()
        self.vocabulary = vocabulary
        self.embedding = embedding
        self.linear = linear

    def trace(self, text: str) -> tuple[GateTrace, Tensor | None]:
        """Trace the LSTM along a text of L characters.

        Args:
            text: in the vocabulary's characters.

        Returns:
            The trace, N = 1, and the probabilities of the next character (L, V), or None where the
            model has no linear layer.

        Raises:
            ValueError: the text is empty, or has a character that the vocabulary lacks.
        """
        if not text:
            raise ValueError("the text is empty")
        unknown = sorted(set(text) - set(self.vocabulary))
        if unknown:
            raise ValueError(
                f"the text has {', '.join(map(repr, unknown))}, which the model's vocabulary of "
                f"{len(self.vocabulary)} characters lacks"
            )
        index = torch.tensor([self.vocabulary.index(character) for character in text])
        dtype = next(self.lstm.parameters()).dtype
        if self.embedding is None:
            x = nn.functional.one_hot(index, len(self.vocabulary)).to(dtype)
        else:
            x = self.embedding[index]
        trace = trace_gates(self.lstm, x.unsqueeze(1))
        if self.linear is None:
            return trace, None
        directions = 2 if self.lstm.bidirectional else 1
        output = torch.cat(tuple(trace.h[-directions:, :, 0]), -1)
        return trace, nn.functional.linear(output, *self.linear).softmax(-1)


def read(path: Path) -> Mapping[str, Any]:
    """Read a dict from a file that ``torch.save`` wrote; nothing in it is run.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds, one for each way of being no checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is no checkpoint that torch.load reads safely: {reason}"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def lstms(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name the LSTMs and cells in a state dict, or in a dict that has one as ``state_dict``.

    Returns:
        The name in the model, and the module that has such weights.

    Raises:
        ValueError: the weights of one do not fit together.
    """
    state = content.get("state_dict", content)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    found = []
    for prefix in _lstm_prefixes(tensors):
        module = _build(tensors, prefix)
        kind = "LSTMCell" if f"{prefix}weight_hh" in tensors else "LSTM"
        found.append((prefix.rstrip("."), f"{kind}({module.extra_repr()})"))
    return found


def load(path: Path, vocabulary: str | None = None, module: str | None = None) -> CharacterModel:
    """Read a character model from a file that ``torch.save`` wrote; nothing in it is run.

    Args:
        path: of a state dict, or of a dict that has one as ``state_dict`` and perhaps a string
            ``vocabulary``.
        vocabulary: the characters in the order of the model's numbers, if the file does not say.
        module: the name of the LSTM inside the model, if there are several.

    Raises:
        ValueError: it is not such a file, or lacks what is needed, or has too much of it.
        OSError: it cannot be read.
    """
    content = read(path)
    state = content.get("state_dict", content)
    vocabulary = vocabulary or content.get("vocabulary")
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict of {path} is a {type(state).__name__}")
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    prefix = _find_lstm(tensors, path, module)
    if vocabulary is None:
        raise ValueError(f"{path} does not say which characters its numbers mean: --vocabulary")
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("the vocabulary has a character twice")
    lstm = _build(tensors, prefix)
    rest = {k: v for k, v in tensors.items() if not (prefix and k.startswith(prefix))}
    V, I = len(vocabulary), lstm.input_size
    tables = [v for k, v in rest.items() if v.shape == (V, I) and "emb" in k.lower()]
    if not tables and I != V:
        raise ValueError(
            f"the LSTM takes {I} numbers, and there is neither an embedding of {V} characters nor "
            f"are there {I} in the vocabulary"
        )
    width = (lstm.proj_size or lstm.hidden_size) * (2 if lstm.bidirectional else 1)
    outputs = [
        (v, rest.get(k.removesuffix("weight") + "bias"))
        for k, v in rest.items()
        if k.endswith("weight") and v.shape == (V, width) and not any(v is t for t in tables)
    ]
    return CharacterModel(
        lstm, vocabulary, tables[0] if tables else None, outputs[0] if len(outputs) == 1 else None
    )


def _find_lstm(tensors: Mapping[str, Tensor], path: Path, module: str | None) -> str:
    """Return what the names of the LSTM's weights begin with."""
    prefixes = _lstm_prefixes(tensors)
    if module is not None:
        wanted = module.rstrip(".") + "." if module else ""
        prefixes = [prefix for prefix in prefixes if prefix == wanted]
    names = [prefix.rstrip(".") or "(the model itself)" for prefix in prefixes]
    if not prefixes:
        raise ValueError(f"{path} has no LSTM" + (f" named {module!r}" if module else ""))
    if len(prefixes) > 1:
        raise ValueError(f"{path} has several LSTMs, choose by --module: {', '.join(names)}")
    return prefixes[0]


def _lstm_prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    prefixes = []
    for name, tensor in tensors.items():
        for end in ("weight_hh_l0", "weight_hh"):
            if name.endswith(end) and tensor.dim() == 2:
                prefix = name.removesuffix(end)
                # Four gates: an RNN has one, a GRU three.
                if tensor.shape[0] == 4 * _hidden_size(tensors, prefix, end, tensor):
                    prefixes.append(prefix)
                break
    return prefixes


def _hidden_size(tensors: Mapping[str, Tensor], prefix: str, end: str, w_hh: Tensor) -> int:
    projection = tensors.get(prefix + end.replace("hh", "hr"))
    return projection.shape[1] if projection is not None else w_hh.shape[1]


def _build(tensors: Mapping[str, Tensor], prefix: str) -> LSTM:
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if "weight_hh" in own:  # of a cell
        own = {f"{k}_l0": v for k, v in own.items()}
    own = {k: v for k, v in own.items() if k.startswith(("weight_", "bias_"))}
    layers = sum(k.startswith("weight_hh_l") and not k.endswith("_reverse") for k in own)
    first = own["weight_ih_l0"]
    projection = own.get("weight_hr_l0")
    lstm = LSTM(
        first.shape[1],
        first.shape[0] // 4,
        num_layers=layers,
        bias="bias_ih_l0" in own,
        bidirectional="weight_hh_l0_reverse" in own,
        proj_size=0 if projection is None else projection.shape[0],
        dtype=first.dtype,
        **_variants.options_of(own),
    )
    try:
        lstm.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the LSTM's weights do not fit together: {reason}") from None
    return lstm


def lecture_model(model: nn.Module) -> CharacterModel:
    """Wrap the lecture's model of a layer."""
    from lstm_ext.cli import lecture

    layer, linear = cast(Any, model).lstm, cast(Any, model).linear
    return CharacterModel(
        layer, lecture.VOCABULARY, linear=(linear.weight.detach(), linear.bias.detach())
    )
