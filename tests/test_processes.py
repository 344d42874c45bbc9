"""Other processes: fork, spawn and DataLoader workers, while the parent has used its threads."""

import functools

import pytest
import torch
import torch.multiprocessing
from limits import HUNG, slow
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lstm_ext

# What a fork copies is the parent with all that it has done: here a process of the test's own.
FORK = functools.partial(pytest.param, "fork", marks=pytest.mark.alone)
SIZES = (6, 40, 64, 96)  # L, N, I, H: enough work for several threads


def layer():
    torch.manual_seed(0)
    return lstm_ext.LSTM(SIZES[2], SIZES[3], num_layers=2)


def train_step(module, x):
    """A forward and a backward; the norms of output and gradients."""
    output, _ = module(x)
    grads = torch.autograd.grad(output.square().sum(), list(module.parameters()))
    return torch.stack([output.norm(), *(g.norm() for g in grads)]).detach()


def child(threads, module, x):
    torch.set_num_threads(threads)
    return train_step(module, x)


@pytest.fixture
def used_threads():
    """The parent's threads are there, and have been at work, when the child comes to be."""
    module, x = layer(), torch.randn(*SIZES[:3])
    return module, x, train_step(module, x)


# What torch itself asks for after a fork is one thread: GNU OpenMP's are not there any more.
@pytest.mark.parametrize(
    ("method", "threads"),
    [FORK(1, marks=[pytest.mark.alone, pytest.mark.slow]), *slow(("spawn", 1)), ("spawn", 2)],
)
def test_children(method, threads, used_threads):
    module, x, expected = used_threads
    if method == "fork" and torch.cuda.is_initialized():
        pytest.skip("torch's autograd does not go on in a fork once it has threads for a GPU")
    context = torch.multiprocessing.get_context(method)
    with context.Pool(2) as pool:  # ended by force, a hung one too
        results = [pool.apply_async(child, (threads, module, x)) for _ in range(4)]
        for result in results:
            torch.testing.assert_close(result.get(timeout=HUNG), expected)


def test_child_shares_the_weights(used_threads):
    """A model in shared memory, trained by a child, is trained in the parent: Hogwild."""
    module, x, _ = used_threads
    module.share_memory()
    before = [p.detach().clone() for p in module.parameters()]
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=hogwild, args=(module, x))
    process.start()
    process.join(HUNG)
    assert process.exitcode == 0
    for p, old in zip(module.parameters(), before, strict=True):
        assert not torch.equal(p, old)
    assert module(x)[0].square().sum() < 0.9 * _output(module, before, x).square().sum()


def _output(module, parameters, x):
    names = [name for name, _ in module.named_parameters()]
    return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))[0]


def hogwild(module, x):
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        module(x)[0].square().sum().backward()
        optimizer.step()


class Encoded(Dataset):
    """Examples that an LSTM makes, in the worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 8

    def __getitem__(self, k):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(*SIZES[:3], generator=generator)
        with torch.no_grad():
            return self.module(x)[0]


@pytest.mark.parametrize(
    ("method", "frozen"),
    [
        FORK(False),
        *slow(("spawn", True), ("spawn", False)),
        FORK(True, marks=[pytest.mark.alone, pytest.mark.slow]),
    ],
)
def test_data_loader_workers(method, frozen, used_threads):
    module, x, _ = used_threads
    data = Encoded(lstm_ext.freeze(module.eval()) if frozen else module)
    expected = torch.stack([data[k] for k in range(len(data))])
    loader = DataLoader(
        data, batch_size=4, num_workers=2, multiprocessing_context=method, timeout=HUNG
    )
    consumer = nn.Linear(SIZES[3], 1)
    found = []
    for batch in loader:
        consumer(batch).sum().backward()
        if not frozen:
            train_step(module, x)  # the parent trains while the workers work
        found.append(batch)
    torch.testing.assert_close(torch.cat(found), expected)
