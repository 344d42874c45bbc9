# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One LSTM, computed three ways, and then looked into
#
# The lecture that this project grew from computes one small LSTM with `nn.LSTMCell`, by hand, and
# with `nn.LSTM`, trains it on a toy text, and looks at its gates. This notebook walks the same path
# with the fused operations of `lstm_ext` beside each, and shows what the gates really were.
#
# `examples/lecture.py` is the same as a script (`jupytext --to ipynb examples/lecture.py`).

# %%
# %matplotlib inline
import torch
from torch import nn

import lstm_ext
from lstm_ext import plot, reference
from lstm_ext.cli import lecture

torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## The text
#
# `abaB`, over and over. After an `a` comes `b` or `B`, depending on what came two steps before: to
# predict the next character, a model has to remember. Characters enter one-hot.

# %%
x, y = lecture.data()
print(lecture.TEXT[:12], "...", "inputs", tuple(x.shape), "targets", tuple(y.shape))
print(x[:4])

# %% [markdown]
# ## The cell, three ways, and fused
#
#     ifgo = x W_ih^T + h W_hh^T + b_ih + b_hh
#     i, f, o = sigmoid of their quarters;  g = tanh of its quarter
#     c' = f * c + i * g
#     h' = o * tanh(c')
#
# (One formula of the lecture prints the last line as `tanh(o * c')`. Its code and its results use
# `o * tanh(c')`, which is right.)

# %%
torchs = lecture.seeded_model(nn.LSTMCell).cell
ours = lecture.seeded_model(lstm_ext.LSTMCell).cell  # the same seed: the same weights
w_ih, w_hh, b_ih, b_hh = torchs.parameters()


def by_hand(x, h, c):
    """One step, as the lecture writes it."""
    ifgo = x @ w_ih.T + h @ w_hh.T + b_ih + b_hh
    i, f, g, o = ifgo.chunk(4, dim=1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return o * torch.tanh(c), c


zero = torch.zeros(1, 2)
with torch.no_grad():
    ways = {
        "nn.LSTMCell": lambda x, h, c: torchs(x, (h, c)),
        "by hand": by_hand,
        "reference": lambda x, h, c: reference.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh),
        "lstm_ext.LSTMCell": lambda x, h, c: ours(x, (h, c)),
    }
    print("after the first step:")
    for name, step in ways.items():
        h, c = step(x[:1], zero, zero)
        print(f"  {name:18} h = {h[0]}")
        torch.testing.assert_close(h[0], torch.tensor([-0.0541, 0.0892]), atol=5e-5, rtol=0)

    print("after all 399:")
    for name, step in ways.items():
        h, c = zero, zero
        for row in x.unsqueeze(1):
            h, c = step(row, h, c)
        print(f"  {name:18} h = {h[0]}")
        torch.testing.assert_close(h[0], torch.tensor([-0.0406, 0.2505]), atol=5e-5, rtol=0)

# %% [markdown]
# ## The layer
#
# `nn.LSTM` with the cell's weights gives the same numbers in one call; so does `lstm_ext.LSTM`,
# whose whole time loop is one fused operation.

# %%
for kind in (nn.LSTM, lstm_ext.LSTM):
    layer = kind(3, 2)
    layer.load_state_dict({f"{k}_l0": v for k, v in torchs.state_dict().items()})
    with torch.no_grad():
        output, (h, c) = layer(x)
    print(f"{kind.__module__.split('.')[0]:9} h = {h[0]}, c = {c[0]}")
    torch.testing.assert_close(h[0], torch.tensor([-0.0406, 0.2505]), atol=5e-5, rtol=0)

# %% [markdown]
# ## Training
#
# A thousand passes over the text with Adam, as in the lecture.

# %%
model = lecture.seeded_layer_model(lstm_ext.LSTM)
losses = lecture.train(model, range(1000))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.2e}")
print("after", "abaBabaB", "it expects", lecture.next_characters(model, "abaBabaB"))

# %% [markdown]
# ## Inside: the lecture's loop
#
# The lecture computes the gates in a loop of its own. It makes room for `h` and `cell`, all zero,
# and then computes row `t` from `h[t]` and `cell[t]`, which are still zero, not from row `t - 1`:

# %%
w_ih, w_hh, b_ih, b_hh = (p.detach() for p in model.lstm.parameters())
T = len(x)
gates_i, gates_f, gates_o = torch.zeros(T, 2), torch.zeros(T, 2), torch.zeros(T, 2)
g, h, cell = torch.zeros(T, 2), torch.zeros(T, 2), torch.zeros(T, 2)
for t in range(T):
    i_t, f_t, g_t, o_t = (x[[t]] @ w_ih.T + h[[t]] @ w_hh.T + b_ih + b_hh).chunk(4, dim=1)
    gates_i[t], gates_f[t], gates_o[t] = (gate.sigmoid() for gate in (i_t, f_t, o_t))
    g[t] = g_t.tanh()
    cell[t] = gates_f[t] * cell[t] + gates_i[t] * g[t]
    h[t] = gates_o[t] * cell[t].tanh()
print(f"row -8: g {g[-8]}, c {cell[-8]}, h {h[-8]}")

# %% [markdown]
# So every step is shown as if it were the first. A trace whose state is reset at every step gives
# the same rows; without the resets, the trace has what the layer really computed.

# %%
every_step = torch.ones(T, dtype=torch.bool)
at_zero = lstm_ext.trace_gates(model.lstm, x, reset=every_step)
true = lstm_ext.trace_gates(model.lstm, x)

torch.testing.assert_close(at_zero.h[0, :, 0], h, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(at_zero.f[0, :, 0], gates_f, rtol=1e-5, atol=1e-6)
output, _ = model.lstm(x)
torch.testing.assert_close(true.h[0, :, 0], output.detach(), rtol=1e-5, atol=1e-6)
for t in (-8, -7):
    print(f"h[{t}]: from zero {at_zero.h[0, t, 0]}, true {true.h[0, t, 0]}")

# %% [markdown]
# Side by side, over the last 8 steps. First with the state at zero, as the lecture draws it:

# %%
with torch.no_grad():
    yhat_at_zero = model.linear(at_zero.h[0, :, 0]).softmax(1)
    yhat = model.linear(output).softmax(1)
tokens = lecture.TEXT[:-1]
options = {"last": 8, "tokens": tokens, "classes": lecture.VOCABULARY}
plot.gates(at_zero, yhat=yhat_at_zero, title="every step from zero", **options)

# %% [markdown]
# Without its memory the model cannot tell the two `a`: both rows are the same, and so are its
# predictions. With the state carried, it can:

# %%
plot.gates(true, yhat=yhat, title="the states as they were", **options)

# %%
a = [t for t in range(T - 8, T) if tokens[t] == "a"]
right = (yhat.argmax(1) == y.argmax(1)).double().mean().item()
right_at_zero = (yhat_at_zero.argmax(1) == y.argmax(1)).double().mean().item()
print(f"right: {right:.1%} with its memory, {right_at_zero:.1%} without")
assert right == 1
assert right_at_zero < 0.8
assert torch.equal(at_zero.h[0, a[0]], at_zero.h[0, a[1]])
assert not torch.allclose(true.h[0, a[0]], true.h[0, a[1]], atol=0.1)

# %% [markdown]
# ## What the gates did
#
# The lecture concludes: gates lie in (0, 1) and scale `g`, `c` and `tanh(c)`; `g` sits mostly near
# -1 or 1, `h` takes more values between. Counted on the true trace:

# %%
for name, share in true.saturation().items():
    print(f"{name:10} {share:6.1%}")
plot.histogram(true)

# %% [markdown]
# How long a unit remembers, the forget gate tells: after so many steps half of `c` is forgotten.

# %%
print("half-lives of the two units:", true.half_life()[0])

# %% [markdown]
# Whether values of `h` away from -1 and 1 are what makes an LSTM remember, is another question:
# `examples/why_lstm.py` measures it, and docs/why_lstm.md has the answer.
