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


def recurrence_case(normed=False, projected=False, packed=False, dtype=torch.float32):
    """The steps of a layer with every mask and clip, and as asked."""
    P = 12 if projected else H
    sizes = torch.tensor([5, 5, 4, 2, 2, 1, 1]) if packed else None
    lead = (20,) if packed else (L, N)
    make = {"device": "cuda", "dtype": dtype}
    inputs = [torch.randn(*lead, 4 * H, **make), torch.randn(N, P, **make),
              torch.randn(N, H, **make)]  # fmt: skip
    shapes = [(4 * H, P), (4 * H,), *([(4 * H,), (H,), (H,)] if normed else [None] * 3),
              (P, H) if projected else None]  # fmt: skip
    weights = [s and (torch.randn(s, **make) * 0.2).requires_grad_() for s in shapes]
    masks = [torch.rand(*lead, P, **make), torch.rand(H, **make), torch.rand(N, P, **make)]
    reset = torch.rand(L, N, device="cuda") < 0.2
    options = [sizes, reset, True, False, True, 1e-3, 1.0, 0.5 if projected else 0.0]

    def call(x, h, c):
        return torch.ops.lstm_ext.lstm_recurrence(x, h, c, *weights, *masks, *options)

    return call, inputs, [w for w in weights if w is not None]


CASES = {
    "recurrence": recurrence_case,
    "recurrence, half": lambda: recurrence_case(dtype=torch.float16),
    "recurrence, normalised, packed": lambda: recurrence_case(normed=True, packed=True),
    "recurrence, normalised, projected": lambda: recurrence_case(normed=True, projected=True),
    "cell": cell_case,
    "cell, half": lambda: cell_case(torch.float16),
    "layer": layer_case,
    "layer, packed": lambda: layer_case(packed=True),
    "layer, half": lambda: layer_case(dtype=torch.float16),
    "layer, blocks that meet": lambda: layer_case(hidden=256),
    "layer, clusters": lambda: layer_case(dtype=torch.bfloat16, hidden=256),
    "layer, step by step": lambda: layer_case(hidden=2048),
}


def forward_and_backward(call, inputs, weights):
    leaves = [*(t.detach().requires_grad_() for t in inputs), *weights]
    out = call(*leaves[:3])
    return [*out, *torch.autograd.grad([t.sum() for t in out], leaves)]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.mark.parametrize("script", ["check_ops.py", "check_recurrence_ops.py"])
def test_operators_against_torch(script):
    """The cases of the emulated operators, on the GPU itself."""
    script = Path(__file__).parent / "cuda_emu" / script
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


@pytest.fixture
def precision():
    """The switches of torch, as they are by default, and put back afterwards."""
    switches = [torch.backends.cuda.matmul, torch.backends.cudnn.rnn]
    before = [switch.fp32_precision for switch in switches]
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("value", ["ieee", "tf32"])
@pytest.mark.parametrize("kind", ["cell", "layer"])
def test_tf32_where_torch_allows_it(kind, value, precision):
    """A cell follows cuBLAS's switch, a layer cuDNN's, by torch's newer names too."""
    matmul, rnn = precision
    matmul.fp32_precision = rnn.fp32_precision = "ieee"
    call, inputs, weights = cell_case() if kind == "cell" else layer_case(hidden=256)
    leaves = [t.double().cpu() for t in (*inputs, *weights)]
    x, h, c, *exact_weights = leaves
    steps = x if kind == "layer" else x[None]
    for step in steps:
        h, c = torch.lstm_cell(step, (h, c), *exact_weights)
    (matmul if kind == "cell" else rnn).fp32_precision = value
    error = (call(*inputs)[-2].double().cpu() - h).abs().max()
    assert (1e-6 if value == "tf32" else 0) < error < (1e-2 if value == "tf32" else 1e-5)


MODULES = {
    "one layer": {},
    "several": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("mode", ["auto", "fused", "torch"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_a_layer_trains(name, training, packed, mode):
    """In evaluation mode too, where nn.LSTM's own backward is refused."""
    before = lstm_ext.set_cuda_backend(mode)
    try:
        theirs = nn.LSTM(I, H, **MODULES[name]).double()
        ours = lstm_ext.LSTM(I, H, **MODULES[name])
        ours.load_state_dict(theirs.state_dict())
        ours.cuda().train(training)
        x = torch.randn(L, N, I)
        lengths = torch.tensor([7, 6, 6, 2, 1])
        exact = pack_padded_sequence(x.double(), lengths) if packed else x.double()
        expected, (h, c) = theirs(exact)
        found, (h_n, c_n) = ours(pack_padded_sequence(x.cuda(), lengths) if packed else x.cuda())
        if packed:
            expected, found = expected.data, found.data
        (expected.sum() + h.sum() + c.sum()).backward()
        (found.sum() + h_n.sum() + c_n.sum()).backward()
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-3, atol=1e-3)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad.double().cpu(), b.grad, rtol=1e-2, atol=1e-2)
    finally:
        lstm_ext.set_cuda_backend(before)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="not a card that was measured",
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("allow_rnn")
def test_auto_takes_ours_where_it_was_measured_to_be_faster(compiled):
    """In a whole compiled graph too."""
    layer = lstm_ext.LSTM(64, 256, device="cuda", dtype=torch.bfloat16)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(L, N, 64, device="cuda", dtype=torch.bfloat16)
    output, _ = call(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(x)
        torch.cuda.synchronize()
    ran = " ".join(event.key for event in profile.key_averages())
    assert "layer_forward_kernel" in ran or "layer_cluster_kernel" in ran
    theirs = nn.LSTM(64, 256, device="cuda", dtype=torch.bfloat16)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(output, theirs(x)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["auto", "fused", "torch"])
def test_whose_steps_run(mode):
    """Of layers whose steps torch's have not."""
    before = lstm_ext.set_cuda_backend(mode)
    try:
        layer = lstm_ext.LayerNormLSTM(I, H, device="cuda")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer(torch.randn(L, N, I, device="cuda"))
            torch.cuda.synchronize()
        ran = " ".join(event.key for event in profile.key_averages())
        assert ("recurrence_step_kernel" in ran) == (mode != "torch")
    finally:
        lstm_ext.set_cuda_backend(before)


@pytest.mark.parametrize("mode", ["auto", "fused", "torch"])
def test_whose_kernels_run(mode):
    before = lstm_ext.set_cuda_backend(mode)
    try:
        x = torch.randn(L, N, I, device="cuda")
        layer, cell = lstm_ext.LSTM(I, H, device="cuda"), lstm_ext.LSTMCell(I, H, device="cuda")
        for call, is_ours in ((lambda: layer(x), mode == "fused"),
                              (lambda: cell(x[0]), mode != "torch")):  # fmt: skip
            with torch.profiler.profile() as profile:
                call()
            ran = [event.key for event in profile.key_averages()]
            assert any(key.startswith("lstm_ext::") for key in ran) == is_ours, ran
    finally:
        lstm_ext.set_cuda_backend(before)


def test_tensors_of_the_cpu_among_others_are_an_error():
    """Its addresses mean nothing to a GPU."""
    OPS, ALL = torch.ops.lstm_ext, [True] * 7 + [False]  # there are no weights of units
    weights = [torch.randn(s, device="cuda") for s in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))]
    x, h, c = (torch.randn(N, size, device="cuda") for size in (I, H, H))
    cell = [x, h, c, *weights]
    kept = list(OPS.lstm_cell_forward(*cell))
    for k in (*range(9), 11):
        arguments = [*kept[:2], *cell, None, 0, kept[2]]
        arguments[k] = arguments[k].cpu()
        with pytest.raises(RuntimeError):
            OPS.lstm_cell_backward(*arguments, ALL)
    reset = torch.zeros(1, N, dtype=torch.bool, device="cuda")
    layer = [x[None], *cell[1:], None, reset, False]
    output, h1, c1, gates, before = OPS.lstm_layer_forward(*layer)
    everything = [output, h1, c1, *layer, None, 0, output, gates, before]
    for k in (k for k, t in enumerate(everything) if isinstance(t, torch.Tensor)):
        arguments = [t.cpu() if j == k else t for j, t in enumerate(everything)]
        with pytest.raises(RuntimeError):
            OPS.lstm_layer_backward(*arguments, ALL)
    with pytest.raises(RuntimeError, match="reset must be a bool tensor"):
        OPS.lstm_layer(*layer[:-2], reset.cpu(), False)
    assert OPS.lstm_layer(*layer)[0].isfinite().all()  # the GPU is still of use
