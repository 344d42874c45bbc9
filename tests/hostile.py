"""Calls that no one should make, at the operators and at _C: run by tests/test_hostile.py.

    python tests/hostile.py COUNT [SEED]

Draws calls with right arguments, spoils one or two of each, and makes them. A Python exception is
right, and so is the result that dense copies of the same values give. Anything else is printed and
fails; a crash is seen by whoever started the process. Prints the counts as JSON.
"""

import collections
import faulthandler
import json
import random
import resource
import sys
import warnings

import torch
from measure import DTYPES

import lstm_ext
import lstm_ext._C as C

OPS = torch.ops.lstm_ext


def floats(draw, *shape, dtype=torch.float32):
    return (torch.randn(shape, generator=draw.tensors) * 0.5).to(dtype)


class Draw(random.Random):
    """Random choices, and tensors from the same seed."""

    def __init__(self, seed):
        super().__init__(seed)
        self.tensors = torch.Generator().manual_seed(seed)


def cell_arguments(draw, N, I, H, dtype):
    weights = [floats(draw, 4 * H, I, dtype=dtype), floats(draw, 4 * H, H, dtype=dtype)]
    weights += [floats(draw, 4 * H, dtype=dtype) if draw.random() < 0.8 else None for _ in "ab"]
    return [floats(draw, N, I, dtype=dtype), *(floats(draw, N, H, dtype=dtype) for _ in "hc"),
            *weights]  # fmt: skip


def layer_arguments(draw, L, N, I, H, dtype):
    x, h, c, *weights = cell_arguments(draw, N, I, H, dtype)
    sizes = None
    x = floats(draw, L, N, I, dtype=dtype)
    if draw.random() < 0.5:
        sizes = torch.tensor(sorted((draw.randint(1, N) for _ in range(L)), reverse=True))
        sizes[0] = N
        x = floats(draw, int(sizes.sum()), I, dtype=dtype)
    reset = None
    if draw.random() < 0.4:
        reset = torch.rand(L, N, generator=draw.tensors) < 0.3
    return [x, h, c, *weights], [sizes, reset, draw.random() < 0.5]


def recurrence_arguments(draw, L, N, H, dtype):
    """Of a recurrence: with or without each of its parts."""
    P = draw.choice([H, 1, 2, 5])
    projects = P != H or draw.random() < 0.5
    (_, h, c, _, w_hh, *_), (sizes, reset, reverse) = layer_arguments(draw, L, N, H, H, dtype)
    lead = (L, N) if sizes is None else (int(sizes.sum()),)
    h, w_hh = floats(draw, N, P, dtype=dtype), floats(draw, 4 * H, P, dtype=dtype)
    gates_x = floats(draw, *lead, 4 * H, dtype=dtype)
    vectors = [floats(draw, k, dtype=dtype) if draw.random() < 0.7 else None
               for k in (4 * H, 4 * H, H, H)]  # fmt: skip
    if vectors[2] is None:
        vectors[3] = None
    masks = []
    for K in (P, H, P):
        # Of all steps only where no mask of sequences has as many dimensions: SIZES tells by them.
        kinds = [(K,), (N, K)] if sizes is not None else [(K,), (N, K), (L, N, K)]
        shape = draw.choice([None, *kinds])
        masks.append(None if shape is None else floats(draw, *shape, dtype=dtype))
    w_hr = floats(draw, P, H, dtype=dtype) if projects else None
    switches = [reverse, draw.random() < 0.5, draw.random() < 0.5]
    clips = [0.01, draw.choice([0.0, 0.3]), draw.choice([0.0, 0.3]) * projects]
    return [gates_x, h, c, w_hh, *vectors, w_hr, *masks, sizes, reset, *switches, *clips]


def grads(draw, *tensors):
    return [floats(draw, *t.shape, dtype=t.dtype) if draw.random() < 0.8 else None for t in tensors]


def mask(draw, count):
    return [draw.random() < 0.7 for _ in range(count)]


def module_dict(weights, input_size, hidden_size, batch_first):
    """As much of an LSTM's __dict__ as the direct call reads."""
    bias = weights[2] is not None or weights[3] is not None
    names = ["weight_ih_l0", "weight_hh_l0", *(["bias_ih_l0", "bias_hh_l0"] if bias else [])]
    given = dict(zip(names, weights, strict=bias))
    return {
        "input_size": input_size, "hidden_size": hidden_size, "num_layers": 1, "proj_size": 0,
        "bias": bias, "batch_first": batch_first, "bidirectional": False, "dropout": 0.0,
        "training": False, "_parameters": given, "_flat_weights": list(given.values()),
        "_flat_weights_names": names,
    }  # fmt: skip


def frozen_dict(packed, input_size, hidden_size, batch_first=False):
    names = ["packed_0", "packed_1", "packed_2"]
    options = module_dict([None] * 4, input_size, hidden_size, batch_first)
    names += ["packed_3", "packed_4"][: len(packed) - 3]
    buffers = dict(zip(names, packed, strict=True))
    return {**options, "_packed_names": names, "_buffers": buffers}


def lstm_module(x, h, c, weights, I, H, batch_first, sizes):
    return C.lstm_module(module_dict(weights, I, H, batch_first), x, (h, c), sizes)


def frozen_lstm_module(x, h, c, packed, I, H, batch_first, sizes):
    return C.frozen_lstm_module(frozen_dict(packed, I, H, batch_first), x, (h, c), sizes)


def lstm_cell_module(x, h, c, w_ih, w_hh, b_ih, b_hh):
    parameters = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    return C.lstm_cell_module({"_parameters": parameters}, x, (h, c))


def frozen_lstm_cell_module(x, h, c, packed, b_ih, b_hh, w_ih, w_hh, I, H):
    buffers = [packed, b_ih, b_hh, w_ih, w_hh]
    return C.frozen_lstm_cell_module(frozen_dict(buffers, I, H), x, (h, c))


def right_call(draw):
    """Return the name of a function, the function, and arguments that it takes."""
    L, N, I, H = (draw.choice([1, 2, 3, 5, 9]) for _ in range(4))
    dtype = draw.choice(DTYPES)
    cell = cell_arguments(draw, N, I, H, dtype)
    layer, options = layer_arguments(draw, L, N, I, H, dtype)
    kind = draw.choice(
        ["lstm_cell", "lstm_cell_forward", "lstm_cell_backward", "lstm_cell_backward_accumulate",
         "lstm_layer", "lstm_layer_forward", "lstm_layer_backward", "lstm", "lstm_layer_pack",
         "lstm_layer_states", "lstm_layer_states_forward", "lstm_layer_states_backward",
         "lstm_layer_packed", "lstm_packed", "_C.lstm_cell", "lstm_module", "lstm_cell_module",
         "lstm_recurrence", "lstm_recurrence_forward", "lstm_recurrence_backward",
         "frozen_lstm_module", "frozen_lstm_cell_module"]
    )  # fmt: skip
    if kind == "_C.lstm_cell":
        return kind, C.lstm_cell, cell
    if kind.endswith("_module"):
        function = globals()[kind]
        if kind == "lstm_cell_module":
            return kind, function, cell
        if kind == "frozen_lstm_cell_module":
            packed = OPS.lstm_layer_pack(cell[3], cell[4])
            return kind, function, [*cell[:3], packed, *cell[5:], *cell[3:5], I, H]
        packed = [OPS.lstm_layer_pack(layer[3], layer[4]), *layer[5:]]
        weights = tuple(layer[3:]) if kind == "lstm_module" else tuple(packed)
        states = [t.unsqueeze(0) for t in layer[1:3]]
        return kind, function, [layer[0], *states, weights, I, H, False, options[0]]
    function = getattr(OPS, kind)
    if kind in ("lstm_cell", "lstm_cell_forward"):
        return kind, function, cell
    if kind.startswith("lstm_cell_backward"):
        h, c, gates = OPS.lstm_cell_forward(*cell)
        arguments = [*grads(draw, h, c), *cell, None, 0, gates]
        if kind == "lstm_cell_backward":
            return kind, function, [*arguments, [*mask(draw, 7), False]]
        sums = [None if w is None else torch.zeros_like(w) for w in cell[3:]]
        return kind, function, [*arguments, *sums, None, mask(draw, 3)]
    if kind in ("lstm_layer", "lstm_layer_forward"):
        return kind, function, [*layer, *options]
    if kind == "lstm_layer_backward":
        output, h, c, gates, before = OPS.lstm_layer_forward(*layer, *options)
        return kind, function, [
            *grads(draw, output, h, c), *layer, *options, None, 0, output, gates, before,
            [*mask(draw, 7), False],
        ]  # fmt: skip
    if kind.startswith("lstm_layer_states"):
        to, (h, c) = draw.choice([None, (), (L,)]), layer[1:3]
        states = [None, None] if to is None or options[1] is None else [
            torch.randn_like(s.expand(*to, *s.shape)).requires_grad_(s.requires_grad)
            for s in (h, c)
        ]  # fmt: skip
        arguments = [*layer, *options, None, 0, *states]
        if kind != "lstm_layer_states_backward":
            return kind, function, arguments
        output, h, c, cells, *kept = OPS.lstm_layer_states_forward(*arguments)
        return kind, function, [
            *grads(draw, output, h, c, cells), *arguments, output, *kept,
            [*mask(draw, 7), False, *([False] * 2 if states[0] is None else mask(draw, 2))],
        ]  # fmt: skip
    if kind.startswith("lstm_recurrence"):
        arguments = recurrence_arguments(draw, L, N, H, dtype)
        if kind != "lstm_recurrence_backward":
            return kind, function, arguments
        output, h, c, *kept = OPS.lstm_recurrence_forward(*arguments)
        return kind, function, [*grads(draw, output, h, c), *arguments, *kept, mask(draw, 9)]
    if kind == "lstm_layer_pack":
        return kind, function, layer[3:5]
    if kind == "lstm_layer_packed":
        return kind, function, [
            *layer[:3], OPS.lstm_layer_pack(layer[3], layer[4]), *layer[5:], *options
        ]  # fmt: skip
    states = [t.unsqueeze(0) for t in layer[1:3]]
    if kind == "lstm_packed":
        packed = [OPS.lstm_layer_pack(layer[3], layer[4]), *layer[5:]]
        return kind, function, [layer[0], *states, packed, False, *options[:2]]
    return kind, function, [layer[0], *states, layer[3:], False, 0.0, *options[:2]]


def resized(t, _):
    """Its memory gone. (Half of it gone, torch itself reads on: tests/test_hostile.py.)"""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def read_only(t, _):
    if t.dtype == torch.bfloat16:
        return t
    array = t.numpy()
    array.flags.writeable = False
    return torch.from_numpy(array)


def huge(t, draw):
    """More numbers than any memory holds, all of them one."""
    return t.flatten()[:1].expand(*[draw.choice([2**20, 2**31, 2**40]) for _ in t.shape])


def strided(t, _):
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def offset(t, _):
    flat = torch.zeros(t.numel() + 3, dtype=t.dtype)
    flat[3:] = t.flatten()
    return flat[3:].view(t.shape)


# What leaves the values as they are: a call may go well, with the same result.
HARMLESS = {
    "strided": strided,
    "offset": offset,
    "transposed memory": lambda t, _: t.t().contiguous().t() if t.dim() == 2 else t,
    "expanded": lambda t, _: t[:1].expand_as(t),
    "needs a gradient": lambda t, _: t.requires_grad_() if t.is_floating_point() else t,
    "read-only": read_only,
    "a parameter": lambda t, _: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "not a number": lambda t, draw: t.masked_fill(
        torch.rand(t.shape, generator=draw.tensors) < 0.2, float("nan")
    ) if t.is_floating_point() else t,
    "infinite": lambda t, _: t.masked_fill(t > 0.5, float("inf")) if t.is_floating_point() else t,
}  # fmt: skip
HOSTILE = {
    "one dimension more": lambda t, _: t.unsqueeze(0),
    "one dimension less": lambda t, _: t[0] if t.dim() else t,
    "no dimension": lambda t, _: t.flatten()[0],
    "one row more": lambda t, _: torch.cat([t, t[:1]]) if t.dim() else t,
    "one row less": lambda t, _: t[1:] if t.dim() else t,
    "one column more": lambda t, _: torch.cat([t, t[..., :1]], -1) if t.dim() else t,
    "no rows": lambda t, _: t[:0] if t.dim() else t,
    "no columns": lambda t, _: t[..., :0] if t.dim() else t,
    "another dtype": lambda t, draw: t.to(draw.choice(DTYPES)),
    "integers": lambda t, draw: t.to(draw.choice([torch.int8, torch.int32, torch.int64])),
    "complex": lambda t, _: t.to(torch.complex64),
    "conjugate": lambda t, _: t.to(torch.complex64).conj(),
    "negative view": lambda t, _: t.to(torch.complex64).conj().imag,
    "bool": lambda t, _: t.bool(),
    "meta": lambda t, _: t.to("meta"),
    "sparse": lambda t, _: t.to_sparse(),
    "sparse rows": lambda t, _: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "quantized": lambda t, _: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "oneDNN's": lambda t, _: t.float().to_mkldnn(),
    "nested": lambda t, _: torch.nested.nested_tensor([t, t]),
    "none": lambda *_: None,
    "a number": lambda *_: 3,
    "a string": lambda *_: "tensor",
    "a list": lambda t, _: t.tolist(),
    "an array": lambda t, _: t.float().numpy(),
    "an object": lambda *_: object(),
    "a subclass": lambda t, _: t.as_subclass(type("Mine", (torch.Tensor,), {})),
}
# With anything else beside them, torch itself may go wrong: it prints the tensors of a call that it
# refuses.
ALONE = {"huge": huge, "resized": resized}
OTHER = [None, -1, 2**40, 2**70, 1.5, "x", True, [], [True], [None] * 7, object(), torch.ones(2)]


def spoil(draw, arguments, inside=False):
    """Spoil some arguments; return the names of what was done."""
    done = []
    count = min(draw.choice([1, 1, 1, 2, 3]), len(arguments))
    # From the last on, so that those before stay in their places.
    for k in sorted(draw.sample(range(len(arguments)), count), reverse=True):
        value = arguments[k]
        if isinstance(value, (tuple, list)) and value and draw.random() < 0.8:
            inner = list(value)
            done += spoil(draw, inner, inside=True)
            arguments[k] = type(value)(inner)
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            kinds = {**HARMLESS, **HOSTILE, **(ALONE if count == 1 and not inside else {})}
            name = draw.choice(list(kinds))
            done.append(name)
            try:
                arguments[k] = kinds[name](value, draw)
            except Exception:  # not everything can be done to everything
                continue
        elif draw.random() < 0.1:
            done.append("an argument more or less")
            if draw.random() < 0.5 and len(arguments) > 1:
                arguments.pop(k)
            else:
                arguments.insert(k, draw.choice(OTHER))
        elif draw.random() < 0.3 and k and arguments[k - 1] is not None:
            done.append("its neighbour in its place")
            arguments[k] = arguments[k - 1]
        else:
            done.append("something else")
            arguments[k] = draw.choice(OTHER)
    return done


def dense(value):
    """Copy values into memory of their own."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            return value
        if value.numel() > 1e6 or (value.numel() and not value.untyped_storage().nbytes()):
            return value
        copy = value.detach().resolve_conj().resolve_neg()
        copy = copy.clone(memory_format=torch.contiguous_format)
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(dense(v) for v in value)
    return value


CELL = ["N I", "N H", "N H", "4H I", "4H H", "4H", "4H"]
LAYER = ["L N I", *CELL[1:], "L", "L N"]
WEIGHTS = CELL[3:]
# reset_hx and reset_cx, whose time is no part of S.
STATES = [*LAYER, None, None, None, "N H|L  N H", "N H|L  N H"]
RECURRENCE = [
    *["L N 4H", "N P", "N H", "4H P", "4H", "4H", "H", "H", "P H"],
    *["P|N P|L N P", "H|N H|L N H", "P|N P|L N P", "L", "L N", *[None] * 6],
]
SIZES = {
    "lstm_recurrence": RECURRENCE,
    "lstm_recurrence_forward": RECURRENCE,
    # What is kept may be of no rows: the operator checks it.
    "lstm_recurrence_backward": ["L N P", "N P", "N H", *RECURRENCE, "S 4H", "S H", "S P"],
    "lstm_cell": CELL,
    "lstm_cell_forward": CELL,
    "lstm_cell_backward": ["N H", "N H", *CELL, None, None, "N 4H"],
    "lstm_cell_backward_accumulate": ["N H", "N H", *CELL, None, None, "N 4H", *WEIGHTS],
    "lstm_layer": LAYER,
    "lstm_layer_forward": LAYER,
    "lstm_layer_backward": ["L N H", "N H", "N H", *LAYER, *[None] * 3, "L N H", "S 4H", "S H"],
    "lstm_layer_states": STATES,
    "lstm_layer_states_forward": STATES,
    "lstm_layer_states_backward": [
        *["L N H", "N H", "N H", "L N H"],
        *STATES,
        "L N H",
        "S 4H",
        "S H",
    ],
    "lstm_layer_pack": ["4H I", "4H H"],
    "lstm_layer_packed": [*LAYER[:3], None, *LAYER[5:]],
    "lstm": ["L N I", "1 N H", "1 N H", WEIGHTS, None, None, "L", "L N"],
    "lstm_packed": ["L N I", "1 N H", "1 N H", [None, "4H", "4H"], None, "L", "L N"],
    "_C.lstm_cell": CELL,
    "lstm_cell_module": CELL,
    "frozen_lstm_cell_module": [*CELL[:3], None, *CELL[5:], *CELL[3:5]],
    "lstm_module": ["L N I", "1 N H", "1 N H", WEIGHTS, None, None, None, "L"],
    "frozen_lstm_module": ["L N I", "1 N H", "1 N H", [None, "4H", "4H"], *[None] * 3, "L"],
}


def fits(patterns, arguments, known):
    """Whether the tensors have the sizes of one call: nothing is broadcast or left unread."""
    for pattern, value in zip(patterns, arguments, strict=False):
        if isinstance(pattern, list) and not fits(pattern, value, known):
            return False
        if not isinstance(pattern, str) or not isinstance(value, torch.Tensor):
            continue
        names = next((p.split() for p in pattern.split("|") if len(p.split()) == value.dim()), None)
        if names is None:
            return False
        for name, size in zip(names, value.shape, strict=True):
            each = 4 if name.startswith("4") else 1
            name = name.removeprefix("4")
            if size % each or known.setdefault(name, size // each) != size // each:
                return False
    return True


def call_fits(name, arguments):
    patterns = SIZES[name]
    at = patterns.index("L") if "L" in patterns else None
    packed = at is not None and at < len(arguments) and arguments[at] is not None
    if packed:
        patterns = [p.replace("L N ", "S ") if isinstance(p, str) else p for p in patterns]
    known = {"1": 1}
    if not fits(patterns, arguments, known):
        return False
    return packed or "S" not in known or known["S"] == known["L"] * known["N"]


def torch_lstm_cell(x, h, c, *weights):
    return torch.lstm_cell(x, (h, c), *weights)


def torch_frozen_cell(x, h, c, packed, b_ih, b_hh, w_ih, w_hh, *sizes):
    return torch_lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for r in result for t in tensors(r)]
    return []


def same(a, b):
    if a.layout != torch.strided or a.is_meta or a.is_nested or a.is_quantized:
        return a.layout == b.layout and a.shape == b.shape
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64, torch.complex64) else 2e-2
    return torch.allclose(
        a.detach().to(torch.complex128), b.detach().to(torch.complex128),
        rtol=tolerance, atol=tolerance, equal_nan=True,
    )  # fmt: skip


def one(seed):
    """Make one call; return how it ended and, where that is wrong, what was done."""
    draw = Draw(seed)
    name, function, arguments = right_call(draw)
    done = spoil(draw, arguments)
    accumulates = name.endswith("accumulate")
    before = dense(arguments)
    grad = draw.random() < 0.5
    with torch.set_grad_enabled(grad):
        try:
            result = function(*arguments)
        except Exception as error:
            # The interpreter's own, and PyTorch's internal assertions, tell of a hole in a check.
            # (But torch's own: of negative views for an operator that writes, and of quantizers.)
            # So does running out of memory: no right call is large.
            holes = ("INTERNAL ASSERT", "can't allocate memory", "out of memory")
            bad = isinstance(error, SystemError) or any(hole in str(error) for hole in holes)
            known = ("cloned_mutable_input", "Quantizer.cpp")
            bad = bad and not any(words in str(error) for words in known)
            return name, "wrong error" if bad else "error", f"{done}: {str(error)[:300]}"
    if result is None:  # of _C: left to the operator
        return name, "declined", ""
    if not call_fits(name, arguments):
        if not name.endswith(("lstm_cell", "lstm_cell_module")):
            return name, "wrong sizes", f"{done}: taken"
        # torch's own broadcasts biases.
        frozen = name == "frozen_lstm_cell_module"
        function = torch_frozen_cell if frozen else torch_lstm_cell
    # The numbers of the same values in memory of their own.
    try:
        with torch.set_grad_enabled(grad):
            expected = function(*before)
    except Exception as error:
        return name, "wrong result", f"{done}: dense copies give {str(error)[:300]}"
    found, wanted = tensors(result), tensors(expected)
    if accumulates:
        found, wanted = found + tensors(arguments[10:14]), wanted + tensors(before[10:14])
    right = len(found) == len(wanted) and all(
        same(a, b) for a, b in zip(found, wanted, strict=True)
    )
    return name, "result" if right else "wrong result", str(done)


def main():
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # before the machine ends
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ends = collections.Counter()
    calls = collections.Counter()
    for k in range(seed, seed + count):
        # So that after a crash the last line tells which call it was.
        print(k, end="\r", file=sys.stderr, flush=True)
        name, end, what = one(k)
        ends[end] += 1
        calls[name] += 1
        if end.startswith("wrong"):
            print(f"seed {k}: {name}: {end}: {what}", file=sys.stderr)
    print(json.dumps({"calls": sum(calls.values()), "ends": ends, "functions": calls}))
    assert lstm_ext.LSTM(3, 2)(torch.zeros(4, 1, 3))[0].isfinite().all()  # still of use
    return 1 if any(end.startswith("wrong") for end in ends) else 0


if __name__ == "__main__":
    sys.exit(main())
