"""The fused cell against torch.nn.LSTMCell, by errors measured in higher precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import slow_where
from measure import DTYPES, NAMES, Pool, case, exact, ours, run, torchs

import lstm_ext
from lstm_ext import reference

# N, I, H: one of each kernel path, tile remainder and odd size.
SHAPES = [
    (1, 3, 2),
    (1, 1, 1),
    (5, 1, 1),
    (2, 300, 5),
    (8, 16, 32),
    (9, 64, 64),
    (3, 50, 200),
    (7, 100, 33),
    (17, 257, 129),
    (64, 50, 200),
    (200, 16, 16),
    (400, 7, 3),
    (50, 20, 8),
]


BIAS = {True: "bias", False: "without"}


def shape_id(shape):
    return "x".join(map(str, shape))


# Without biases, one of each kernel: dot products, streams, panels.
CASES = [(shape, True) for shape in SHAPES] + [(SHAPES[k], False) for k in (0, 6, 9)]


@pytest.mark.parametrize(
    ("dtype", "shape", "bias"),
    slow_where(
        lambda dtype, _, bias: dtype != torch.float32 and bias,
        [(dtype, *case) for dtype in DTYPES for case in CASES],
    ),
    ids=lambda v: shape_id(v) if isinstance(v, tuple) else BIAS.get(v, str(v)),
)
def test_error_is_no_worse_than_torchs(device, dtype, shape, bias):
    N, I, H = shape
    pools = [Pool() for _ in NAMES]
    for _ in range(max(4, min(500, 2_000_000 // (N * (I + H) * H)))):
        values, grads = case(*shape, dtype, device, bias)
        truth = exact(values, grads)
        results = zip(truth, run(ours, values, grads), run(torchs, values, grads), strict=True)
        for pool, (t, a, b) in zip(pools, results, strict=False):
            pool.add(t, a, b)
    for name, pool in zip(NAMES[: len(truth)], pools, strict=False):
        pool.assert_no_worse(name, dtype)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 40), I=st.integers(0, 140), H=st.integers(0, 70), bias=st.booleans(),
)  # fmt: skip
def test_any_size(N, I, H, bias):
    """Whatever the tiles leave over: outputs and gradients are the reference's."""
    torch.manual_seed(0)
    values, grads = case(N, I, H, torch.float64, bias=bias)
    expected = run(lambda x, h, c, *w: reference.lstm_cell(x, (h, c), *w), values, grads)
    torch.testing.assert_close(run(ours, values, grads), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [0, 1, 3, 9, 200])
def test_one_set_of_bits(device, dtype, N):
    """Same inputs, same bits: forward, backward, with and without gradients, any thread count."""
    values, grads = case(N, 70, 40, dtype, device)
    first = run(ours, values, grads)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for _ in range(3):
                for a, b in zip(first, run(ours, values, grads), strict=True):
                    assert torch.equal(a, b)
            with torch.no_grad():
                for a, b in zip(first, ours(*values.values()), strict=False):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_depend_on_its_neighbours(device):
    values, _ = case(150, 33, 20, torch.float32, device)
    x, h, c, *weights = values.values()
    whole = ours(x, h, c, *weights)
    part = ours(x[31:95], h[31:95], c[31:95], *weights)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[31:95], b)


def overlapping(t):
    """A view with t's values in which rows share memory: only possible where rows agree."""
    return t[:1].expand_as(t)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_full((1, t.shape[1]), float("nan")), t])[1:],
    "expanded rows": overlapping,
    "expanded columns": lambda t: t[:, :1].expand_as(t),
    "overlapping": lambda t: t.flatten()[: sum(t.shape) - 1].as_strided(t.shape, (1, 1)),
}


@pytest.mark.parametrize("N", [1, 3, 20])
@pytest.mark.parametrize("which", ["input", "h", "c", "w_ih", "w_hh"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype, layout, which, N):
    """A view computes what its dense copy does, to the bit."""
    values, grads = case(N, 6, 5, dtype, device)
    view = LAYOUTS[layout](values[which])
    a = ours(*{**values, which: view}.values())
    b = ours(*{**values, which: view.contiguous()}.values())
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    # The leaf is dense here; what the kernels see in forward and backward is the view.
    leaf = values[which].clone().requires_grad_()
    weight = {**values, which: LAYOUTS[layout](leaf)}
    dense = {**values, which: LAYOUTS[layout](leaf).contiguous()}
    # On a GPU torch adds up what overlaps in another order at each call, unless told not to.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        of_view, of_dense = (
            torch.autograd.grad(ours(*of.values()), leaf, grads)[0] for of in (weight, dense)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(of_view, of_dense)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded rows", "expanded columns"])
def test_layouts_of_arriving_gradients(device, layout):
    values, grads = case(20, 6, 5, torch.float32, device)
    views = [LAYOUTS[layout](g) for g in grads]
    for a, b in zip(
        run(ours, values, views), run(ours, values, [v.contiguous() for v in views]), strict=True
    ):
        assert torch.equal(a, b)


def test_biases_with_gaps(device):
    values, _ = case(4, 6, 5, torch.float32, device)
    gaps = {**values, "b_ih": values["b_ih"].repeat_interleave(2)[::2]}
    for a, b in zip(ours(*gaps.values()), ours(*values.values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("left_out", ["b_ih", "b_hh"])
def test_one_bias_alone(device, left_out):
    values, grads = case(4, 6, 5, torch.float64, device)
    zero = {**values, left_out: torch.zeros_like(values[left_out])}
    none = {**values, left_out: None}
    for a, b in zip(run(ours, none, grads), run(ours, zero, grads), strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unbatched(device, dtype):
    values, _ = case(1, 6, 5, dtype, device)
    x, h, c, *weights = values.values()
    batched = lstm_ext.lstm_cell(x, (h, c), *weights)
    single = lstm_ext.lstm_cell(x[0], (h[0], c[0]), *weights)
    for a, b in zip(batched, single, strict=True):
        assert b.shape == (5,)
        assert torch.equal(a[0], b)


@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 2), (4, 3, 0), (0, 0, 0)], ids=shape_id)
def test_empty(device, shape):
    values, grads = case(*(max(s, 1) for s in shape), torch.float32, device)
    N, I, H = shape
    sizes = [(N, I), (N, H), (N, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
    values = {
        name: torch.zeros(size, device=device) if 0 in size else torch.rand(size, device=device)
        for name, size in zip(values, sizes, strict=True)
    }
    grads = [torch.ones(N, H, device=device)] * 2
    for a, b in zip(run(ours, values, grads), run(torchs, values, grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_not_modified(device, dtype):
    values, grads = case(9, 6, 5, dtype, device)
    before = [v.clone() for v in (*values.values(), *grads)]
    run(ours, values, grads)
    for a, b in zip(before, (*values.values(), *grads), strict=True):
        assert torch.equal(a, b)


def test_outputs_and_gradients_share_no_memory(device):
    values, grads = case(3, 4, 5, torch.float32, device)
    results = run(ours, values, grads)
    storages = [t.untyped_storage().data_ptr() for t in results]
    assert len(set(storages)) == len(storages)


def test_what_torch_takes_and_the_kernels_do_not(device):
    """Complex numbers, sparse input, a state of another dtype, odd biases: torch's own result."""
    values, _ = case(4, 3, 2, torch.float32, device)
    x, h, c, w_ih, w_hh, b_ih, b_hh = values.values()
    odd = {
        "complex": [v.to(torch.complex64) for v in values.values()],
        "sparse": [x.to_sparse(), h, c, w_ih, w_hh, b_ih, b_hh],
        "double c": [x, h, c.double(), w_ih, w_hh, b_ih, b_hh],
        "bias of one": [x, h, c, w_ih, w_hh, b_ih[:1], b_hh],
        "bias per row": [x, h, c, w_ih, w_hh, b_ih.expand(4, -1), b_hh],
    }
    for name, (x, h, c, *weights) in odd.items():
        for grad_mode in (True, False):
            weights = [w.detach().requires_grad_(grad_mode) for w in weights]
            try:
                expected = torch.lstm_cell(x, (h, c), *weights)
            except RuntimeError as error:  # on a GPU torch takes less
                assert device == "cuda", name
                with pytest.raises(type(error)):
                    lstm_ext.lstm_cell(x, (h, c), *weights)
                continue
            for a, b in zip(lstm_ext.lstm_cell(x, (h, c), *weights), expected, strict=True):
                assert a.dtype == b.dtype, name
                assert torch.equal(a, b), name


def test_meta():
    cell = lstm_ext.LSTMCell(3, 2, device="meta")
    h, c = cell(torch.empty(4, 3, device="meta"))
    assert h.shape == c.shape == (4, 2)
    assert h.device.type == c.device.type == "meta"
    (h + c).sum().backward()
    assert cell.weight_ih.grad.shape == (8, 3)
    with torch.no_grad():
        assert cell(torch.empty(4, 3, device="meta"))[0].stride() == (2, 1)


def test_inference_mode(device):
    cell = lstm_ext.LSTMCell(3, 2, device=device)
    x = torch.randn(4, 3, device=device)
    with torch.inference_mode():
        h, c = cell(x)
    assert h.is_inference()
    assert torch.equal(h, cell(x)[0])
    assert torch.equal(c, cell(x)[1])


MASKED = [
    {"zoneout_h": 0.3},
    {"zoneout_h": 0.2, "zoneout_c": 0.4},
    {"recurrent_dropout": 0.4, "zoneout_h": 0.5},
    {"weight_dropout": 0.5, "zoneout_c": 0.1},
]


@pytest.mark.parametrize("options", MASKED, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_step_with_masks_is_that_of_a_layer(options, training):
    """Which runs in another operator, with the same masks from a seed."""
    torch.manual_seed(0)
    cell = lstm_ext.LSTMCell(4, 5, dtype=torch.float64, **options).train(training)
    layer = lstm_ext.LSTM(4, 5, dtype=torch.float64, **options).train(training)
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    x, h, c = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    torch.manual_seed(1)
    found = cell(x, (h, c))
    torch.manual_seed(1)
    _, (h_n, c_n) = layer(x[None], (h[None], c[None]))
    expected = h_n[0], c_n[0]
    torch.testing.assert_close(found, expected)
    grads = [
        torch.autograd.grad(a.sin().sum() + b.square().sum(), [x, h, c, *module.parameters()])
        for (a, b), module in ((found, cell), (expected, layer))
    ]
    torch.testing.assert_close(*grads)
