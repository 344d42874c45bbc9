"""What training loops put around modules: for cell and layer alike, against torch's own."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lstm_ext

KINDS = ["LSTMCell", "LSTM"]
pytestmark = pytest.mark.parametrize("kind", KINDS)


def pair(kind, **options):
    torchs = getattr(nn, kind)(3, 4, **options)
    ours = getattr(lstm_ext, kind)(3, 4, **options)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def data(kind):
    return torch.randn(5, 3) if kind == "LSTMCell" else torch.randn(6, 5, 3)


def first(out):
    return out[0]


def weight(module, which="hh"):
    return getattr(module, f"weight_{which}" + ("_l0" if isinstance(module, nn.RNNBase) else ""))


def grads(module, x, call=None):
    module.zero_grad()
    first((call or module)(x)).square().sum().backward()
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_autocast_dtypes(kind, inputs, states, device):
    torchs, ours = pair(kind, device=device)
    x = data(kind).to(device, inputs)
    shape = (5, 4) if kind == "LSTMCell" else (1, 5, 4)
    hx = None
    if states is not None:
        hx = tuple(torch.randn(shape).to(device, states) for _ in range(2))
    if kind == "LSTM":
        try:
            with torch.autocast(device, torch.bfloat16):
                torchs(x, hx)
        except RuntimeError:
            pytest.skip("torch's own LSTM does not run in bfloat16 on this processor")
        mixed = states not in (inputs, None)
        if device == "cpu" and mixed and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("torch's own LSTM goes another way, without oneDNN, on this processor")
    found = []
    for module in (torchs, ours):
        module.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            out = module(x, hx)
        flat = (out[0], out[1]) if kind == "LSTMCell" else (out[0], *out[1])
        sum(t.float().sum() for t in flat).backward()
        found.append((flat, [p.grad for p in module.parameters()]))
    (theirs, their_grads), (mine, my_grads) = found
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    for a, b in zip(my_grads, their_grads, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-1)


def test_autocast_of_packed_and_double(kind):
    """Where torch's module keeps the states' dtype, so does ours."""
    if kind == "LSTMCell":
        pytest.skip("no packed sequences")
    sequences = [torch.randn(n, 3) for n in (5, 3)]
    torchs, ours = pair(kind)
    with torch.autocast("cpu", torch.bfloat16):
        packed = nn.utils.rnn.pack_sequence(sequences)
        theirs, mine = torchs(packed), ours(packed)
        assert mine[0].data.dtype == theirs[0].data.dtype == torch.float32
        torch.testing.assert_close(mine[0].data, theirs[0].data, rtol=2e-2, atol=2e-2)
        double = lstm_ext.LSTM(3, 4, dtype=torch.float64)
        assert double(torch.randn(5, 2, 3, dtype=torch.float64))[0].dtype == torch.float64


def test_grad_scaler(kind, device):
    torchs, ours = pair(kind, device=device)
    x = data(kind).to(device)
    for module in (torchs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=128.0)
        for _ in range(3):
            loss = first(module(x)).square().sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_inference_mode(kind):
    torchs, ours = pair(kind)
    x = data(kind)
    with torch.inference_mode():
        out = first(ours(x))
        assert out.is_inference()
        torch.testing.assert_close(out, first(torchs(x)))
        made_here = data(kind)
    # Inference tensors cannot be saved for backward: torch's own error.
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ours(made_here)
    with torch.no_grad():
        ours(made_here)


def test_deterministic_mode(kind):
    _, ours = pair(kind)
    x = data(kind)
    expected = grads(ours, x)
    torch.use_deterministic_algorithms(True)
    try:
        found = grads(ours, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_matmul_precision_changes_nothing_here(kind):
    torchs, ours = pair(kind)
    x = data(kind)
    torch.set_float32_matmul_precision("high")
    try:
        torch.testing.assert_close(first(ours(x)), first(torchs(x)))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_saved_tensor_hooks(kind):
    _, ours = pair(kind)
    x = data(kind)
    expected = grads(ours, x)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        out = first(ours(x)).square().sum()
    ours.zero_grad()
    out.backward()
    assert packed
    for p, e in zip(ours.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)
    with torch.autograd.graph.save_on_cpu():
        found = grads(ours, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(kind, use_reentrant):
    _, ours = pair(kind)
    x = data(kind).requires_grad_()
    expected = [g.clone() for g in grads(ours, x)]
    found = grads(ours, x, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, expected)


def test_drop_connect_by_hand(kind):
    """Weights masked anew at every call, written into the module as plain tensors."""

    class DropConnect(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.name = "weight_hh" + ("_l0" if isinstance(module, nn.RNNBase) else "")
            raw = getattr(module, self.name)
            del module._parameters[self.name]
            self.raw = nn.Parameter(raw.data)

        def forward(self, x):
            torch.manual_seed(3)
            setattr(self.module, self.name, nn.functional.dropout(self.raw, 0.5))
            return self.module(x)

    torchs, ours = (DropConnect(m) for m in pair(kind))
    x = data(kind)
    for a, b in zip(grads(ours, x), grads(torchs, x), strict=True):
        torch.testing.assert_close(a, b)


def test_shared_weights(kind):
    """One parameter in two modules: gradients of both add up."""
    found = []
    for package in (nn, lstm_ext):
        torch.manual_seed(2)
        a, b = getattr(package, kind)(3, 4), getattr(package, kind)(4, 4)
        name = "weight_hh" + ("_l0" if kind == "LSTM" else "")
        setattr(b, name, getattr(a, name))
        x = data(kind)
        for _ in range(2):  # the second time into gradients that exist
            first(b(first(a(x)))).square().sum().backward()
        found.append([p.grad for p in nn.ModuleList([a, b]).parameters()])
    assert len(found[0]) == 7
    torch.testing.assert_close(found[1], found[0])


def test_tensor_hooks_and_frozen_parameters(kind):
    torchs, ours = pair(kind)
    x = data(kind)
    found = []
    for module in (torchs, ours):
        weight(module, "ih").requires_grad_(False)
        weight(module).register_hook(lambda g: 2 * g)
        grads(module, x)
        assert weight(module, "ih").grad is None
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    torch.testing.assert_close(found[1], found[0])


def test_tensor_subclass_is_seen(kind):
    """__torch_function__ of a subclass sees the operator."""
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    torchs, ours = pair(kind)
    x = data(kind)
    out = first(ours(x.as_subclass(Logged)))
    assert isinstance(out, Logged)
    assert any("lstm" in name for name in seen)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), first(torchs(x)))


def test_distributed_data_parallel(kind, tmp_path):
    """In one process; several: tests/test_examples.py."""
    torchs, ours = pair(kind)
    x = data(kind)
    expected = grads(torchs, x)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        found = grads(ours, x, nn.parallel.DistributedDataParallel(ours))
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, expected)
