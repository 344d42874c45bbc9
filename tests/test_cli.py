"""python -m lstm_ext: what it finds, what it says, and how it fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from limits import slow
from torch import nn

import lstm_ext
from lstm_ext import cli
from lstm_ext.cli import checkpoint, lecture


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class CharModel(nn.Module):
    def __init__(self, kind=nn.LSTM, V=4, I=6, H=5, **options):
        super().__init__()
        self.embedding = nn.Embedding(V, I)
        self.lstm = kind(I, H, **options)
        width = (options.get("proj_size") or H) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, V)

    def forward(self, index):
        return self.head(self.lstm(self.embedding(index))[0])


@pytest.fixture
def saved(tmp_path):
    def save(content, name="model.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize(
    "command", [[], ["nonsense"], ["demo", "--epochs", "0"], ["bench", "1x2"], ["bench", "0x1x2"],
                ["gates", "--last", "0"], ["gates", "--format", "gif"]],
)  # fmt: skip
def test_arguments_that_make_no_sense(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(command)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "demo", "gates", "bench", "convert"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert "--json" in said
    if command in ("gates", "bench"):
        assert f"python -m lstm_ext {command}" in said


def test_info_as_json(capsys):
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0
    assert json.loads(out) == lstm_ext.build_info()


def test_bench(capsys):
    status, out, err = run(capsys, "bench", "1x3x2", "4x1x3x2", "--threads", 1, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["threads"] == 1
    rows = found["rows"]
    assert [(row["module"], row["shape"]) for row in rows] == [
        ("LSTMCell", [1, 3, 2]), ("LSTMCell", [1, 3, 2]), ("LSTM", [4, 1, 3, 2]),
        ("LSTM", [4, 1, 3, 2]),
    ]  # fmt: skip
    for row in rows:
        assert row["ratio"] == pytest.approx(row["torchs"] / row["ours"])
        assert row["ours"] > 0.1
    assert "times as fast" in err  # for people
    status, out, _ = run(capsys, "bench", "1x3x2", "--dtype", "bfloat16")
    assert status == 0
    assert "bfloat16" in out
    assert out.count("LSTMCell") == 2


def test_bench_leaves_the_threads_as_they_were(capsys):
    before = torch.get_num_threads()
    run(capsys, "bench", "1x3x2", "--threads", before + 1)
    assert torch.get_num_threads() == before
    status, _, err = run(capsys, "bench", "1x3x2", "--device", "nowhere")
    assert status == 1
    assert err.splitlines()[-1].startswith("lstm_ext bench: ")


def test_demo_and_gates_of_its_model(capsys, tmp_path, monkeypatch):
    from lstm_ext.cli import bench

    monkeypatch.setattr(bench, "CELLS", [(1, 3, 2)])
    model, picture = tmp_path / "model.pt", tmp_path / "demo.png"
    status, out, _ = run(
        capsys, "demo", "--epochs", 3, "--picture", picture, "--save", model, "--json"
    )
    assert status == 0
    found = json.loads(out)
    assert found["agreed"]
    assert set(found["losses"]) == {
        f"{package}.{kind}" for package in ("lstm_ext", "torch.nn") for kind in ("LSTM", "LSTMCell")
    }
    assert picture.stat().st_size > 10_000
    text, out_folder = "abaBab", tmp_path / "pictures"
    status, out, err = run(
        capsys, "gates", "--checkpoint", model, "--text", text, "--out", out_folder, "--json"
    )
    assert status == 0
    found = json.loads(out)
    assert "half of c" in err
    assert {file.name for file in out_folder.iterdir()} == {
        "gates.png", "histogram.png", "saturation.png", "half_life.png", "trace.npz",
    }  # fmt: skip
    trained = lecture.LayerModel(nn.LSTM)
    trained.load_state_dict(torch.load(model, weights_only=True)["state_dict"])
    assert found["next"] == lecture.next_characters(trained, text)
    wanted = lstm_ext.trace_gates(trained.lstm, lecture.one_hot(text))
    np.testing.assert_allclose(np.load(out_folder / "trace.npz")["f"], wanted.f.numpy(), rtol=1e-5)
    for name, share in wanted.saturation().items():
        assert found["saturation"][name] == pytest.approx(share)
    np.testing.assert_allclose(found["half_life"], wanted.half_life()[0].numpy(), rtol=1e-5)


def test_gates_without_a_checkpoint(capsys, tmp_path):
    status, out, _ = run(capsys, "gates", "--epochs", 2, "--out", tmp_path, "--format", "svg")
    assert status == 0
    assert "399 characters" in out
    assert (tmp_path / "gates.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("options", [
    {}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"proj_size": 3},
    {"kind": lstm_ext.LSTM}, {"V": 6},
])  # fmt: skip
def test_checkpoints_of_other_models(options, saved):
    """Embedding, layers, directions: what the model itself predicts."""
    model = CharModel(**options)
    vocabulary = "abcdef"[: options.get("V", 4)]
    file = saved({"state_dict": model.state_dict(), "vocabulary": vocabulary})
    text = "abcdcab"
    trace, yhat = checkpoint.load(file).trace(text)
    index = torch.tensor([vocabulary.index(c) for c in text])
    with torch.no_grad():
        torch.testing.assert_close(yhat, model(index).softmax(-1), rtol=1e-5, atol=1e-6)
    assert trace.i.shape[0] == model.lstm.num_layers * (1 + model.lstm.bidirectional)


def test_checkpoint_of_a_cell_and_of_an_lstm_alone(saved):
    cell = nn.LSTMCell(3, 2)
    trace, yhat = checkpoint.load(saved({f"cell.{k}": v for k, v in cell.state_dict().items()}),
                                  vocabulary="abB").trace("ab")  # fmt: skip
    assert yhat is None
    torch.testing.assert_close(trace.h[0, 0], cell(lecture.one_hot("a"))[0].detach())
    lstm = nn.LSTM(3, 2, dtype=torch.float64)
    trace, _ = checkpoint.load(saved(lstm.state_dict()), vocabulary="abB").trace("ab")
    output = lstm(lecture.one_hot("ab", torch.float64))[0]
    torch.testing.assert_close(trace.h[0, :, 0], output.detach())


def test_gates_that_cannot_be(capsys, saved, tmp_path):
    lstm = nn.LSTM(3, 2)
    good = saved(lstm.state_dict(), "good.pt")
    two = saved({f"{k}.{n}": v for k in "ab" for n, v in lstm.state_dict().items()}, "two.pt")
    gru = saved(nn.GRU(3, 2).state_dict(), "gru.pt")
    wide = saved(nn.LSTM(7, 2).state_dict(), "wide.pt")
    whole = saved(nn.LSTM(3, 2), "whole.pt")  # a pickled module: would run code
    numbers = saved([1, 2], "numbers.pt")
    torn = dict(lstm.state_dict())
    torn.pop("bias_hh_l0")
    torn = saved(torn, "torn.pt")
    rubbish = tmp_path / "rubbish.pt"
    rubbish.write_bytes(b"no checkpoint")
    abc = ("--vocabulary", "abB")
    for checkpoint_file, rest, words in (
        (tmp_path / "none.pt", abc, "No such file"),
        (rubbish, abc, "no checkpoint"), (whole, abc, "no checkpoint that torch.load reads safely"),
        (numbers, abc, "not a state dict"), (gru, abc, "has no LSTM"),
        (two, abc, "choose by --module: a, b"), (two, (*abc, "--module", "c"), "named 'c'"),
        (wide, abc, "takes 7 numbers"), (torn, abc, "do not fit together"),
        (good, (), "--vocabulary"), (good, ("--vocabulary", "aab"), "a character twice"),
        (good, (*abc, "--layer", "1"), "layer 1 of 1"),
        (good, (*abc, "--direction", "1"), "direction 1 of 1"),
    ):  # fmt: skip
        out = tmp_path / "pictures"
        status, said, err = run(
            capsys, "gates", "--checkpoint", checkpoint_file, "--text", "ab", "--out", out, *rest
        )
        assert status == 1
        assert words in err
        assert len(err.splitlines()) == 1
        assert said == ""
        assert not out.exists()  # nothing half-written
    status, _, err = run(capsys, "gates", "--checkpoint", two, "--text", "ab", "--module", "b",
                         "--vocabulary", "abB", "--out", tmp_path / "b")  # fmt: skip
    assert (status, err) == (0, "")
    for text, words in (("", "the text is empty"), ("abx", "has 'x'")):
        status, _, err = run(capsys, "gates", "--checkpoint", good, *abc, "--text", text)
        assert status == 1
        assert words in err
    assert run(capsys, "gates", "--checkpoint", good, *abc)[0] == 1
    assert run(capsys, "gates", "--out", tmp_path / "no" / "folder")[0] == 1


def test_demo_needs_folders(capsys, tmp_path):
    for option in ("--picture", "--save"):
        status, _, err = run(capsys, "demo", option, tmp_path / "none" / "file")
        assert status == 1
        assert "no such folder" in err


@pytest.mark.parametrize(("command", "missing"), [("gates", "matplotlib"), *slow(("demo", "tqdm"))])
def test_missing_packages_are_named(command, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from lstm_ext import cli; sys.exit(cli.main([{command!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install" in result.stderr


def test_convert_of_a_state_dict(capsys, saved):
    model = nn.ModuleDict(
        {"rnn": nn.LSTM(3, 4, num_layers=2, bidirectional=True, bias=False),
         "cell": nn.LSTMCell(5, 6), "gru": nn.GRU(3, 4)}
    )  # fmt: skip
    status, out, _ = run(capsys, "convert", saved(model.state_dict()))
    assert status == 0
    assert out.splitlines() == [
        "rnn: LSTM(3, 4, num_layers=2, bias=False, bidirectional=True): can be converted",
        "cell: LSTMCell(5, 6): can be converted",
    ]
    status, out, _ = run(capsys, "convert", saved(nn.GRU(3, 4).state_dict()))
    assert (status, out) == (0, "no LSTM\n")


def test_convert_of_a_whole_model(capsys, saved, tmp_path):
    path = saved(CharModel())
    status, _, err = run(capsys, "convert", path)
    assert status == 1
    assert "--trust" in err
    status, out, _ = run(
        capsys, "convert", path, "--trust", "--out", tmp_path / "ours.pt", "--json"
    )
    assert status == 0
    assert json.loads(out)["modules"] == [{"name": "lstm", "kind": "LSTM", "result": "converted"}]
    ours = torch.load(tmp_path / "ours.pt", weights_only=False)
    assert type(ours.lstm) is lstm_ext.LSTM
    status, _, err = run(capsys, "convert", saved({}, "empty.pt"), "--out", tmp_path / "x.pt")
    assert status == 1
    assert "state dict" in err
