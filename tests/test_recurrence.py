"""The recurrence's operators: the reference against published formulas, the kernels against it."""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from limits import slow
from measure import DTYPES, Pool, uniform
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_ext import reference

OPS = torch.ops.lstm_ext
TENSORS = ("gates_x", "hx", "cx", "w_hh", "bias", "norm", "norm_c", "bias_c", "w_hr")
RESULTS = ("output", "h_n", "c_n", *TENSORS)
MASKS = ("update_h", "update_c", "dropout_h")
# L, N, H, P: one of each, few rows, enough for rows of a thread, and more than a panel of units.
SIZES = [(1, 1, 1, 1), (5, 3, 8, 3), (4, 1, 40, 33), (3, 20, 17, 16), (2, 50, 9, 5), (3, 49, 70, 9)]
PLAIN = {"reverse": False, "norm_joint": False, "carry_norm": False, "eps": 1e-5,
         "cell_clip": 0.0, "projection_clip": 0.0}  # fmt: skip


class Case:
    """A call: tensors (nine, or None), masks (three, or None), the order of steps, options."""

    def __init__(self, tensors, masks=(None,) * 3, sizes=None, reset=None, **options):
        self.tensors, self.masks = list(tensors), list(masks)
        self.sizes, self.reset = sizes, reset
        self.options = {**PLAIN, **options}

    def fused(self, *tensors):
        """Of other tensors: those that are there, in their order."""
        return OPS.lstm_recurrence(*self.all(tensors), *self.masks, *self.rest)

    def training(self, *tensors):
        return OPS.lstm_recurrence_forward(*self.all(tensors), *self.masks, *self.rest)

    @property
    def rest(self):
        return self.sizes, self.reset, *self.options.values()

    def by_reference(self, *tensors):
        gates_x, h, c, w_hh, *others = self.all(tensors)
        masks = [m if m is None else m.to(gates_x.dtype) for m in self.masks]
        output, states = reference.recurrence(
            gates_x, (h, c), w_hh, **dict(zip(TENSORS[4:], others, strict=True)),
            **dict(zip(MASKS, masks, strict=True)), batch_sizes=self.sizes, reset=self.reset,
            **self.options,
        )  # fmt: skip
        return output, *states

    def all(self, tensors):
        left = iter(tensors or self.given)
        return [None if t is None else next(left) for t in self.tensors]

    @property
    def given(self):
        return [t for t in self.tensors if t is not None]

    def leaves(self, dtype=None):
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.given]

    @property
    def names(self):
        return [*RESULTS[:3], *(n for n, t in zip(TENSORS, self.tensors, strict=True)
                                if t is not None)]  # fmt: skip

    def __str__(self):
        shapes = {n: tuple(t.shape) for n, t in zip(TENSORS, self.tensors, strict=True)
                  if t is not None}  # fmt: skip
        masks = {n: tuple(m.shape) for n, m in zip(MASKS, self.masks, strict=True)
                 if m is not None}  # fmt: skip
        order = {"packed": self.sizes is not None, "reset": self.reset is not None}
        return str({**shapes, **masks, **order, **self.options})


def draw_mask(chance, kind, lead, N, columns):
    """None, or of each unit, each sequence or all steps: zeros and ones, or a mean."""
    if kind == 0:
        return None
    shape = {1: (columns,), 2: (N, columns), 3: (*lead, columns)}[kind]
    if chance.random() < 0.3:
        return torch.full(shape, 0.7, dtype=torch.float64)
    return (torch.rand(shape) < 0.7).double() / (1 if chance.random() < 0.5 else 0.8)


def draw(seed, size, dtype=torch.float64, **fixed):
    """A case with random options, but for those that are fixed: True, False or a mask's kind."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    L, N, H, P = size

    def chosen(name, values=(False, True)):
        value = chance.choice(values)
        return fixed.get(name, value)

    P = P if chosen("w_hr") else H
    sizes = None
    if chosen("packed"):
        lengths = torch.randint(1, L + 1, (N,)).sort(descending=True).values
        lengths[0] = L
        sizes = pack_padded_sequence(torch.zeros(L, N, 1), lengths).batch_sizes
    lead = (L, N) if sizes is None else (int(sizes.sum()),)
    shapes = [(*lead, 4 * H), (N, P), (N, H), (4 * H, P), (4 * H,), (4 * H,), (H,), (H,), (P, H)]
    tensors = [uniform(s) * (H**-0.5 if k in (3, 8) else 1) for k, s in enumerate(shapes)]
    for k, name in enumerate(TENSORS[4:], 4):
        if not (chosen(name) if name != "w_hr" else P != H or fixed.get(name)):
            tensors[k] = None
    if tensors[6] is None:
        tensors[7] = None
    kinds = [chosen(name, range(4)) for name in MASKS]
    by_gate = fixed.get("by_gate", random.Random(seed + 1).random() < 0.3)
    columns = P, H, 4 * P if by_gate else P
    masks = [draw_mask(chance, kind, lead, N, K) for kind, K in zip(kinds, columns, strict=True)]
    reset = torch.rand(L, N) < 0.3 if chosen("reset") else None
    options = {name: chosen(name) for name in ("reverse", "norm_joint", "carry_norm")}
    options["eps"] = chance.choice([1e-2, 1e-3])
    options["cell_clip"] = 0.8 * chosen("cell_clip")
    options["projection_clip"] = 0.4 * chosen("projection_clip") * (tensors[8] is not None)
    return Case(
        [None if t is None else t.to(dtype) for t in tensors],
        [None if m is None else m.to(dtype) for m in masks],
        sizes, reset, **options,
    )  # fmt: skip


def results(call, leaves):
    """Outputs and gradients of a random combination of them."""
    out = call(*leaves)[:3]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in out]
    of = [(t, g.to(t.dtype)) for t, g in zip(out, grads, strict=True) if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in of], leaves, [g for _, g in of], allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return [t.detach() for t in (*out, *found)]


def many(count, seed=0, **fixed):
    """Cases of every size in turn, on one thread and on two."""
    before = torch.get_num_threads()
    try:
        for k in range(seed, seed + count):
            torch.set_num_threads(1 + k % 2)
            yield draw(k, SIZES[k % len(SIZES)], **fixed)
    finally:
        torch.set_num_threads(before)


# The reference against what others have written, each formula from its source.


def layer_norm(v, weight, bias, eps):
    return nn.functional.layer_norm(v, v.shape[-1:], weight, bias, eps)


def weights_of(I=5, H=4, L=6, N=3):
    """x, h, c, w_ih, w_hh, and as many vectors as a formula needs."""
    x, h, c = uniform((L, N, I)), uniform((N, H)), uniform((N, H))
    return x, h, c, uniform((4 * H, I)) * 0.4, uniform((4 * H, H)) * 0.4


def steps_of(step, x, h, c):
    outputs = []
    for t, row in enumerate(x):
        h, c = step(t, row, h, c)
        outputs.append(h)
    return torch.stack(outputs), (h, c)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_torchaudios_custom_lstm():
    """torchaudio.models.rnnt._CustomLSTM: g_norm of the sum, c_norm, whose result is carried."""
    x, h, c, x2g, p2g = weights_of()
    g_weight, g_bias, c_weight, c_bias = (uniform((k,)) for k in (16, 16, 4, 4))

    def step(_, x, h, c):
        gates = layer_norm(x @ x2g.T + h @ p2g.T, g_weight, g_bias, 1e-3)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        c = layer_norm(c, c_weight, c_bias, 1e-3)
        return o.sigmoid() * c.tanh(), c

    found = reference.recurrence(
        x @ x2g.T, (h, c), p2g, norm=g_weight, bias=g_bias, norm_c=c_weight, bias_c=c_bias,
        norm_joint=True, carry_norm=True, eps=1e-3,
    )  # fmt: skip
    close(found, steps_of(step, x, h, c))


@pytest.mark.parametrize("zoneout", [None, "training", "evaluation"])
def test_hastes_layer_norm_lstm(zoneout):
    """Gates i g f o; gamma for each product, no beta; the raw c is carried; zoneout of h alone."""
    x, h, c, kernel, recurrent = weights_of()
    gamma, gamma2, bias = (uniform((16,)) for _ in range(3))
    gamma_h, beta_h = uniform((4,)), uniform((4,))
    mask = (torch.rand(6, 3, 4) < 0.7).double()

    def step(t, x, h, c):
        pre = layer_norm(x @ kernel.T, gamma, None, 1e-5)
        pre = pre + layer_norm(h @ recurrent.T, gamma2, None, 1e-5) + bias
        i, g, f, o = pre.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new = torch.sigmoid(o) * torch.tanh(layer_norm(c, gamma_h, beta_h, 1e-5))
        if zoneout == "training":
            new = (new - h) * mask[t] + h
        elif zoneout == "evaluation":
            new = 0.3 * h + 0.7 * new
        return new, c

    def ifgo(w):
        i, g, f, o = w.chunk(4)
        return torch.cat([i, f, g, o])

    gates_x = layer_norm(x @ ifgo(kernel).T, ifgo(gamma), None, 1e-5)
    update = {
        None: None,
        "training": mask,
        "evaluation": torch.full((4,), 0.7, dtype=torch.float64),
    }[zoneout]
    found = reference.recurrence(
        gates_x, (h, c), ifgo(recurrent), norm=ifgo(gamma2), bias=ifgo(bias), norm_c=gamma_h,
        bias_c=beta_h, update_h=update,
    )  # fmt: skip
    close(found, steps_of(step, x, h, c))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_lstms_that_carry_the_normalised_c(bias):
    """fastrnns' LayerNormLSTM, eps 1e-5; tensorflow_addons' has a bias too, and eps 1e-3."""
    eps = 1e-3 if bias else 1e-5
    x, h, c, w_ih, w_hh = weights_of()
    i_weight, i_bias, h_weight, h_bias, extra = (uniform((16,)) for _ in range(5))
    c_weight, c_bias = uniform((4,)), uniform((4,))
    extra = extra * bias

    def step(_, x, h, c):
        igates = layer_norm(x @ w_ih.T, i_weight, i_bias, eps)
        hgates = layer_norm(h @ w_hh.T, h_weight, h_bias, eps)
        ingate, forgetgate, cellgate, outgate = (igates + hgates + extra).chunk(4, 1)
        cy = (forgetgate.sigmoid() * c) + (ingate.sigmoid() * cellgate.tanh())
        cy = layer_norm(cy, c_weight, c_bias, eps)
        return outgate.sigmoid() * torch.tanh(cy), cy

    gates_x = layer_norm(x @ w_ih.T, i_weight, i_bias, eps)
    found = reference.recurrence(
        gates_x, (h, c), w_hh, norm=h_weight, bias=h_bias + extra, norm_c=c_weight, bias_c=c_bias,
        carry_norm=True, eps=eps,
    )  # fmt: skip
    close(found, steps_of(step, x, h, c))


def test_elmos_cell_with_projection():
    """AllenNLP's LstmCellWithProjection: c clamped, h projected and then clamped."""
    x, h, c, w_ih, _ = weights_of()
    h, w_hh, w_hr = uniform((3, 2)), uniform((16, 2)), uniform((2, 4))
    bias = uniform((16,))
    clamped = []

    def step(_, x, h, c):
        i, f, g, o = (x @ w_ih.T + h @ w_hh.T + bias).chunk(4, 1)
        memory = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * c
        limited = torch.clamp(memory, -0.6, 0.6)
        projected = (torch.sigmoid(o) * torch.tanh(limited)) @ w_hr.T
        clamped.append([(memory != limited).any(), (projected.abs() > 0.3).any()])
        return torch.clamp(projected, -0.3, 0.3), limited

    found = reference.recurrence(
        x @ w_ih.T, (h, c), w_hh, bias=bias, w_hr=w_hr, cell_clip=0.6, projection_clip=0.3
    )
    close(found, steps_of(step, x, h, c))
    assert all(any(kind) for kind in zip(*clamped, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_espnets_zoneout(training):
    """ZoneOutCell around nn.LSTMCell: h and c with rates of their own, a mask 1 keeps the old."""
    x, h, c, w_ih, w_hh = weights_of()
    cell = nn.LSTMCell(5, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        cell.weight_ih.copy_(w_ih)
        cell.weight_hh.copy_(w_hh)
    rates = 0.1, 0.4
    masks = [torch.empty(6, 3, 4, dtype=torch.float64).bernoulli_(p) for p in rates]

    def step(t, x, h, c):
        new = []
        for old, next_, mask, p in zip((h, c), cell(x, (h, c)), masks, rates, strict=True):
            old_part = mask[t] if training else p
            new.append(old_part * old + (1 - old_part) * next_)
        return tuple(new)

    updates = [1 - m for m in masks]
    if not training:
        updates = [torch.full((4,), 1 - p, dtype=torch.float64) for p in rates]
    found = reference.recurrence(x @ w_ih.T, (h, c), w_hh, update_h=updates[0], update_c=updates[1])
    with torch.no_grad():
        close(found, steps_of(step, x, h, c))


def test_keras_recurrent_dropout():
    """One mask of each sequence for all steps, scaled, on the h that the matrix multiplies."""
    x, h, c, w_ih, w_hh = weights_of()
    mask = (torch.rand(3, 4) < 0.6).double() / 0.6

    def step(_, x, h, c):
        i, f, g, o = (x @ w_ih.T + (h * mask) @ w_hh.T).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    found = reference.recurrence(x @ w_ih.T, (h, c), w_hh, dropout_h=mask)
    close(found, steps_of(step, x, h, c))
    # The same mask at every step, written out.
    close(reference.recurrence(x @ w_ih.T, (h, c), w_hh, dropout_h=mask.expand(6, 3, 4)), found)


def test_keras_recurrent_dropout_of_each_gate():
    """Keras 2's LSTMCell, implementation 1: h_tm1_i = h_tm1 * rec_dp_mask[0], and so on."""
    x, h, c, w_ih, w_hh = weights_of()
    masks = [(torch.rand(3, 4) < 0.6).double() / 0.6 for _ in range(4)]

    def step(_, x, h, c):
        fed = zip(masks, w_ih.chunk(4), w_hh.chunk(4), strict=True)
        i, f, g, o = (x @ w.T + (h * mask) @ recurrent.T for mask, w, recurrent in fed)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    joined = torch.cat(masks, 1)
    for mask in (joined, joined.expand(6, 3, 16)):
        found = reference.recurrence(x @ w_ih.T, (h, c), w_hh, dropout_h=mask)
        close(found, steps_of(step, x, h, c))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_without_options_it_is_the_plain_layer(packed, reverse):
    plain = dict.fromkeys(("norm", "norm_c", "bias_c", "cell_clip"), False)
    case = draw(
        3, (5, 4, 6, 3), packed=packed, reverse=reverse, reset=True, bias=True, w_hr=True,
        projection_clip=False, **plain, **dict.fromkeys(MASKS, 0),
    )  # fmt: skip
    gates_x, h, c, w_hh, bias, _, _, _, w_hr = case.tensors
    eye = torch.eye(24, dtype=torch.float64)
    output, states = reference.lstm(
        gates_x, (h, c), eye, w_hh, bias, None, case.sizes, case.reset, reverse, w_hr=w_hr
    )
    close(case.by_reference(), (output, *states))


# The kernels against the reference.


def test_cases_have_every_option():
    """Of those that the tests below draw, each option is there with and without each other one."""
    seen = set()
    for case in many(120):
        has = [t is not None for t in (*case.tensors[4:], *case.masks, case.sizes, case.reset)]
        has += [bool(v) for k, v in case.options.items() if k != "eps"]
        seen |= {(a, b, has[a], has[b]) for a, b in itertools.combinations(range(len(has)), 2)}
    pairs = list(itertools.combinations(range(len(has)), 2))
    missing = {(a, b, x, y) for a, b in pairs for x in (False, True) for y in (False, True)} - seen
    # A bias of c comes with its norm, a clip of the projection with a projection.
    assert missing == {(2, 3, False, True), (4, len(has) - 1, False, True)}


def test_numbers_are_the_references():
    for case in many(120):
        found = results(case.fused, case.leaves())
        truth = results(case.by_reference, case.leaves())
        for name, a, b in zip(case.names, found, truth, strict=True):
            error = (a - b).norm()
            assert error <= 1e-11 * b.norm() + 1e-12, f"{name}: {error} in {case}"


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("count", [60, *slow(300)])
def test_is_as_exact_as_the_reference(dtype, count):
    """Both in the same dtype, against float64.

    Not the gradients of clips in 16 bits: a rounding decides there on which side a value lies.
    """
    pools = {}
    for case in many(count, seed=1000, dtype=dtype):
        truth = results(case.by_reference, case.leaves(torch.float64))
        found = results(case.fused, case.leaves())
        plain = results(case.by_reference, case.leaves())
        clips = case.options["cell_clip"] or case.options["projection_clip"]
        known = 3 if clips and dtype != torch.float32 else None
        rows = zip(case.names, truth, found, plain, strict=True)
        for name, exact, a, b in itertools.islice(rows, known):
            assert a.dtype == dtype
            scale = exact.abs().max().clamp(min=1e-2)
            pools.setdefault(name, Pool()).add(
                (exact / scale).numpy(), a.double() / scale, b.double() / scale
            )
    assert set(pools) == set(RESULTS)
    for name, pool in pools.items():
        pool.assert_no_worse(name, dtype, ratio=2)


CODE = """
import torch, test_recurrence as tests, lstm_ext
print(lstm_ext.build_info()["cpu_instruction_set"])
tests.test_numbers_are_the_references()
tests.test_is_as_exact_as_the_reference(torch.bfloat16, 60)
"""


def test_the_oldest_instruction_set():
    """Of all others: test_cpu_paths.py."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_has_the_bits_of_inference(dtype):
    for case in many(24, seed=2000, dtype=dtype):
        with torch.no_grad():
            inference = case.fused()
        assert all(t.grad_fn is None for t in inference)
        training = case.fused(*case.leaves())
        kept = case.training()
        for a, b, c in zip(inference, training, kept[:3], strict=True):
            assert b.grad_fn is not None
            assert torch.equal(a, b.detach())
            assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_number_depends_on_threads(dtype):
    before = torch.get_num_threads()
    # Beside SIZES, one column of very many rows, which sums have in parts.
    sizes = [*SIZES, (400, 100, 1, 1), (4, 3, 300, 150), (20, 60, 33, 20)]
    try:
        for k, size in enumerate(sizes):
            full = dict.fromkeys(("bias", "norm", "norm_c", "bias_c"), True) if k >= 6 else {}
            case = draw(3000 + k, size, dtype, **full)
            torch.set_num_threads(1)
            alone = results(case.fused, case.leaves())
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                together = results(case.fused, case.leaves())
                for name, a, b in zip(case.names, alone, together, strict=True):
                    if size[0] == 1:  # torch multiplies
                        torch.testing.assert_close(a, b)
                        continue
                    assert torch.equal(a, b), f"{name} on {threads} threads in {case}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(4, 50, 17, 9), (3, 50, 70, 20)])
def test_rows_do_not_depend_on_each_other(size):
    """A sequence has the same bits in a batch of others, and alone."""
    L, N = size[:2]
    for seed in range(6):
        case = draw(4000 + seed, size, torch.float32, packed=seed % 2 == 1)
        output, h, c = case.fused()
        sizes = [N] * L if case.sizes is None else case.sizes.tolist()
        offsets = [0, *itertools.accumulate(sizes)]
        for row in (0, 1, 23, 24, 49):
            length = sum(n > row for n in sizes)
            mine = torch.tensor([offsets[t] + row for t in range(length)])

            def of_steps(t, mine=mine, length=length):
                return t.flatten(0, -2)[mine].view(length, 1, -1)

            def of_mask(mask, row=row, of_steps=of_steps):
                if mask is None or mask.dim() == 1:
                    return mask
                return mask[row : row + 1] if mask.dim() == 2 and len(mask) == N else of_steps(mask)

            gates_x, hx, cx, *weights = case.tensors
            alone = Case(
                [of_steps(gates_x), hx[row : row + 1], cx[row : row + 1], *weights],
                map(of_mask, case.masks), None,
                None if case.reset is None else case.reset[:length, row : row + 1], **case.options,
            ).fused()  # fmt: skip
            for a, b in zip((of_steps(output), h[row : row + 1], c[row : row + 1]), alone,
                            strict=True):  # fmt: skip
                if length == 1:  # torch multiplies
                    torch.testing.assert_close(a, b)
                else:
                    assert torch.equal(a, b)


def test_other_layouts_have_the_same_numbers():
    """Not dense, of every argument: what a kernel would read in the wrong order."""

    def strided(t):
        if t is None:
            return None
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]

    for seed in range(12):
        case = draw(5000 + seed, (4, 5, 9, 6), torch.float32)
        tensors, masks = map(strided, case.tensors), map(strided, case.masks)
        reset = None if case.reset is None else strided(case.reset)
        other = Case(tensors, masks, case.sizes, reset, **case.options)
        found, expected = (results(c.fused, c.leaves()) for c in (other, case))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_inputs_stay_as_they_were():
    for case in many(12, seed=6000):
        before = [t.clone() for t in case.given]
        case.fused()
        results(case.fused, case.leaves())
        for a, b in zip(case.given, before, strict=True):
            assert torch.equal(a, b)


# Gradients.

GRADCHECKED = [
    {"norm": True, "norm_c": True, "bias_c": True, "w_hr": True, "norm_joint": False},
    {"norm": True, "norm_c": True, "norm_joint": True, "carry_norm": True, "w_hr": False},
    {"norm": False, "w_hr": True, "cell_clip": True, "projection_clip": True},
    {"norm": True, "norm_c": False, "update_h": 3, "update_c": 2, "dropout_h": 1},
]


@pytest.mark.parametrize("which", [0, *slow(1, 2, 3)])
@pytest.mark.parametrize("packed", [False, *slow(True)])
def test_gradcheck(which, packed):
    """Of both orders, and forward mode."""
    case = draw(7000 + which, (2, 2, 3, 2), packed=packed, reset=True, bias=True,
                **GRADCHECKED[which])  # fmt: skip
    assert torch.autograd.gradcheck(case.fused, case.leaves(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.fused, case.leaves(), fast_mode=True)


def test_second_derivatives_are_the_references():
    for seed in range(20):
        case = draw(8000 + seed, (3, 3, 5, 2))
        found = []
        for call in (case.fused, case.by_reference):
            leaves = case.leaves()
            out = call(*leaves)
            generator = torch.Generator().manual_seed(1)
            draws = [torch.randn(t.shape, generator=generator, dtype=t.dtype)
                     for t in (*out, *leaves)]  # fmt: skip
            first = torch.autograd.grad(out, leaves, draws[:3], create_graph=True)
            second = torch.autograd.grad(first, leaves, draws[3:], allow_unused=True)
            second = [torch.zeros_like(t) if g is None else g
                      for t, g in zip(leaves, second, strict=True)]  # fmt: skip
            found.append([*first, *second])
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_forward_mode_is_the_references():
    for seed in range(8):
        case = draw(8500 + seed, (3, 3, 5, 2))
        directions = [uniform(t.shape) for t in case.given]
        found, expected = (
            torch.func.jvp(call, tuple(case.given), tuple(directions))
            for call in (case.fused, case.by_reference)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wanted", range(len(TENSORS)), ids=TENSORS)
def test_gradients_that_are_asked_for_alone(wanted):
    every = dict.fromkeys((*TENSORS[4:], "reset"), True)
    for seed in range(4):
        case = draw(9000 + seed, (4, 3, 9, 5), packed=seed % 2 == 1, **every)
        truth = results(case.by_reference, case.leaves())[3 + wanted]
        leaves = [t.requires_grad_(k == wanted) for k, t in enumerate(case.leaves())]
        out = case.fused(*leaves)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in out]
        (found,) = torch.autograd.grad(out, leaves[wanted], grads)
        torch.testing.assert_close(found, truth)
        for k in range(3):  # of one output alone
            found, expected = (
                torch.autograd.grad(call(*leaves)[k].sum(), leaves[wanted], allow_unused=True)[0]
                for call in (case.fused, case.by_reference)
            )
            expected = torch.zeros_like(found) if expected is None else expected
            torch.testing.assert_close(found, expected)


def test_masks_that_require_grad():
    """They have gradients, by tensor operations."""
    for seed, kind in enumerate((1, 2, 3, 3)):
        case = draw(9500 + seed, (4, 3, 5, 2), **dict.fromkeys(MASKS, kind))
        found = []
        for call in (case.fused, case.by_reference):
            case.masks = [m.detach().requires_grad_() for m in case.masks]
            leaves = case.leaves()
            out = call(*leaves)
            total = sum(t.sin().sum() for t in out)
            found.append(torch.autograd.grad(total, [*case.masks, *leaves]))
        torch.testing.assert_close(*found)


def test_no_nan_where_nothing_varies():
    """Rows without a deviation: one unit, or all alike; forward and backward."""
    for H in (1, 6):
        tensors = [
            torch.zeros(3, 2, 4 * H),
            torch.zeros(2, H),
            torch.zeros(2, H),
            torch.zeros(4 * H, H),
            None,
            torch.ones(4 * H),
            torch.ones(H),
            None,
            None,
        ]
        for joint, carry in itertools.product([False, True], repeat=2):
            given = [t if t is None else t.double() for t in tensors]
            case = Case(given, norm_joint=joint, carry_norm=carry)
            for a, b in zip(
                results(case.fused, case.leaves()),
                results(case.by_reference, case.leaves()),
                strict=True,
            ):
                assert a.isfinite().all()
                torch.testing.assert_close(a, b)


# Everything of PyTorch around it.


def composite(op, *arguments):
    """The tensor operations that devices without kernels get, on the CPU's tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    return getattr(OPS, op).default.redispatch(keys, *arguments)


def test_tensor_operations_are_the_kernels():
    for case in many(24, seed=10_000):
        arguments = *case.tensors, *case.masks, *case.rest
        torch.testing.assert_close(
            composite("lstm_recurrence", *arguments), OPS.lstm_recurrence(*arguments)
        )
        theirs = composite("lstm_recurrence_forward", *arguments)
        mine = OPS.lstm_recurrence_forward(*arguments)
        torch.testing.assert_close(theirs, mine)
        grads = [uniform(t.shape) for t in mine[:3]]
        wanted = [t is not None for t in case.tensors]
        arguments = *grads, *arguments, *mine[3:], wanted
        found = composite("lstm_recurrence_backward", *arguments)
        expected = OPS.lstm_recurrence_backward(*arguments)
        assert [t is not None for t in expected] == wanted
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_other_dtypes():
    """Complex numbers by tensor operations; of two dtypes torch's own error."""
    clips = {"cell_clip": False, "projection_clip": False}
    for seed in range(6):
        case = draw(10_500 + seed, (3, 2, 4, 3), torch.complex128, **clips)
        torch.testing.assert_close(case.fused(), case.by_reference())
        case = draw(10_500 + seed, (3, 2, 4, 3), torch.float32, update_h=1, packed=False)
        case.masks[0] = case.masks[0].double()
        with pytest.raises(RuntimeError, match="same dtype"):
            case.fused()


NONE = (0, 2, 5, 3), (3, 0, 5, 3), (0, 0, 5, 3), (3, 2, 0, 3), (3, 2, 5, 0), (3, 2, 0, 0)


@pytest.mark.parametrize("size", NONE)
@pytest.mark.parametrize("projects", [False, True])
def test_nothing(size, projects):
    """No steps, no rows, no units or no projected ones."""
    L, N, H, P = size
    P = P if projects else H
    shapes = [(L, N, 4 * H), (N, P), (N, H), (4 * H, P), (4 * H,), (4 * H,), (H,), (H,), (P, H)]
    tensors = [uniform(s) for s in shapes]
    tensors[8] = tensors[8] if projects else None
    for normed in (False, True):
        if not normed:
            tensors[5:8] = None, None, None
        case = Case(tensors, [torch.full((K,), 0.7, dtype=torch.float64) for K in (P, H, P)])
        for a, b in zip(results(case.fused, case.leaves()),
                        results(case.by_reference, case.leaves()), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b)


def spoiled():
    """Name, and what makes a right call a wrong one."""

    def tensor(k, change):
        def spoil(case):
            case.tensors[k] = change(case.tensors[k])

        return spoil

    def mask(k, change):
        def spoil(case):
            case.masks[k] = change(case.masks[k])

        return spoil

    sizes = "expected gates_x (L, N, 4H)"
    longer = lambda t: torch.cat([t, t[..., :1]], -1)  # noqa: E731
    for k, name in enumerate(TENSORS):
        yield f"{name} too wide", tensor(k, longer), sizes
        yield f"{name} of one dimension more", tensor(k, lambda t: t[None]), sizes
    for k, name in enumerate(MASKS):
        yield f"{name} too wide", mask(k, longer), sizes
        yield f"{name} of other steps", mask(k, lambda t: t[1:]), sizes
        yield f"{name} of other sequences", mask(k, lambda t: t[0, 1:]), sizes
        yield f"{name} a number", mask(k, lambda t: t[0, 0, 0]), sizes
    yield "bias_c alone", tensor(6, lambda _: None), "bias_c is for a call with norm_c"
    yield "P other than H", tensor(8, lambda _: None), sizes
    for name, value, words in (
        ("cell_clip", -1.0, "a clip must not be negative"),
        ("projection_clip", -1.0, "a clip must not be negative"),
        ("eps", 0.0, "eps must be positive"),
    ):
        yield name, lambda c, n=name, v=value: c.options.update({n: v}), words

    def wrong_reset(case):
        case.reset = case.reset[1:]

    yield "reset", wrong_reset, "reset must be a bool tensor of shape"

    def wrong_sizes(case):
        case.sizes, case.tensors[0] = torch.tensor([3, 3]), case.tensors[0].flatten(0, 1)
        case.masks = [None] * 3

    yield "batch_sizes", wrong_sizes, "as many rows as batch_sizes adds up to"


SPOILED = list(spoiled())


@pytest.mark.parametrize(("spoil", "words"), [s[1:] for s in SPOILED], ids=[s[0] for s in SPOILED])
def test_errors(spoil, words):
    every = dict.fromkeys(TENSORS[4:], True)
    masks = dict.fromkeys(MASKS, 3)
    for grad in (False, True):
        case = draw(1, (4, 3, 5, 2), packed=False, reset=True, **every, **masks)
        spoil(case)
        with pytest.raises(RuntimeError) as raised:
            case.fused(*case.leaves()) if grad else case.fused()
        assert words in str(raised.value)


def test_errors_of_what_goes_together():
    case = draw(1, (4, 3, 5, 2), w_hr=False, packed=False)
    case.options["projection_clip"] = 0.5
    with pytest.raises(RuntimeError, match="projection_clip is for a call with w_hr"):
        case.fused()
    case = draw(2, (4, 3, 5, 2), norm=True, packed=False)
    *kept, _ = case.training()[3:]
    grads = [torch.ones_like(t) for t in case.fused()]
    arguments = *case.tensors, *case.masks, *case.rest
    with pytest.raises(RuntimeError, match="what the forward kept must be that of"):
        OPS.lstm_recurrence_backward(
            *grads, *arguments, kept[0][1:], *kept[1:], case.training()[-1], [True] * 9
        )
    number = case.tensors[0].flatten()[0]
    with pytest.raises(RuntimeError, match="expected gates_x"):
        OPS.lstm_recurrence_backward(
            *grads, number, *arguments[1:], *case.training()[3:], [True] * 9
        )
    with pytest.raises(RuntimeError, match="a gradient must have its tensor's shape"):
        OPS.lstm_recurrence_backward(
            grads[0][1:], *grads[1:], *arguments, *case.training()[3:], [True] * 9
        )


def stacked(tensors, which):
    """Three of each of those that are named, and the dimension of each."""
    given, dims = [], []
    for name, t in tensors.items():
        batched = t is not None and name in which
        given.append(torch.stack([t, t * 0.5, t + 0.1], 1 if t.dim() > 1 else 0) if batched else t)
        dims.append((1 if t.dim() > 1 else 0) if batched else None)
    return given, dims


BATCHED = {
    "all": {*TENSORS, *MASKS},
    "states": {"hx", "cx"},
    "input": {"gates_x"},
    "weights": {"w_hh", "norm"},
    "masks": set(MASKS),
}


@pytest.mark.parametrize("which", BATCHED)
@pytest.mark.parametrize("packed", [False, True])
def test_vmap(which, packed):
    for kind in range(4):
        case = draw(11_000 + kind, (4, 2, 5, 3), packed=packed, reset=True, norm=True,
                    **dict.fromkeys(MASKS, kind))  # fmt: skip
        values = dict(zip((*TENSORS, *MASKS), (*case.tensors, *case.masks), strict=True))
        given, dims = stacked(values, BATCHED[which])
        if all(d is None for d in dims):
            continue
        for op in (OPS.lstm_recurrence, OPS.lstm_recurrence_forward):

            def call(*tensors, op=op, case=case):
                return op(*tensors, *case.rest)

            found = torch.vmap(call, tuple(dims))(*given)
            each = [
                call(*(t if d is None else t.select(d, k)
                       for t, d in zip(given, dims, strict=True)))
                for k in range(3)
            ]  # fmt: skip
            for a, b in zip(found, zip(*each, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_each_sample(packed):
    """torch.func.grad, alone and under vmap."""
    case = draw(11_500, (4, 2, 5, 3), packed=packed, norm=True, norm_c=True)

    def loss(weights, gates_x):
        h, c = case.tensors[1:3]
        return sum(t.square().sum() for t in case.fused(gates_x, h, c, *weights))

    weights = case.given[3:]
    x = torch.stack([case.tensors[0], case.tensors[0] * 0.5])
    found = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for k, one in enumerate(x):
        leaves = [w.detach().requires_grad_() for w in weights]
        expected = torch.autograd.grad(loss(leaves, one), leaves)
        torch.testing.assert_close(torch.func.grad(loss)(weights, one), [*expected])
        torch.testing.assert_close([g[k] for g in found], [*expected])


@pytest.mark.parametrize("packed", [False, True])
def test_compile(packed):
    case = draw(12_000, (4, 3, 5, 2), packed=packed, norm=True, w_hr=True, reset=True)
    compiled = torch.compile(case.fused, fullgraph=True, backend="aot_eager")
    found, expected = (results(call, case.leaves()) for call in (compiled, case.fused))
    torch.testing.assert_close(found, expected)


def test_export():
    case = draw(12_500, (4, 3, 5, 2), packed=False, norm=True, w_hr=True, update_h=1, update_c=1,
                dropout_h=1, reset=False)  # fmt: skip

    class Layer(nn.Module):
        def forward(self, gates_x):
            return case.fused(gates_x, *case.given[1:])

    x = case.tensors[0]
    dynamic = ({0: torch.export.Dim("L")},)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=dynamic)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "lstm_ext.lstm_recurrence.default" in targets
    longer = uniform((9, *x.shape[1:]))
    torch.testing.assert_close(program.module()(longer), Layer()(longer))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low):
    """All of it in the lower precision; float64 stays as it is."""
    for seed in range(4):
        case = draw(13_000 + seed, (4, 3, 5, 2), torch.float32)
        leaves = case.leaves()
        with torch.autocast("cpu", low):
            out = case.fused(*leaves)
        lower = Case(
            [None if t is None else t.to(low) for t in case.tensors],
            [None if m is None else m.to(low) for m in case.masks],
            case.sizes, case.reset, **case.options,
        )  # fmt: skip
        for a, b in zip(out, lower.fused(), strict=True):
            assert a.dtype == low
            assert torch.equal(a, b)
        sum(t.float().sum() for t in out).backward()
        assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    case = draw(13_000, (4, 3, 5, 2))
    with torch.autocast("cpu", low):
        out = case.fused()
    assert all(torch.equal(a, b) for a, b in zip(out, case.fused(), strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_meta(packed):
    """The sizes and dtypes that the kernels give, of all three operators."""

    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    for seed in range(4):
        dtype = torch.bfloat16 if seed % 2 else torch.float64
        case = draw(13_500 + seed, (4, 3, 5, 2), dtype, packed=packed, reset=False)
        tensors = [*case.tensors, *case.masks]
        rest = (case.sizes, None, *case.options.values())
        mine = OPS.lstm_recurrence_forward(*tensors, *rest)
        wanted = [t is not None for t in case.tensors]
        calls = {
            "lstm_recurrence": (*tensors, *rest),
            "lstm_recurrence_forward": (*tensors, *rest),
            "lstm_recurrence_backward": (*mine[:3], *tensors, *rest, *mine[3:], wanted),
        }
        for name, arguments in calls.items():
            found = getattr(OPS, name)(*(a if a is case.sizes else meta(a) for a in arguments))
            expected = getattr(OPS, name)(*arguments)
            for a, b in zip(found, expected, strict=True):
                if b is None:
                    assert a is None
                    continue
                assert a.is_meta
                assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_output_may_be_changed_in_place():
    """Backward keeps none of what a step gives."""
    case = draw(14_000, (4, 3, 5, 2), packed=False)
    leaves = case.leaves()
    output, _, _ = case.fused(*leaves)
    output.mul_(2)
    expected = torch.autograd.grad(case.by_reference(*leaves)[0].mul(2).sum(), leaves,
                                   allow_unused=True)  # fmt: skip
    for a, b in zip(torch.autograd.grad(output.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
