"""Zoneout, dropout in the recurrence and clips of LSTM and LSTMCell, against loops by hand."""

import math

import pytest
import torch
from measure import uniform
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_ext
from lstm_ext import _ops, _recurrence

F64 = torch.float64


@pytest.fixture
def masks(monkeypatch):
    """Masks by their probability, instead of drawn ones: of the recurrence, and torch.dropout's."""
    drawn = {}

    def draw(size, p):
        mask = (torch.rand(tuple(size)) >= p).double()
        assert 0 < mask.mean() < 1, "this says nothing: another seed"
        drawn.setdefault(p, []).append(mask)
        return mask

    def dropout(x, p, train):
        assert train
        return x * draw(x.shape, p).to(x.dtype) / (1 - p)

    computed_in_python(monkeypatch)
    monkeypatch.setattr(_recurrence, "keep_mask", lambda size, p, like: draw(size, p).to(like))
    monkeypatch.setattr(torch, "dropout", dropout)
    return drawn


def computed_in_python(patch):
    """Not by the direct calls, which draw the same masks, but in C++ (test_direct_calls)."""
    for name in ("fast_lstm_with_steps", "fast_cell_with_steps"):
        patch.setattr(_ops, name, lambda *_: None)


def randomize(module, scale=0.5):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(uniform(parameter.shape) * scale)
    return module


def states_for(module, N):
    K = module.num_layers * (2 if module.bidirectional else 1)
    P = module.proj_size or module.hidden_size
    return uniform((K, N, P)), uniform((K, N, module.hidden_size))


def weights_of(module, end):
    return [getattr(module, n + end, None) for n in ("weight_ih", "weight_hh", "weight_hr")], sum(
        getattr(module, n + end, 0) for n in ("bias_ih", "bias_hh")
    )


def plain_step(x, h, c, w_ih, w_hh, bias):
    i, f, g, o = (x @ w_ih.T + h @ w_hh.T + bias).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def by_hand(lstm, x, hx, masks, lengths, reset):
    """Layers over (L, N, I), of any option; masks of steps are (L, N, ..) or packed."""
    (L, N), D = x.shape[:2], 2 if lstm.bidirectional else 1
    order = lengths.argsort(descending=True, stable=True)
    row = order.argsort()  # of each sequence in a packed batch
    counts = (torch.arange(L).unsqueeze(1) < lengths).sum(1)
    starts = counts.cumsum(0) - counts

    def at(mask, t):
        """Of one step, where each is drawn, in the order of the batch."""
        if mask.dim() == 3:
            return mask[t]
        n = int(counts[t])
        rows = mask[starts[t] : starts[t] + n]
        return torch.cat([rows, rows.new_zeros(N - n, mask.shape[1])])[row]

    def drawn(p):
        return masks[p].pop(0) if lstm.training and p else None

    is_packed = bool((lengths < L).any())
    last = []
    for k in range(lstm.num_layers):
        outputs = []
        for d in range(D):
            (w_ih, w_hh, w_hr), bias = weights_of(lstm, f"_l{k}" + "_reverse" * d)
            keep_h, keep_c = drawn(lstm.zoneout_h), drawn(lstm.zoneout_c)
            dropout = drawn(lstm.recurrent_dropout)
            h, c = hx[0][k * D + d], hx[1][k * D + d]
            steps = [None] * L
            for t in reversed(range(L)) if d else range(L):
                here = (t < lengths).unsqueeze(1)
                start = (~reset[t]).unsqueeze(1) | ~here
                h, c = h * start, c * start
                z = h @ w_hh.T
                if dropout is not None:
                    p = lstm.recurrent_dropout
                    if lstm.recurrent_dropout_per_step:
                        mask = at(dropout, t) / (1 - p)
                    else:
                        mask = (dropout[row] if is_packed else dropout) / (1 - p)
                    if lstm.recurrent_dropout_per_gate:
                        of_gates = zip(mask.chunk(4, -1), w_hh.chunk(4), strict=True)
                        z = torch.cat([(h * m) @ w.T for m, w in of_gates], -1)
                    else:
                        z = (h * mask) @ w_hh.T
                i, f, g, o = (x[t] @ w_ih.T + z + bias).chunk(4, -1)
                new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                if lstm.cell_clip:
                    new_c = new_c.clamp(-lstm.cell_clip, lstm.cell_clip)
                new_h = o.sigmoid() * new_c.tanh()
                if w_hr is not None:
                    new_h = new_h @ w_hr.T
                    if lstm.projection_clip:
                        new_h = new_h.clamp(-lstm.projection_clip, lstm.projection_clip)
                u_h, u_c = 1 - lstm.zoneout_h, 1 - lstm.zoneout_c
                u_h = at(keep_h, t) if keep_h is not None else u_h
                u_c = at(keep_c, t) if keep_c is not None else u_c
                new_h, new_c = u_h * new_h + (1 - u_h) * h, u_c * new_c + (1 - u_c) * c
                h, c = torch.where(here, new_h, h), torch.where(here, new_c, c)
                steps[t] = h * here
            outputs.append(torch.stack(steps))
            last.append((h, c))
        x = torch.cat(outputs, -1)
    return x, *(torch.stack(s) for s in zip(*last, strict=True))


STEPS = {
    "zoneout of h": {"zoneout_h": 0.3},
    "zoneout of c": {"zoneout_c": 0.4},
    "dropout": {"recurrent_dropout": 0.35},
    "dropout per step": {"recurrent_dropout": 0.35, "recurrent_dropout_per_step": True},
    "dropout per gate": {"recurrent_dropout": 0.35, "recurrent_dropout_per_gate": True},
    "dropout per step and gate": {
        "recurrent_dropout": 0.35, "recurrent_dropout_per_step": True, "proj_size": 3,
        "recurrent_dropout_per_gate": True,
    },
    "clip": {"cell_clip": 0.4},
    "clips": {"cell_clip": 0.4, "projection_clip": 0.25, "proj_size": 3},
    "all": {
        "zoneout_h": 0.3, "zoneout_c": 0.4, "recurrent_dropout": 0.35, "cell_clip": 0.6,
        "projection_clip": 0.3, "proj_size": 4, "recurrent_dropout_per_step": True,
    },
    "all but projections": {
        "zoneout_h": 0.3, "zoneout_c": 0.4, "recurrent_dropout": 0.35, "cell_clip": 0.6,
    },
}  # fmt: skip


def is_of_torch_in_evaluation(options):
    return all("_dropout" in name or name == "proj_size" for name in options)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("packed", ["padded", "sorted", "unsorted"])
@pytest.mark.parametrize("options", STEPS)
def test_every_step(options, packed, training, masks):
    """Outputs and gradients, in two layers of two directions, with resets and given states."""
    options = STEPS[options]
    lstm = lstm_ext.LSTM(3, 5, 2, bidirectional=True, dtype=F64, **options).train(training)
    randomize(lstm)
    x, hx, reset = uniform((5, 3, 3)), states_for(lstm, 3), torch.rand(5, 3) < 0.3
    lengths = torch.tensor({"padded": [5, 5, 5], "sorted": [5, 4, 2]}.get(packed, [3, 5, 2]))
    leaves = [t.requires_grad_() for t in (x, *hx)]
    wanted = [*leaves, *lstm.parameters()]
    if packed == "padded":
        output, states = lstm(x, hx, reset=reset)
    else:
        value = pack_padded_sequence(x, lengths, enforce_sorted=packed == "sorted")
        output, states = lstm(value, hx, reset=reset)
        output = pad_packed_sequence(output)[0]
    found = (output, *states)
    assert bool(masks) == (training and any(p.startswith(("zone", "rec")) for p in options))
    expected = by_hand(lstm, x, hx, masks, lengths, reset)
    assert not any(masks.values())  # each was used
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    grads = [uniform(t.shape) for t in found]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, grads),
        torch.autograd.grad(expected, wanted, grads),
        rtol=1e-10,
        atol=1e-10,
    )
    plain = lstm_ext.LSTM(3, 5, 2, bidirectional=True, dtype=F64, proj_size=lstm.proj_size)
    plain.load_state_dict(lstm.state_dict())
    is_plain = not training and is_of_torch_in_evaluation(options)
    if packed == "padded":
        assert torch.equal(plain(x, hx, reset=reset)[0], output) == is_plain


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_dtypes(dtype, error, masks):
    lstm = lstm_ext.LSTM(3, 18, dtype=dtype, **STEPS["all but projections"])
    randomize(lstm)
    x, hx = uniform((5, 3, 3)).to(dtype), [s.to(dtype) for s in states_for(lstm, 3)]
    output, states = lstm(x, tuple(hx))
    wide = lstm_ext.LSTM(3, 18, dtype=F64, **STEPS["all but projections"])
    wide.load_state_dict(lstm.state_dict())
    no = torch.zeros(5, 3, dtype=torch.bool)
    full = torch.full((3,), 5)
    expected = by_hand(wide, x.double(), [s.double() for s in hx], masks, full, no)
    for a, b in zip((output, *states), expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=error)


def test_batch_first_single_and_nested(masks):
    options = STEPS["all but projections"]
    lstm = randomize(lstm_ext.LSTM(3, 5, dtype=F64, batch_first=True, **options)).eval()
    x = uniform((2, 6, 3))
    output, (h, c) = lstm(x)
    zeros = [torch.zeros_like(s) for s in (h, c)]
    no = torch.zeros(6, 2, dtype=torch.bool)
    expected = by_hand(lstm, x.transpose(0, 1), zeros, masks, torch.tensor([6, 6]), no)
    torch.testing.assert_close((output.transpose(0, 1), h, c), expected, rtol=0, atol=1e-12)
    one, (h_1, c_1) = lstm(x[1])
    torch.testing.assert_close((one, h_1, c_1), (output[1], h[:, 1], c[:, 1]))
    nested = torch.nested.nested_tensor([x[0, :4], x[1]], layout=torch.jagged)
    ragged, (h_2, _) = lstm(nested)
    torch.testing.assert_close(ragged[1], output[1])
    torch.testing.assert_close((ragged[0], h_2[:, 0]), (output[0, :4], output[:1, 3]))
    lstm.train()
    assert lstm(nested)[0][0].shape == (4, 5)


# As others have it.


def lstm_and_weights(I, H, **options):
    lstm = randomize(lstm_ext.LSTM(I, H, dtype=F64, **options))
    (w_ih, w_hh, _), bias = weights_of(lstm, "_l0")
    return lstm, (w_ih, w_hh, bias), uniform((6, 3, I)), torch.zeros(3, H, dtype=F64)


@pytest.mark.parametrize("training", [True, False])
def test_zoneout_of_haste(training, masks):
    lstm, w, x, h = lstm_and_weights(4, 5, zoneout_h=0.3)
    output, (_, c_n) = lstm.train(training)(x)
    c = h
    for t in range(6):
        before = h
        h, c = plain_step(x[t], h, c, *w)
        h = (h - before) * masks[0.3][0][t] + before if training else 0.3 * before + 0.7 * h
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)
    torch.testing.assert_close(c_n[0], c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", [True, False])
def test_zoneout_of_espnet(training, cell, masks):
    """espnet.nets.pytorch_backend.tacotron2.decoder.ZoneOutCell: its mask is 1 to keep."""
    lstm, w, x, h = lstm_and_weights(4, 5, zoneout_h=0.3, zoneout_c=0.2)
    lstm.train(training)
    if cell:
        step = lstm_ext.LSTMCell(4, 5, dtype=F64, zoneout_h=0.3, zoneout_c=0.2).train(training)
        step.load_state_dict({n.removesuffix("_l0"): v for n, v in lstm.state_dict().items()})
        found, state = [], None
        for t in range(6):
            state = step(x[t], state)
            found.append(state)
    else:
        output, (_, c_n) = lstm(x)
        found = [(output[t], None) for t in range(5)] + [(output[5], c_n[0])]

    def zoneout(t, h, next_h, prob):
        if not training:
            return prob * h + (1 - prob) * next_h
        update = masks[prob][t][0] if cell else masks[prob][0][t]
        mask = 1 - update
        return mask * h + (1 - mask) * next_h

    c = h
    for t in range(6):
        next_h, next_c = plain_step(x[t], h, c, *w)
        h, c = zoneout(t, h, next_h, 0.3), zoneout(t, c, next_c, 0.2)
        torch.testing.assert_close(found[t][0], h, rtol=0, atol=1e-12)
        if found[t][1] is not None:
            torch.testing.assert_close(found[t][1], c, rtol=0, atol=1e-12)


def test_recurrent_dropout_of_keras(masks):
    """keras.layers.LSTM: one mask (B, H) for all steps, on h, scaled; the carried h is whole."""
    lstm, w, x, h = lstm_and_weights(4, 5, recurrent_dropout=0.4)
    output, _ = lstm(x)
    ((mask,), c) = masks[0.4], h
    assert mask.shape == (3, 5)
    for t in range(6):
        h, c = plain_step(x[t], h * mask / 0.6, c, *w)
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["layer", "cell"])
def test_recurrent_dropout_of_keras_2(kind, masks):
    """keras.layers.LSTM with implementation 1: a mask (B, H) for each of the four gates."""
    options = {"recurrent_dropout": 0.4, "recurrent_dropout_per_gate": True}
    lstm, (w_ih, w_hh, bias), x, h = lstm_and_weights(4, 5, **options)
    if kind == "layer":
        output, _ = lstm(x)
    else:
        cell = lstm_ext.LSTMCell(4, 5, dtype=F64, **options)
        cell.load_state_dict({n.removesuffix("_l0"): v for n, v in lstm.state_dict().items()})
        x = x[:1]
        output = cell(x[0])[0].unsqueeze(0)
    (mask,) = masks[0.4]
    assert mask.shape == (3, 20)
    rec_dp_mask, c = (mask / 0.6).chunk(4, 1), h
    for t in range(len(x)):
        z = torch.cat([(h * m) @ w.T for m, w in zip(rec_dp_mask, w_hh.chunk(4), strict=True)], 1)
        i, f, g, o = (x[t] @ w_ih.T + z + bias).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", ["layers", "cell"])
def test_weight_dropout_of_fastai_and_awd(kind, rows, masks):
    """The same weights with a mask on weight_hh; rows: salesforce's variational form."""
    options = {"weight_dropout": 0.5, "weight_dropout_rows": rows}
    if kind == "cell":
        ours, theirs = lstm_ext.LSTMCell(4, 5, dtype=F64, **options), nn.LSTMCell(4, 5, dtype=F64)
        names, x = ["weight_hh"], uniform((3, 4))
        hx = uniform((3, 5)), uniform((3, 5))
    else:
        ours = lstm_ext.LSTM(4, 5, 2, bidirectional=True, dtype=F64, **options)
        theirs = nn.LSTM(4, 5, 2, bidirectional=True, dtype=F64)
        names = [f"weight_hh_l{k}{end}" for k in range(2) for end in ("", "_reverse")]
        x, hx = uniform((6, 3, 4)), None
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    output = ours(x, hx)[0]
    assert [m.shape for m in masks[0.5]] == [(20, 1 if rows else 5)] * len(names)
    dropped = dict(zip(names, masks[0.5], strict=True))
    with torch.no_grad():
        for name, mask in dropped.items():
            getattr(theirs, name).mul_(mask / 0.5)
    expected = theirs(x, hx)[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
    grads = torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))
    for (name, _), a, b in zip(ours.named_parameters(), found, grads, strict=True):
        if name in dropped:
            b = b * dropped[name] / 0.5
            assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_rnn_dropout_of_fastai(packed, masks):
    """On the input and between the layers: one mask for all steps of each sequence."""
    options = {"input_dropout": 0.4, "dropout": 0.3, "variational_dropout": True}
    lstm = randomize(lstm_ext.LSTM(4, 5, 2, dtype=F64, **options))
    layers = [lstm_ext.LSTM(n, 5, dtype=F64) for n in (4, 5)]
    for k, layer in enumerate(layers):
        own = {n: t for n, t in lstm.state_dict().items() if n.endswith(f"_l{k}")}
        layer.load_state_dict({n.replace(f"_l{k}", "_l0"): t for n, t in own.items()})
    x, lengths = uniform((6, 3, 4)), torch.tensor([2, 6, 3])
    if packed:
        output = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
        output = pad_packed_sequence(output)[0]
        row = lengths.argsort(descending=True).argsort()
        of_x, of_h = (masks[p][0][row].unsqueeze(0) for p in (0.4, 0.3))
    else:
        output = lstm(x)[0]
        of_x, of_h = masks[0.4][0], masks[0.3][0]
    assert (of_x.shape, of_h.shape) == ((1, 3, 4), (1, 3, 5))
    expected = layers[1](layers[0](x * of_x / 0.6)[0] * of_h / 0.7)[0]
    if packed:
        expected = expected * (torch.arange(6).unsqueeze(1) < lengths).unsqueeze(2)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_clips_of_elmo():
    """allennlp.modules.lstm_cell_with_projection, whose state_linearity has the one bias."""
    H, P = 6, 4
    lstm = lstm_ext.LSTM(5, H, proj_size=P, cell_clip=0.5, projection_clip=0.3, dtype=F64)
    randomize(lstm, 1.0)
    with torch.no_grad():
        lstm.bias_ih_l0.zero_()
    w, x, h = lstm, uniform((6, 3, 5)), uniform((3, P))
    c, clipped = uniform((3, H)), 0
    output, (_, c_n) = lstm(x, (h[None], c[None]))
    for t in range(6):
        projected_input = x[t] @ w.weight_ih_l0.T
        projected_state = h @ w.weight_hh_l0.T + w.bias_hh_l0
        i, f, g, o = (
            projected_input[:, k * H : (k + 1) * H] + projected_state[:, k * H : (k + 1) * H]
            for k in range(4)
        )
        memory = i.sigmoid() * g.tanh() + f.sigmoid() * c
        c = memory.clamp(-0.5, 0.5)
        pre_projection = o.sigmoid() * c.tanh()
        h = pre_projection @ w.weight_hr_l0.T
        clipped += int((h.abs() > 0.3).sum())
        h = h.clamp(-0.3, 0.3)
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)
    assert 5 < clipped < 6 * 3 * P
    torch.testing.assert_close(c_n[0], c, rtol=0, atol=1e-12)


# What is drawn.

DROPOUTS = {
    "recurrent": {"recurrent_dropout": 0.4},
    "each step": {"recurrent_dropout": 0.4, "recurrent_dropout_per_step": True},
    "input": {"input_dropout": 0.4},
    "weights": {"weight_dropout": 0.4},
    "rows": {"weight_dropout": 0.4, "weight_dropout_rows": True},
    "variational": {"dropout": 0.4, "variational_dropout": True},
}
DRAWN = {**DROPOUTS, "zoneout h": {"zoneout_h": 0.4}, "zoneout c": {"zoneout_c": 0.4}}


@pytest.mark.parametrize("p", [1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_shares(p, dtype):
    n = 300 * 333
    mask = _recurrence.keep_mask((300, 333), p, torch.empty(0, dtype=dtype))
    assert (mask.dtype, mask.shape) == (dtype, (300, 333))
    assert ((mask == 0) | (mask == 1)).all()
    dropped = n - mask.double().sum().item()
    # Six deviations, and what the rounding of p may add.
    assert abs(dropped - n * p) <= 6 * math.sqrt(n * p * (1 - p)) + n * 2**-17
    # Neighbours, of which four share a random number, have nothing to do with each other.
    if p == 0.5:
        flat = mask.double().flatten() - 0.5
        for step in (1, 2, 3, 4, 333):
            assert abs((flat[step:] * flat[:-step]).mean().item()) < 6 * 0.25 / math.sqrt(n)


@pytest.mark.parametrize("size", [(1,), (3,), (5, 1), (2, 3, 7), (0,), (3, 0)])
def test_sizes_of_masks(size):
    like = torch.empty(0)
    assert _recurrence.keep_mask(size, 1.0, like).shape == size
    assert not _recurrence.keep_mask(size, 1.0, like).any()
    assert _recurrence.keep_mask(size, 0.0, like).all()


def test_draws_of_each_row_differ():
    """Of steps, sequences, layers and directions."""
    seen = []
    real = _recurrence.keep_mask

    def keep(size, p, like):
        seen.append(real(size, p, like))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        computed_in_python(patch)
        patch.setattr(_recurrence, "keep_mask", keep)
        lstm_ext.LSTM(3, 64, 2, bidirectional=True, zoneout_h=0.5, zoneout_c=0.5)(
            torch.randn(5, 4, 3)
        )
    assert [m.shape for m in seen] == [(5, 4, 64)] * 8
    rows = torch.stack(seen).flatten(0, -2)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


@pytest.mark.parametrize("options", DRAWN)
def test_same_seed_same_numbers(options):
    lstm = lstm_ext.LSTM(3, 16, 2, **DRAWN[options])
    x = torch.randn(5, 2, 3)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(lstm(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


DIRECT = {
    **STEPS,
    "norms apart": {"normalize": "apart", "zoneout_h": 0.2},
    "norm of the sum": {"normalize": "sum", "carry_norm": True, "recurrent_dropout": 0.3},
    "no biases": {"normalize": "sum", "bias": False, "proj_size": 3, "projection_clip": 0.3},
    "coupled": {"coupled_gates": True},
    "coupled, clip": {"coupled_gates": True, "cell_clip": 0.4, "bias": False},
    "weight dropout": {"weight_dropout": 0.4, "proj_size": 3},
    "weight dropout, rows": {
        "weight_dropout": 0.4,
        "weight_dropout_rows": True,
        "zoneout_c": 0.3,
        "recurrent_dropout": 0.3,
    },
    "rare": {"zoneout_h": 1e-6, "recurrent_dropout": 1.0},
}


@pytest.fixture
def direct(monkeypatch):
    """The calls that C++ took and left, by name."""
    calls = []

    def watched(name, real):
        def call(*arguments):
            out = real(*arguments)
            calls.append((name, out is not None))
            return out

        return call

    for name in ("fast_lstm_with_steps", "fast_cell_with_steps"):
        monkeypatch.setattr(_ops, name, watched(name, getattr(_ops, name)))
    return calls


def module_of(kind, options, *sizes):
    normed = "normalize" in options
    cls = {
        "layer": (lstm_ext.LSTM, lstm_ext.LayerNormLSTM),
        "cell": (lstm_ext.LSTMCell, lstm_ext.LayerNormLSTMCell),
    }[kind][normed]
    return randomize(cls(*sizes, **options))


def in_both_ways(module, call):
    """Outputs, gradients and the generator's state after, by C++ and by Python."""
    results = []
    for by_python in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if by_python:
                computed_in_python(patch)
            torch.manual_seed(5)
            found = call()
            grads = [torch.ones_like(t) for t in found]
            found += torch.autograd.grad(found, list(module.parameters()), grads)
        results.append([*found, torch.get_rng_state()])
    return results


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", DIRECT)
def test_direct_calls(options, training, direct):
    """To the bit what Python computes, with the same draws."""
    options = dict(DIRECT[options])
    lstm = module_of("layer", {**options, "bidirectional": True}, 3, 5, 2).train(training)
    lengths = torch.tensor([3, 5, 2])
    packed = pack_padded_sequence(torch.randn(5, 3, 3), lengths, enforce_sorted=False)
    x, hx = torch.randn(5, 3, 3), tuple(s.float() for s in states_for(lstm, 3))

    def call():
        output, states = lstm(x, hx)
        of_packed, of_packed_states = lstm(packed)
        return [output, *states, of_packed.data, *of_packed_states]

    by_c, by_python = in_both_ways(lstm, call)
    assert all(map(torch.equal, by_c, by_python))
    # A dropout is of no effect in evaluation: torch's step, and another call.
    plain = not training and is_of_torch_in_evaluation(options)
    assert direct == [("fast_lstm_with_steps", True)] * (0 if plain else 2)
    lstm.batch_first = True
    assert all(map(torch.equal, *in_both_ways(lstm, lambda: [lstm(x.transpose(0, 1))[0]])))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", DIRECT)
def test_direct_calls_of_cells(options, training, direct):
    names = {"bias", "carry_norm", "normalize", *lstm_ext.LSTMCell.__init__.__kwdefaults__}
    options = {n: v for n, v in DIRECT[options].items() if n in names}
    cell = module_of("cell", options, 3, 5).train(training)
    x, hx = torch.randn(4, 3), (torch.randn(4, 5), torch.randn(4, 5))
    by_c, by_python = in_both_ways(cell, lambda: [*cell(x, hx), *cell(x)])
    assert all(map(torch.equal, by_c, by_python))
    plain = not training and is_of_torch_in_evaluation(options)
    assert direct == [("fast_cell_with_steps", True)] * (0 if plain else 2)


def test_what_direct_calls_leave_to_python(direct):
    """Options that are not of a step, and what C++ does not know."""
    x = torch.randn(5, 2, 3)

    def taken(module, input=x, **more):
        direct.clear()
        module(input, **more)
        return [by_c for _, by_c in direct]

    clipped = {"cell_clip": 0.5}
    assert taken(lstm_ext.LSTM(3, 4, **clipped)) == [True]
    module = lstm_ext.LSTM(3, 4, **clipped, input_dropout=0.5)
    assert taken(module) == [False]
    assert taken(module.eval()) == [True]
    assert taken(lstm_ext.LSTM(3, 4, **clipped, variational_dropout=True)) == [True]
    assert taken(lstm_ext.LSTM(3, 4, 2, dropout=0.5, **clipped)) == [False]
    assert taken(lstm_ext.LSTM(3, 4, **clipped), x[0]) == [False]
    assert taken(lstm_ext.LSTM(3, 4, **clipped), reset=torch.zeros(5, 2, dtype=torch.bool)) == []
    normed = lstm_ext.LayerNormLSTM(3, 4)
    assert taken(normed) == [True]
    torch.nn.utils.parametrizations.weight_norm(normed, "norm_c_l0", dim=None)
    assert taken(normed) == [False]
    cell = lstm_ext.LSTMCell(3, 4, zoneout_h=0.5)
    assert taken(cell, x[0]) == [True]
    assert taken(cell, x[0, 0]) == [False]
    # torch.func draws in its own way.
    cell.requires_grad_(False)
    direct.clear()
    torch.func.vmap(cell, randomness="different")(x)
    assert direct == [("fast_cell_with_steps", False)]


def made_a_buffer(module, name):
    delattr(module, name)
    module.register_buffer(name, torch.ones(4))


def parametrized(module, name):
    torch.nn.utils.parametrize.register_parametrization(module, name, nn.Softplus())


@pytest.mark.parametrize("kind", ["layer", "cell"])
@pytest.mark.parametrize("name", ["norm_c", "bias_c"])
@pytest.mark.parametrize(
    "change",
    [made_a_buffer, parametrized, lambda *of: prune.l1_unstructured(*of, 0.5)],
    ids=["buffer", "parametrization", "pruned"],
)
def test_norms_that_are_no_parameters(kind, name, change, direct):
    """The direct call leaves them to Python, which reads them as attributes."""
    module = module_of(kind, {"normalize": "sum"}, 3, 4)
    x = torch.randn(2, 3) if kind == "cell" else torch.randn(5, 2, 3)
    before = module(x)[0]
    change(module, name + ("" if kind == "cell" else "_l0"))
    by_c, by_python = in_both_ways(module, lambda: [module(x)[0]])
    assert all(map(torch.equal, by_c, by_python))
    assert not torch.equal(by_c[0], before)
    assert [taken for _, taken in direct] == [True, False]


def test_masks_are_drawn_where_the_layer_is():
    lstm = lstm_ext.LSTM(3, 4, weight_dropout=0.5, input_dropout=0.5, zoneout_h=0.5)
    x = torch.randn(5, 2, 3)
    with torch.device("meta"):
        assert lstm(x)[0].device.type == "cpu"


@pytest.mark.parametrize("size", [1, 5, 6])
@pytest.mark.parametrize("kind", ["layer", "cell"])
def test_coupled_gates_of_a_wrong_size(kind, size):
    module = module_of(kind, {"coupled_gates": True}, 3, 4)
    setattr(module, "bias_ih" if kind == "cell" else "bias_ih_l0", nn.Parameter(torch.zeros(size)))
    with pytest.raises((RuntimeError, ValueError)):
        module(torch.randn(2, 3) if kind == "cell" else torch.randn(5, 2, 3))


def test_direct_calls_check_what_they_read():
    """Norms of another size or dtype get the operator's error, not numbers."""
    x = torch.randn(5, 2, 3)
    for name, bad in (("norm_hh_l0", torch.ones(15)), ("norm_c_l0", torch.ones(4).double())):
        lstm = lstm_ext.LayerNormLSTM(3, 4)
        setattr(lstm, name, nn.Parameter(bad))
        with pytest.raises((RuntimeError, ValueError)):
            lstm(x)


@pytest.mark.parametrize("options", DROPOUTS)
@pytest.mark.parametrize("grad", [True, False])
def test_no_effect_in_evaluation(options, grad):
    """To the bit, with what a plain module has beside; and no draw."""
    options = DROPOUTS[options]
    lstm = lstm_ext.LSTM(3, 16, 2, **options).eval()
    plain = lstm_ext.LSTM(3, 16, 2, dropout=options.get("dropout", 0.0)).eval()
    plain.load_state_dict(lstm.state_dict())
    x, state = torch.randn(5, 2, 3), torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        found, expected = lstm(x), plain(x)
        for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            assert torch.equal(a, b)
        cells = [m(x, return_cell_states=True)[2] for m in (lstm, plain)]
        assert torch.equal(*cells)
        packed = [m(pack_padded_sequence(x, [5, 3]))[0].data for m in (lstm, plain)]
        assert torch.equal(*packed)
    assert torch.equal(torch.get_rng_state(), state)
    of_cell = {n: v for n, v in options.items() if hasattr(lstm_ext.LSTMCell, n)}
    cells = lstm_ext.LSTMCell(3, 16, **of_cell).eval(), lstm_ext.LSTMCell(3, 16).eval()
    cells[1].load_state_dict(cells[0].state_dict())
    for a, b in zip(cells[0](x[0]), cells[1](x[0]), strict=True):
        assert torch.equal(a, b)


def test_cell_step_by_step():
    """In evaluation, a cell by hand is the layer."""
    options = {"zoneout_h": 0.2, "zoneout_c": 0.3, "cell_clip": 0.4, "recurrent_dropout": 0.5}
    lstm = randomize(lstm_ext.LSTM(3, 6, **options)).eval()
    cell = lstm_ext.LSTMCell(3, 6, **options).eval()
    cell.load_state_dict({n.removesuffix("_l0"): t for n, t in lstm.state_dict().items()})
    x, state = torch.randn(5, 2, 3), None
    output, (h_n, c_n) = lstm(x)
    for t in range(5):
        state = cell(x[t], state)
        torch.testing.assert_close(output[t], state[0], rtol=0, atol=1e-6)
    torch.testing.assert_close((h_n[0], c_n[0]), state, rtol=0, atol=1e-6)
    one = cell(x[0, 0], (h_n[0, 0], c_n[0, 0]))
    torch.testing.assert_close(one[0], cell(x[0], (h_n[0], c_n[0]))[0][0], rtol=0, atol=1e-6)


def test_cell_with_given_masks(masks):
    cell = randomize(lstm_ext.LSTMCell(3, 5, dtype=F64, recurrent_dropout=0.4, zoneout_c=0.3))
    x, h, c = uniform((2, 3)), uniform((2, 5)), uniform((2, 5))
    found = cell(x, (h, c))
    (w_ih, w_hh, _), bias = weights_of(cell, "")
    new_h, new_c = plain_step(x, h * masks[0.4][0] / 0.6, c, w_ih, w_hh, bias)
    update = masks[0.3][0][0]
    torch.testing.assert_close(found, (new_h, update * new_c + (1 - update) * c))
