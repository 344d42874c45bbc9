"""Under load, at the edges of numbers and of memory: docs/reliability.md has the promises."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from limits import HUNG, slow
from torch import nn

import lstm_ext

PROC = Path("/proc/self")
on_linux = pytest.mark.skipif(not PROC.exists(), reason="reads /proc")
KINDS = {"cell": (nn.LSTMCell, lstm_ext.LSTMCell), "layer": (nn.LSTM, lstm_ext.LSTM)}


def pair(kind, I, H, dtype=torch.float32):
    theirs, ours = (make(I, H, dtype=dtype) for make in KINDS[kind])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run_script(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, timeout=HUNG,
    )  # fmt: skip


# ---- numbers ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["input", "h", "c", "weight_ih", "weight_hh", "bias_ih"])
def test_nan_and_infinity_travel_as_in_torch(kind, value, place):
    theirs, ours = pair(kind, 6, 5)
    shape = (4, 3) if kind == "layer" else (3,)
    states = (1, 3, 5) if kind == "layer" else (3, 5)
    tensors = {"input": torch.randn(*shape, 6), "h": torch.randn(states), "c": torch.randn(states)}
    if place in tensors:
        tensors[place].view(-1)[7] = value
    found = []
    for module in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        parameters = list(module.parameters())
        if place not in tensors:
            name = place if kind == "cell" else f"{place}_l0"
            with torch.no_grad():
                getattr(module, name).view(-1)[3] = value
        out = module(leaves[0], tuple(leaves[1:]))
        outputs = [*out] if kind == "cell" else [out[0], *out[1]]
        grads = torch.autograd.grad([t.sum() for t in outputs], [*leaves, *parameters])
        found.append([*outputs, *grads])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        torch.testing.assert_close(b, a, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saturated_gates_have_no_gradient(dtype):
    """Exactly none: sigmoid and tanh are 1 or 0 there, to the last bit."""
    cell = lstm_ext.LSTMCell(3, 4, dtype=dtype)
    x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    h, c = torch.randn(2, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.where(torch.rand(16, 1) < 0.5, -1000, 1000).expand(16, 3))
    h1, c1 = cell(x, (h, c))
    grads = torch.autograd.grad(h1.sum() + c1.sum(), [x, cell.weight_ih, cell.bias_hh])
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_bounded_over_ten_thousand_steps(kind):
    L = 10_000
    theirs, ours = pair(kind, 3, 16)
    exact = KINDS[kind][0](3, 16, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(L, 1, 3)
    with torch.no_grad():
        errors = []
        wanted = list(over(exact, x.double()))
        for module in (theirs, ours):
            differences = [
                (a.double() - b).abs().max() for a, b in zip(over(module, x), wanted, strict=True)
            ]
            errors.append(torch.stack(differences).view(10, -1).amax(1))
    assert errors[1].max() < 2e-6  # in every tenth of the way, the last too
    assert errors[1].max() < 3 * errors[0].max()


def over(module, x):
    """The h of every step."""
    if isinstance(module, nn.LSTMCell):
        state = None
        for step in x:
            state = module(step, state)
            yield state[0]
    else:
        yield from module(x)[0]


# ---- threads ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_one_module_from_eight_threads(kind, grad):
    """The same bits from each; gradients added up without a loss."""
    _, module = pair(kind, 20, 30)
    x = torch.randn(12, 4, 20) if kind == "layer" else torch.randn(4, 20)

    def call(_=None):
        with torch.set_grad_enabled(grad):
            h = module(x)[0]
            if grad:
                h.sum().backward()
            return h.detach()

    expected = call()
    once = [p.grad.clone() for p in module.parameters()] if grad else []
    repeats = 25
    with ThreadPoolExecutor(8) as pool:
        for h in pool.map(call, range(8 * repeats)):
            assert torch.equal(h, expected)
    for p, g in zip(module.parameters(), once, strict=False):
        torch.testing.assert_close(p.grad, g * (8 * repeats + 1), rtol=1e-4, atol=1e-4)


def test_number_of_threads_changed_between_and_beside_calls():
    _, module = pair("layer", 40, 64)
    x = torch.randn(30, 20, 40)
    before = torch.get_num_threads()
    expected = module(x)[0]
    stop = threading.Event()

    def change():
        n = 1
        while not stop.is_set():
            torch.set_num_threads(n := n % 4 + 1)

    changer = threading.Thread(target=change)
    try:
        changer.start()
        for n in (1, 2, 3, 1, 4, 2) * 5:
            torch.set_num_threads(n)
            output = module(x)[0]
            output.sum().backward()
            assert torch.equal(output, expected)
    finally:
        stop.set()
        changer.join()
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_leaves_the_process_usable():
    """Ctrl-C during a long call: it is seen when the call is done, and nothing is broken."""
    result = run_script(
        """
        import os, signal, threading, torch, lstm_ext
        layer = lstm_ext.LSTM(256, 256)
        x = torch.randn(20, 8, 256)
        before = layer(x)[0]
        long = torch.randn(4000, 8, 256)
        # What starts in the background may inherit that it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            while True:
                layer(long)[0].sum().backward()
        except KeyboardInterrupt:
            print("interrupted")
        assert torch.equal(layer(x)[0], before)
        layer(x)[0].sum().backward()
        print("usable")
        """
    )
    assert result.stdout.split() == ["interrupted", "usable"], result.stderr


# ---- memory ----


def resident():
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors_and_threads():
    return len(os.listdir(PROC / "fd")), len(os.listdir(PROC / "task"))


@on_linux
@pytest.mark.alone
@pytest.mark.parametrize("count", [4_000, *slow(100_000)])
def test_memory_is_flat(count):
    """Forward and backward, cell and layer, with and without existing .grad."""
    cell, layer = lstm_ext.LSTMCell(8, 16), lstm_ext.LSTM(8, 16)
    x, xs = torch.randn(4, 8), torch.randn(3, 4, 8)

    def run_steps(count):
        for k in range(count):
            if k % 100 == 0:
                cell.zero_grad(set_to_none=True)
            h, c = cell(x)
            (h.sum() + c.sum()).backward()
            if k % 10 == 0:
                layer(xs)[0].sum().backward()

    run_steps(3_000)
    gc.collect()
    before, others = resident(), descriptors_and_threads()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    run_steps(count)
    gc.collect()
    assert resident() - before < 4 << 20  # forty bytes a step of 100,000 would be more
    assert descriptors_and_threads() == others
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) == tensors


@on_linux
@pytest.mark.parametrize("phase", ["training", *slow("inference", "backward", "backward of cells")])
def test_out_of_memory_is_torchs_error_and_nothing_is_half_written(phase):
    result = run_script(
        f"""
        import resource, torch, lstm_ext
        torch.set_num_threads(1)
        phase = {phase!r}
        cells = phase == "backward of cells"
        module = lstm_ext.LSTMCell(64, 512) if cells else lstm_ext.LSTM(64, 512)
        small = torch.randn(1, 64) if cells else torch.randn(2, 1, 64)
        module(small)[0].sum().backward()
        expected = module(small)[0].detach()
        grads = [p.grad.clone() for p in module.parameters()]
        x = torch.randn(40000, 64) if cells else torch.randn(20000, 4, 64)
        backward = phase.startswith("backward")
        if backward:
            loss = module(x)[0].sum()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)
        with torch.set_grad_enabled(phase != "inference"):
            try:
                loss.backward() if backward else module(x)
            except RuntimeError as error:
                assert "can't allocate memory" in str(error), error
                print("refused")
        assert torch.equal(module(small)[0], expected)
        assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads))
        print("whole")
        """
    )
    assert result.stdout.split() == ["refused", "whole"], result.stderr


# ---- checkpoints ----


@pytest.mark.parametrize("kind", KINDS)
def test_strict_loading_says_what_torch_says(kind, tmp_path):
    theirs, ours = pair(kind, 3, 4)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    state = torch.load(tmp_path / "ours.pt", weights_only=True)  # the safe way, and it is enough
    theirs.load_state_dict(state)
    first = next(iter(state))
    for broken in (
        {k: v for k, v in state.items() if k != first},
        {**state, "another": torch.zeros(1)},
        {**state, first: torch.zeros(3, 3)},
    ):
        with pytest.raises(RuntimeError) as torchs:
            theirs.load_state_dict(broken)
        with pytest.raises(RuntimeError) as error:
            ours.load_state_dict(broken)
        assert str(error.value) == str(torchs.value)


# ---- the world outside ----


def test_no_network_no_process_and_no_file_written():
    """Import, use, and what the process does meanwhile, by Python's own audit of itself."""
    result = run_script(
        """
        import sys
        import torch
        seen = []
        watched = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "urllib.")
        def audit(event, arguments):
            if event.startswith(watched):
                seen.append((event, arguments))
            if event == "open" and set("wax+") & set(str(arguments[1] or "")):
                seen.append((event, arguments[:2]))
        sys.addaudithook(audit)
        sys.dont_write_bytecode = True
        import lstm_ext
        cell, layer = lstm_ext.LSTMCell(3, 4), lstm_ext.LSTM(3, 4)
        layer(torch.randn(5, 2, 3))[0].sum().backward()
        cell(torch.randn(2, 3))[0].sum().backward()
        lstm_ext.trace_gates(layer, torch.randn(5, 2, 3)).half_life()
        lstm_ext.freeze(layer.eval())(torch.randn(5, 2, 3))
        assert not seen, seen
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupts_are_handled_by_python_alone():
    """No signal handler of our own."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    lstm_ext.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
