"""What only a GPU shows: streams, graphs, no waiting, our layer's kernels. Skipped without one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
import lstm_ext._C

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
L, N, I, H = 7, 5, 24, 40


def cell_case(dtype=torch.float32):
    module = lstm_ext.LSTMCell(I, H, device="cuda", dtype=dtype)
    inputs = [torch.randn(N, size, device="cuda", dtype=dtype) for size in (I, H, H)]

    def call(x, h, c):
        return module(x, (h, c))

    return call, inputs, list(module.parameters())


def layer_case(packed=False, dtype=torch.float32, hidden=H):
    """Our own kernels, past the module that may hand over to cuDNN."""
    module = nn.LSTM(I, hidden, device="cuda", dtype=dtype)
    weights = list(module.parameters())
    x = torch.randn(L, N, I, device="cuda", dtype=dtype)
    states = [torch.randn(N, hidden, device="cuda", dtype=dtype) for _ in range(2)]
    sizes = None
    if packed:
        sequence = pack_padded_sequence(x, torch.tensor([7, 6, 6, 2, 1]))
        x, sizes = sequence.data, sequence.batch_sizes

    def call(x, h, c):
        return torch.ops.lstm_ext.lstm_layer(x, h, c, *weights, sizes, None, False)

    return call, [x, *states], weights


CASES = {
    "cell": cell_case,
    "cell, half": lambda: cell_case(torch.float16),
    "layer": layer_case,
    "layer, packed": lambda: layer_case(packed=True),
    "layer, half": lambda: layer_case(dtype=torch.float16),
    "layer, blocks that meet": lambda: layer_case(hidden=256),
    "layer, step by step": lambda: layer_case(hidden=2048),
}


def forward_and_backward(call, inputs, weights):
    leaves = [*(t.detach().requires_grad_() for t in inputs), *weights]
    out = call(*leaves[:3])
    return [*out, *torch.autograd.grad([t.sum() for t in out], leaves)]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_operators_against_torch():
    """The cases of the emulated operators, on the GPU itself."""
    script = Path(__file__).parent / "cuda_emu" / "check_ops.py"
    result = subprocess.run(
        [sys.executable, script, lstm_ext._C.__file__, "cuda"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[0]) > 300


def test_same_bits_at_every_call(case):
    first = forward_and_backward(*case)
    for _ in range(3):
        for a, b in zip(forward_and_backward(*case), first, strict=True):
            assert torch.equal(a, b)


def test_no_waiting_for_the_gpu(case):
    forward_and_backward(*case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(case):
    call, inputs, weights = case
    expected = forward_and_backward(*case)
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not queue up behind it reads zeros
        for to, source in zip(late, inputs, strict=True):
            to.copy_(source)
        found = forward_and_backward(call, late, weights)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_captured_in_a_graph(case):
    """Replays read new numbers from the inputs' places, forward and backward."""
    call, inputs, weights = case
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward(*case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward_and_backward(call, inputs, weights)
    for _ in range(2):
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        for a, b in zip(found, forward_and_backward(*case), strict=True):
            assert torch.equal(a, b)


def test_not_the_first_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    module = lstm_ext.LSTMCell(I, H, device="cuda:1")
    theirs = nn.LSTMCell(I, H, device="cuda:1")
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(N, I, device="cuda:1")
    torch.testing.assert_close(module(x), theirs(x))


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_where_torch_allows_it(allowed):
    call, inputs, weights = layer_case(hidden=256)
    exact = nn.LSTM(I, 256, dtype=torch.float64)
    exact.load_state_dict(dict(zip(exact.state_dict(), (w.double() for w in weights), strict=True)))
    x, h, c = (t.double().cpu() for t in inputs)
    expected = exact(x, (h[None], c[None]))[0]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        found = call(*inputs)[0]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    error = (found.double().cpu() - expected).abs().max()
    assert (1e-6 if allowed else 0) < error < (1e-2 if allowed else 1e-5)


def test_tensors_of_the_cpu_among_others_are_an_error():
    """Its addresses mean nothing to a GPU."""
    OPS = torch.ops.lstm_ext
    weights = [torch.randn(s, device="cuda") for s in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))]
    x, h, c = (torch.randn(N, size, device="cuda") for size in (I, H, H))
    cell = [x, h, c, *weights]
    kept = list(OPS.lstm_cell_forward(*cell))
    for k in range(10):
        arguments = [*kept[:2], *cell, kept[2]]
        arguments[k] = arguments[k].cpu()
        with pytest.raises(RuntimeError):
            OPS.lstm_cell_backward(*arguments, [True] * 7)
    reset = torch.zeros(1, N, dtype=torch.bool, device="cuda")
    layer = [x[None], *cell[1:], None, reset, False]
    output, h1, c1, gates, before = OPS.lstm_layer_forward(*layer)
    everything = [output, h1, c1, *layer, output, gates, before]
    for k in (k for k, t in enumerate(everything) if isinstance(t, torch.Tensor)):
        arguments = [t.cpu() if j == k else t for j, t in enumerate(everything)]
        with pytest.raises(RuntimeError):
            OPS.lstm_layer_backward(*arguments, [True] * 7)
    with pytest.raises(RuntimeError, match="reset must be a bool tensor"):
        OPS.lstm_layer(*layer[:-2], reset.cpu(), False)
    assert OPS.lstm_layer(*layer)[0].isfinite().all()  # the GPU is still of use
