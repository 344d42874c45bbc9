"""The examples run and do what they say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import char_model
import pytest
import torch
import torch.distributed.checkpoint as dcp
import why_lstm
from limits import HUNG

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
