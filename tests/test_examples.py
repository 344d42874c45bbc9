"""The examples run and do what they say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import awd_lstm
import char_model
import pytest
import torch
import torch.distributed.checkpoint as dcp
import why_lstm
import zoneout_decoder
from limits import HUNG
from torch import nn
from torch.func import functional_call

import lstm_ext

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_pieces_go_on_where_the_last_one_ended():
    data = char_model.pieces(torch.arange(1000), N=4, L=10)
    x, y = next(data)
    assert torch.equal(y, x + 1)
    for k in range(1, 50):  # 24 pieces, and then from the beginning
        last = y[-1] if k % 24 else torch.arange(4) * 249
        x, y = next(data)
        assert torch.equal(x[0], last)
    assert torch.equal(y, x + 1)


@pytest.mark.slow
def test_character_model():
    options = "--steps 40 --modules 2 --hidden 48 --layers 2 --batch 8 --length 32 --write 50"
    result = subprocess.run(
        [sys.executable, EXAMPLES / "char_model.py", *options.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=HUNG,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok    both losses are the same" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if "LSTM  " in line]
    assert [line[0] for line in lines[:2]] == ["torch.nn.LSTM", "lstm_ext.LSTM"]
    for line in lines[:2]:
        first, last, rate = float(line[1]), float(line[3]), float(line[4].replace(",", ""))
        assert 4 < first < 5  # log 96 = 4.56: nothing learnt yet
        assert last < 0.85 * first
        assert rate > 0
    assert lines[0][1:4] == lines[1][1:4]
    assert "\nclass " in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--fsdp"])
def test_two_processes(options, tmp_path):
    """DistributedDataParallel and FSDP2 give what one process gives on the joined batch.

    And go on from a checkpoint, which torch's own LSTM reads too, in one process.
    """
    small = "--steps 12 --hidden 32 --batch 4 --length 16 --modules 1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [
            *command,
            EXAMPLES / "train_ddp.py",
            *small.split(),
            "--checkpoint",
            tmp_path,
            *options.split(),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=HUNG,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok    2 processes and one" in result.stdout
    assert result.stdout.count("goes on from the checkpoint as without it") == 2

    found = [char_model.CharModel(kind, 32, 2) for kind in (torch.nn.LSTM, lstm_ext.LSTM)]
    for model in found:
        state = model.state_dict()
        dcp.load({"model": state}, checkpoint_id=tmp_path)
        model.load_state_dict(state)
    x = torch.randint(96, (5, 3))
    torch.testing.assert_close(found[0](x), found[1](x))
    untrained = char_model.seeded_model(lstm_ext.LSTM, 32, 2)
    assert not torch.allclose(untrained(x)[0], found[1](x)[0], atol=0.1)


@pytest.mark.slow
def test_lecture_script():
    """The notebook's twin: its own assertions hold the lecture's numbers."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / "lecture.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "right: 100.0% with its memory, 74.9% without" in result.stdout


def test_recall_needs_the_first_symbol_alone():
    x, y = why_lstm.recall(7, 50, torch.Generator().manual_seed(1))
    assert x.shape == (8, 50, why_lstm.SYMBOLS + 1)
    assert torch.equal(x[0].argmax(1), y)
    assert x[:-1].sum(2).eq(1).all()
    assert x[:-1, :, -1].eq(0).all()
    assert x[-1].tolist() == [[0] * why_lstm.SYMBOLS + [1]] * 50
    assert {len(set(x[t].argmax(1).tolist())) for t in range(7)} == {why_lstm.SYMBOLS}


def test_the_wide_rnn_has_the_lstms_parameters():
    kinds = why_lstm.kinds(5, 32)
    sizes = {
        name: sum(p.numel() for p in kind(5, size).parameters())
        for name, (kind, size) in kinds.items()
    }
    assert sizes["LSTM"] <= sizes["RNN, wide"] < 1.1 * sizes["LSTM"]
    assert kinds["RNN"][1] == kinds["LSTM"][1] == 32


@pytest.mark.slow
def test_why_lstm(tmp_path):
    out = tmp_path / "why"
    result = subprocess.run(
        [sys.executable, EXAMPLES / "why_lstm.py", "--quick", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    runs = json.loads(out.with_suffix(".json").read_text())["runs"]
    assert len(runs) == 4 * 2 * (1 + 2)
    rows = [line for line in result.stdout.splitlines() if line.startswith(("| text", "| recall"))]
    assert len(rows) == 12
    first = sorted(run["accuracy"] for run in runs[:2])
    assert f"{sum(first) / 2:.1%} ({first[0]:.0%} - {first[1]:.0%})" in rows[0]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_saturation_and_its_correlation():
    assert why_lstm.saturated(torch.tensor([0.95, -0.95, 0.5, -0.1])) == 0.5
    runs = [{"saturated": s, "loss": loss} for s, loss in ((0.1, 3.0), (0.5, 2.0), (0.9, 0.1))]
    assert why_lstm.correlation(runs) == pytest.approx(-1)
    assert math.isnan(why_lstm.correlation(runs[:2]))


def fastais(model, words, states, masks):
    """An AWD-LSTM of torch's modules: (N, 1, F) masks on features, one on each weight_hh."""
    x, after = model.embedding(words), []
    for k, (layer, state) in enumerate(zip(model.layers, states, strict=True)):
        plain = nn.LSTM(layer.input_size, layer.hidden_size, batch_first=True, dtype=x.dtype)
        weights = dict(layer.named_parameters())
        if masks:
            x = x * masks[f"input {k}"]
            weights["weight_hh_l0"] = weights["weight_hh_l0"] * masks[f"weight {k}"]
        x, last = functional_call(plain, weights, (x, state))
        after.append(last)
    if masks:
        x = x * masks["output"]
    return x @ model.embedding.weight.T + model.bias, after


@pytest.mark.parametrize("training", [True, False])
def test_awd_lstm_is_fastais(training, monkeypatch):
    torch.manual_seed(0)
    N, L = 3, 5
    model = awd_lstm.AWDLSTM(11, 6, 8).double().train(training)
    words = torch.randint(11, (N, L))
    states = [
        (
            torch.randn(1, N, layer.hidden_size).double(),
            torch.randn(1, N, layer.hidden_size).double(),
        )
        for layer in model.layers
    ]
    masks, asked = {}, []
    if training:
        for k, layer in enumerate(model.layers):
            keep = 0.75 if k == 0 else 0.85
            masks[f"weight {k}"] = layer.weight_hh_l0.new_empty(layer.weight_hh_l0.shape)
            masks[f"weight {k}"].bernoulli_(0.8).div_(0.8)
            masks[f"input {k}"] = torch.empty(N, 1, layer.input_size).double()
            masks[f"input {k}"].bernoulli_(keep).div_(keep)
        masks["output"] = torch.empty(N, 1, 6).double().bernoulli_(0.9).div_(0.9)
    given = iter(masks.values())  # in the order of the calls

    def dropout(x, p, train):
        assert train
        mask = next(given)
        asked.append(p)
        return x * (mask if mask.dim() == 2 or x.shape == mask.shape else mask.transpose(0, 1))

    def keep_mask(size, p, like):
        mask = next(given)
        asked.append(p)
        assert mask.shape == size
        return (mask != 0).to(like)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "dropout", dropout)
        # The direct call would draw in C++.
        patch.setattr(lstm_ext._ops, "fast_lstm_with_steps", lambda *_: None)
        patch.setattr(lstm_ext._recurrence, "keep_mask", keep_mask)
        found, last = model(words, states)
    expected, expected_last = fastais(model, words, states, masks)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, expected_last, rtol=1e-6, atol=1e-6)
    if training:
        assert asked == [0.2, 0.25, 0.2, 0.15, 0.2, 0.15, 0.1]
    gradients = [
        torch.autograd.grad(scores.sin().sum(), list(model.parameters()))
        for scores in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_awd_lstm_learns(capsys):
    awd_lstm.main(["--steps", "30", "--hidden", "48"])
    out = capsys.readouterr().out.split()
    assert float(out[3]) < 0.9 * float(out[1])


@pytest.mark.parametrize("training", [True, False])
def test_zoneout_decoder_is_espnets(training, monkeypatch):
    torch.manual_seed(0)
    ours = zoneout_decoder.Decoder(6, 4, 8, 5, dropout=0.0).double().train(training)
    theirs = zoneout_decoder.with_torchs_cells(ours).double()
    assert theirs.training == training
    memory, frames = torch.randn(3, 7, 6).double(), torch.randn(3, 5, 4).double()
    masks = [torch.rand(3, 8) < 0.9 for _ in range(4 * 5)]  # of h and c, two cells, five steps
    draws, asked = iter(masks), []

    def keep_mask(size, p, like):
        asked.append(p)
        return next(draws).to(like).view(size)

    # The direct call would draw in C++.
    monkeypatch.setattr(lstm_ext._ops, "fast_cell_with_steps", lambda *_: None)
    monkeypatch.setattr(lstm_ext._recurrence, "keep_mask", keep_mask)
    found = ours(memory, frames)
    assert asked == [0.1] * (len(masks) if training else 0)
    draws = iter(masks)
    monkeypatch.setattr(
        zoneout_decoder.TorchsZoneout, "draw", lambda _, like, p: 1 - next(draws).to(like)
    )
    expected = theirs(memory, frames)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = []
    for out, model in ((found, ours), (expected, theirs)):
        named = {n.replace(".cell.", "."): p for n, p in model.named_parameters()}
        grads = torch.autograd.grad(out.sin().sum(), list(named.values()))
        gradients.append(dict(zip(named, grads, strict=True)))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    if not training:
        torch.testing.assert_close(ours.generate(memory, 5), theirs.generate(memory, 5))


def test_zoneout_decoder_learns(capsys):
    zoneout_decoder.main(["--steps", "10", "--hidden", "32", "--frames", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[3]) < float(lines[0].split()[1])
    assert lines[1] == "generated (8, 10, 16)"
    assert [line.split(":")[0] for line in lines[2:]] == ["training", "generating"]
