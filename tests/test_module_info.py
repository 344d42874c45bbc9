"""torch's own samples of its modules (ModuleInfo), given to torch's classes and to ours."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lstm_ext

OURS = {nn.LSTM: lstm_ext.LSTM, nn.LSTMCell: lstm_ext.LSTMCell}


@pytest.fixture(scope="module")
def infos():
    """By class; torch's package takes seconds to import: not for every process that collects."""
    pytest.importorskip("expecttest")  # which it imports
    common_modules = pytest.importorskip("torch.testing._internal.common_modules")
    return {info.module_cls: info for info in common_modules.module_db}


def samples(info, dtype, training):
    torch.manual_seed(0)
    return info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)


def leaves(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def make(kind, sample, dtype, training):
    torch.manual_seed(1)
    arguments = sample.constructor_input
    return kind(*arguments.args, **arguments.kwargs, dtype=dtype).train(training)


def results(module, sample):
    """Outputs, and the gradients of parameters and inputs."""
    call = copy.deepcopy(sample.forward_input)
    inputs = [t for t in leaves((call.args, call.kwargs)) if t.requires_grad]
    outputs = leaves(module(*call.args, **call.kwargs))
    loss = sum(t.square().sum() for t in outputs)
    wanted = [*inputs, *module.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return outputs, [None if g is None else g.detach() for g in found]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: f"nn.{kind.__name__}")
def test_samples(infos, kind, dtype, training):
    count = 0
    for sample in samples(infos[kind], dtype, training):
        theirs = make(kind, sample, dtype, training)
        ours = make(OURS[kind], sample, dtype, training)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        expected = results(theirs, sample)
        for module in (
            ours,
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            lstm_ext.convert(copy.deepcopy(theirs)),
            ours.to(torch.float64).to(dtype),
        ):
            torch.testing.assert_close(results(module, sample), expected)
            count += 1
        ours.to("meta")
    assert count >= 10
