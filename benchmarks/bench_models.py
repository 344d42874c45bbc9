"""Speed of whole models on torch's modules, and after lstm_ext.convert, eager and compiled.

    python benchmarks/bench_models.py                  the three models of examples/models.py
    python benchmarks/report.py benchmarks/results/models.json    table of a result file

The models know nothing of lstm_ext; the policy of sb3-contrib's RecurrentPPO joins them where that
package is installed (``pip install -e ".[published]"``). A shape is batch x length -> hidden size.
Modes: ``inference`` under no_grad, in evaluation mode; ``training``, a forward and a backward with
the loss between. The ratio is that of torch's modules, the faster of eager and compiled, to the
faster of the converted ones. ``nn.LSTM`` breaks torch.compile's graph; converted models compile in
one (fullgraph).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol
import report
import torch
from torch import Tensor, nn
from tqdm import tqdm

import lstm_ext

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from models import AttentionDecoder, Example, RecurrentPolicy, Tagger


class PublishedPolicy(nn.Module):
    """The policy of sb3-contrib's RecurrentPPO as its training calls it, on the cart and pole.

    Args:
        hidden: number of features of the states of its two LSTMs.
    """

    def __init__(self, hidden: int = 8) -> None:
        from gymnasium import spaces
        from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

        super().__init__()
        self.policy = RecurrentActorCriticPolicy(
            spaces.Box(-1.0, 1.0, (4,)), spaces.Discrete(2), lambda _: 1e-3, lstm_hidden_size=hidden
        )

    def forward(self, observations: Tensor, actions: Tensor, starts: Tensor) -> Tensor:
        """Map observations (N, L, 4), actions and episodes' starts (N, L) to (N, L, 2)."""
        from sb3_contrib.common.recurrent.type_aliases import RNNStates

        N, L, _ = observations.shape
        zeros = observations.new_zeros(1, N, self.policy.lstm_actor.hidden_size)
        values, log_probabilities, _ = self.policy.evaluate_actions(
            observations.flatten(0, 1),
            actions.flatten(),
            RNNStates((zeros, zeros), (zeros, zeros)),
            starts.flatten(),
        )
        return torch.stack([values.flatten(), log_probabilities], -1).view(N, L, 2)

    def example(self, N: int, L: int) -> Example:
        """Draw experience in which one step in five starts an episode."""
        actions = torch.randint(2, (N, L))
        return (torch.randn(N, L, 4), actions, (torch.rand(N, L) < 0.2).float()), actions


MODELS: dict[str, tuple[Any, tuple[int, ...], tuple[int, int]]] = {
    "attention decoder": (AttentionDecoder, (2000, 256, 256, 128), (16, 20)),
    "recurrent policy": (RecurrentPolicy, (16, 64, 6), (8, 16)),
    "tagger": (Tagger, (2000, 100, 128, 20), (32, 40)),
}
if importlib.util.find_spec("sb3_contrib"):
    MODELS["RecurrentPPO's policy"] = (PublishedPolicy, (64,), (8, 16))
QUICK = {name: (kind, (), (3, 4)) for name, (kind, _, _) in MODELS.items()}
TORCH, OURS = "torch", "lstm_ext"
COMPILED = ", compiled"


def compile_alone(model: nn.Module, **options: Any) -> Any:
    """Compile a copy whose code is its own: a graph break in one would mark the code of both."""
    model = copy.deepcopy(model)
    forward = type(model).forward
    own = types.FunctionType(forward.__code__.replace(), forward.__globals__)
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": own})
    return torch.compile(model, dynamic=False, **options)


def peers(model: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    """Return the model as it is and converted, and both compiled."""
    torch._dynamo.reset()
    ours = lstm_ext.convert(copy.deepcopy(model))
    result = {TORCH: model, OURS: ours}
    # The published policy branches on data: broken into small graphs, it is slower than eager.
    if compiled and not isinstance(model, PublishedPolicy):
        # Packed sequences have data-dependent sizes, at which torch breaks the graph by itself.
        fullgraph = not isinstance(model, Tagger)
        result[TORCH + COMPILED] = compile_alone(model)
        result[OURS + COMPILED] = compile_alone(ours, fullgraph=fullgraph)
    return result


def bench_row(
    name: str, case: tuple[Any, Any, tuple[int, int]], mode: str, rounds: int, compiled: bool
) -> dict[str, Any]:
    kind, sizes, (N, L) = case
    torch.manual_seed(0)
    model = kind(*sizes).train(mode == "training")
    for module in model.modules():
        if isinstance(module, nn.LSTM):
            module.dropout = 0.0  # so that all compute the same
    inputs, targets = model.example(N, L)
    H = next(m.hidden_size for m in model.modules() if isinstance(m, (nn.LSTM, nn.LSTMCell)))

    def closure(module: nn.Module) -> Callable[[], Tensor]:
        def step() -> Tensor:
            logits = module(*inputs)
            if mode == "inference":
                return logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            return loss.detach()

        return step

    modules = peers(model, compiled)
    with torch.set_grad_enabled(mode == "training"):
        calls = {peer: closure(module) for peer, module in modules.items()}
        expected = calls[TORCH]()
        gradients = [p.grad for p in model.parameters()]
        for peer, call in list(calls.items())[1:]:
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
            if mode == "training":
                found = [p.grad for p in modules[peer].parameters()]
                torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)
        times = protocol.interleaved(calls, rounds)
    best = {who: min(t for peer, t in times.items() if peer.startswith(who)) for who in modules}
    return {
        "model": name,
        "shape": [N, L, H],
        "mode": mode,
        "threads": torch.get_num_threads(),
        "microseconds": times,
        "ratio": best[TORCH] / best[OURS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--eager", action="store_true", help="without the compiled ones")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=None, help="default: 1 and all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/models.json")
    options = parser.parse_args()
    protocol.environment()
    cases = QUICK if options.quick else MODELS
    rows = []
    for threads in options.threads or sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        plan = [(mode, name) for mode in ("inference", "training") for name in options.models]
        for mode, name in tqdm(plan, desc=f"{threads} thread(s)"):
            rounds = 2 if options.quick else 9
            rows.append(bench_row(name, cases[name], mode, rounds, not options.eager))
            protocol.save(options.out, rows, title="Models", rivals="torch's modules")
    report.print_table(options.out)


if __name__ == "__main__":
    main()
