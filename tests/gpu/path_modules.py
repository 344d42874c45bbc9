"""The modules as a user calls them, defaults on, against torch's own: cases of path_worker.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from path_worker import EPS, judge, relative_error, torch_dtype
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

I, H, L, N = 24, 96, 12, 8
Numbers = tuple[list[str], list[Tensor]]


def flat(output: Any) -> list[Tensor]:
    """The tensors of what a module returns."""
    if isinstance(output, PackedSequence):
        return [output.data]
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in flat(part)]


def outputs_and_gradients(module: nn.Module, inputs: Sequence[Any]) -> Numbers:
    """Call, then the gradients of a fixed sum, of the first input and of all parameters."""
    dtype, device = next((p.dtype, p.device) for p in module.parameters())
    x, *rest = inputs
    x = x.to(device, dtype).requires_grad_()
    value = pack_padded_sequence(x, rest[0], enforce_sorted=False) if rest else x
    out = flat(module(value))
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(device))
        .sum() for t in out
    )  # fmt: skip
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, [x, *named.values()])  # type: ignore[arg-type]
    names = [f"output {k}" for k in range(len(out))]
    names += [f"grad {name}" for name in ("x", *named)]
    return names, [t.detach() for t in (*out, *grads)]


def after_training(module: nn.Module, inputs: Sequence[Any]) -> Numbers:
    """The parameters after three steps of an optimizer, and what they compute then."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    dtype, device = next((p.dtype, p.device) for p in module.parameters())
    x = inputs[0].to(device, dtype)
    for _ in range(3):
        optimizer.zero_grad()
        out = flat(module(x))
        sum(t.float().square().mean() for t in out).backward()  # type: ignore[union-attr]
        optimizer.step()
    named = {name: p.detach() for name, p in module.named_parameters()}
    return ["output", *named], [flat(module(x))[0].detach(), *named.values()]


def compare(
    dtype: str, device: str, ours: nn.Module, theirs: nn.Module, inputs: Sequence[Any],
    numbers: Callable[..., Numbers] = outputs_and_gradients,
) -> dict[str, Any]:  # fmt: skip
    """Judge ours by torch's module in float64 on the CPU, and by its own errors on the device."""
    kind = torch_dtype(dtype)
    theirs = theirs.to(kind)
    ours.load_state_dict(theirs.state_dict())
    inputs = [inputs[0].to(kind), *inputs[1:]]
    names, truth = numbers(copy.deepcopy(theirs).double(), inputs)
    _, mine = numbers(ours.to(device, kind), inputs)
    _, torchs = numbers(theirs.to(device), inputs)
    return judge(names, [t.cpu() for t in mine], [[t.cpu() for t in torchs]], truth, dtype)


def layers(dtype: str, device: str, inputs: Sequence[Any], numbers: Any = outputs_and_gradients,
           ours: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Compare lstm_ext.LSTM with nn.LSTM of the same options."""
    mine = lstm_ext.LSTM(I, H, **options, **(ours or {}))
    return compare(dtype, device, mine, nn.LSTM(I, H, **options), inputs, numbers)


def dropout(dtype: str, device: str) -> dict[str, Any]:
    """Trains with dropout: other numbers at each call, gradients for all; in evaluation as torch's.

    A mask depends on who draws it, so that there is nothing to compare with in training.
    """
    kind = torch_dtype(dtype)
    module = lstm_ext.LSTM(I, H, num_layers=2, dropout=0.5).to(device, kind)
    x = torch.randn(L, N, I).to(device, kind)
    first, second = module(x)[0], module(x)[0]
    first.float().sum().backward()
    found = [p.grad for p in module.parameters()]
    if torch.equal(first, second) or not all(g is not None and g.isfinite().all() for g in found):
        return {"status": "wrong", "worst": "no dropout, or no gradients"}
    evaluated = lstm_ext.LSTM(I, H, num_layers=2, dropout=0.5).eval()
    return compare(dtype, device, evaluated, nn.LSTM(I, H, num_layers=2), [x.cpu()], in_evaluation)


def in_evaluation(module: nn.Module, inputs: Sequence[Any]) -> Numbers:
    """Outputs alone, without gradients."""
    dtype, device = next((p.dtype, p.device) for p in module.parameters())
    with torch.no_grad():
        out = flat(module.eval()(inputs[0].to(device, dtype)))
    return [f"output {k}" for k in range(len(out))], out


def other_steps(
    kind: type[nn.Module], dtype: str, device: str, inputs: Sequence[Any], **options: Any
) -> dict[str, Any]:
    """Layers whose steps torch's have not, beside the same ones in tensor operations."""

    class ByTorch(kind):  # type: ignore[misc,valid-type]
        def forward(self, *call: Any) -> Any:
            before = lstm_ext.set_cuda_backend("torch")
            try:
                return super().forward(*call)
            finally:
                lstm_ext.set_cuda_backend(before)

    ours, theirs = (c(I, H, num_layers=2, **options).eval() for c in (kind, ByTorch))
    return compare(dtype, device, ours, theirs, inputs)


class Model(nn.Module):
    """Both of torch's modules in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = nn.LSTM(I, H), nn.LSTMCell(H, I)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the layer, then the cell on its last step."""
        output, states = self.lstm(x)
        return output, *states, *self.cell(output[-1])


def convert(dtype: str, device: str) -> dict[str, Any]:
    """A model of torch's modules, converted; and it is torch's again when reverted."""
    theirs = Model()
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    result = compare(dtype, device, ours, theirs, [torch.randn(L, N, I)])
    lstm_ext.revert(ours)
    if type(ours.lstm) is not nn.LSTM or type(ours.cell) is not nn.LSTMCell:
        return {"status": "wrong", "worst": "not reverted"}
    return result


def autocast(dtype: str, device: str) -> dict[str, Any]:
    """Parameters in float32, computed in a 16-bit type, as torch's modules are."""
    lower = torch_dtype(dtype) if dtype != "float32" else torch.bfloat16
    name = str(lower).removeprefix("torch.")
    theirs = Model()
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    kinds = []

    def numbers(module: nn.Module, inputs: Sequence[Any]) -> Numbers:
        exact = next(module.parameters()).dtype == torch.float64
        with torch.autocast(device, lower, enabled=not exact):
            kinds.append([t.dtype for t in flat(module(inputs[0].to(next(module.parameters()))))])
            return outputs_and_gradients(module, inputs)

    result = compare("float32", device, ours, theirs, [torch.randn(L, N, I)], numbers)
    # cuDNN's layer computes in float16 whatever autocast asks for (torch 2.11); ours does as asked.
    asked = [lower] * len(kinds[1])
    if kinds[1] not in (asked, kinds[2]):
        return {"status": "wrong", "worst": f"dtypes {kinds[1]}, torch's are {kinds[2]}"}
    # Judged as what they were computed in.
    worst = max(result["errors"], key=lambda n: result["errors"][n][0])
    mine, theirs_error, _ = result["errors"][worst]
    allowed = 2 * theirs_error + 2 * EPS[name]
    return {**result, "status": "ok" if mine <= allowed else "wrong", "worst": worst,
            "error": mine, "torch": theirs_error, "allowed": allowed}  # fmt: skip


def graph(kind: str, device: str) -> dict[str, Any]:
    """Forward and backward in a CUDA graph, replayed with other numbers, as without a graph."""
    module: nn.Module = (lstm_ext.LSTM if kind == "LSTM" else lstm_ext.LSTMCell)(I, H)
    module.to(device)
    x = torch.randn(*((L,) if kind == "LSTM" else ()), N, I, device=device, requires_grad=True)
    leaves = [x, *module.parameters()]

    def call() -> list[Tensor]:
        out = flat(module(x))
        return [*out, *torch.autograd.grad([t.sum() for t in out], leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = call()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    recorded.replay()
    expected = call()
    errors = [relative_error(a.detach(), b.detach().double())
              for a, b in zip(found, expected, strict=True)]  # fmt: skip
    return {"status": "ok" if max(errors) <= 1e-6 else "wrong", "worst": "replayed",
            "error": max(errors), "torch": 0.0, "allowed": 1e-6}  # fmt: skip


def compiled(device: str) -> dict[str, Any]:
    """torch.compile of a cell as one whole graph."""
    ours = torch.compile(lstm_ext.LSTMCell(I, H), fullgraph=True)
    theirs = nn.LSTMCell(I, H)
    names = {f"_orig_mod.{name}": value for name, value in theirs.state_dict().items()}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ours

        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return self.inner.load_state_dict(names)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    return compare("float32", device, Wrapped(), theirs, [torch.randn(N, I)])


def second_derivatives(device: str) -> dict[str, Any]:
    """torch's numerical checks, in float64."""
    cell = lstm_ext.LSTMCell(2, 3).to(device, torch.float64)
    cell_inputs = [torch.randn(2, size, dtype=torch.float64, device=device, requires_grad=True)
                   for size in (2, 3, 3)]  # fmt: skip

    def call(x: Tensor, h: Tensor, c: Tensor) -> Any:
        return cell(x, (h, c))

    torch.autograd.gradcheck(call, cell_inputs)
    torch.autograd.gradgradcheck(call, cell_inputs)
    weights = [torch.randn(*size, dtype=torch.float64, device=device, requires_grad=True)
               for size in ((12, 2), (12, 3), (12,), (12,))]  # fmt: skip
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (x, *cell_inputs[1:], *weights, None, None, False)
    torch.autograd.gradcheck(torch.ops.lstm_ext.lstm_layer, inputs)
    torch.autograd.gradgradcheck(torch.ops.lstm_ext.lstm_layer, inputs)
    return {"status": "ok", "worst": "gradcheck and gradgradcheck raise nothing"}


def run_module(case: dict[str, Any], device: str, tell: Callable[..., None]) -> None:
    """Run the case that its name says, and report it."""
    dtype = case["dtype"]
    torch.manual_seed(0)
    x = torch.randn(L, N, I)
    lengths = torch.tensor([L, 3, 7, 7, 1, L, 5, 2])
    cells = lstm_ext.LSTMCell(I, H), nn.LSTMCell(I, H)
    tests: dict[str, Callable[[], dict[str, Any]]] = {
        "LSTM trains": lambda: layers(dtype, device, [x], after_training),
        "LSTM, two layers both ways, packed": lambda: layers(
            dtype, device, [x, lengths], num_layers=2, bidirectional=True
        ),
        "LSTM, no bias, single sequence": lambda: layers(dtype, device, [x[:, 0]], bias=False),
        "LSTM, checkpoint_every": lambda: layers(dtype, device, [x], ours={"checkpoint_every": 5}),
        "LSTM, dropout": lambda: dropout(dtype, device),
        "LSTM, projection": lambda: layers(dtype, device, [x], proj_size=7),
        "LayerNormLSTM, projection": lambda: other_steps(
            lstm_ext.LayerNormLSTM, dtype, device, [x], proj_size=7, bidirectional=True
        ),
        "LSTM, zoneout, packed": lambda: other_steps(
            lstm_ext.LSTM, dtype, device, [x, lengths], zoneout_h=0.1, zoneout_c=0.2
        ),
        "LSTMCell trains": lambda: compare(dtype, device, *cells, [x[0]], after_training),
        "LSTMCell, torch.compile": lambda: compiled(device),
        "convert and revert": lambda: convert(dtype, device),
        "autocast": lambda: autocast(dtype, device),
        "LSTM, CUDA graph": lambda: graph("LSTM", device),
        "LSTMCell, CUDA graph": lambda: graph("LSTMCell", device),
        "second derivatives": lambda: second_derivatives(device),
    }
    tell(**tests[case["way"]]())
