"""What torch's own modules can do, as docs/compatibility.md has it, and that ours can."""

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import lstm_ext


def compiles(module, x):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        compiled(x)[0].sum().backward()


def compiled_autograd(module, x):
    torch._dynamo.reset()
    loss = module(x)[0].sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()


def ensembles(module, x):
    stacked = {k: torch.stack([v.detach()] * 2) for k, v in module.named_parameters()}
    vmap(lambda p: functional_call(module, p, (x,))[0])(stacked)


def per_sample_gradients(module, x):
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(p, x):
        return functional_call(module, p, (x,))[0].sum()

    vmap(grad(loss), (None, 0))(parameters, torch.stack([x, x]))


def second_derivatives(module, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


# what: (how, whether nn.LSTMCell can, whether nn.LSTM can)
TABLE = {
    "compile": (compiles, True, False),
    "compiled autograd": (compiled_autograd, True, True),
    "export": (lambda m, x: torch.export.export(m, (x,)), True, True),
    "vmap": (lambda m, x: vmap(lambda x: m(x)[0])(torch.stack([x, x])), False, False),
    "ensembles": (ensembles, False, False),
    "per-sample gradients": (per_sample_gradients, False, True),
    "jacrev": (lambda m, x: jacrev(lambda x: m(x)[0])(x), True, True),
    "jacfwd": (lambda m, x: jacfwd(lambda x: m(x)[0])(x), True, False),
    "hessian": (lambda m, x: hessian(lambda x: m(x)[0].sum())(x), True, False),
    "jvp": (lambda m, x: jvp(lambda x: m(x)[0], (x,), (x,)), True, False),
    "second derivatives": (second_derivatives, True, True),
}


@pytest.mark.parametrize("kind", ["LSTMCell", "LSTM"])
@pytest.mark.parametrize("what", TABLE)
def test_table(what, kind):
    how, *theirs = TABLE[what]
    x = torch.randn(5, 3) if kind == "LSTMCell" else torch.randn(6, 5, 3)
    how(getattr(lstm_ext, kind)(3, 4), x)
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the table is about torch 2.13")
    torchs = getattr(nn, kind)(3, 4)
    if theirs[kind == "LSTM"]:
        how(torchs, x)
    else:
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            how(torchs, x)
