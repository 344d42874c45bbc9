"""The benchmark runs, checks its peers before it times them, and its report draws."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_benchmark_and_report(tmp_path):
    out = tmp_path / "cell.json"
    result = run(
        BENCHMARKS / "bench_cell.py", "--shapes", "1x3x2", "3x4x5", "--threads", 1, "--rounds", 2,
        "--peers", "nn.LSTMCell", "reference", "LSTMCellFunction", "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "geometric mean" in result.stdout
    content = json.loads(out.read_text())
    assert len(content["rows"]) == 2 * 4
    assert {row["mode"] for row in content["rows"]} == {
        "inference", "forward", "training", "training_all",
    }  # fmt: skip
    for row in content["rows"]:
        assert set(row["microseconds"]) == {
            "lstm_ext", "nn.LSTMCell", "reference", "LSTMCellFunction",
        }  # fmt: skip
        assert all(time > 0 for time in row["microseconds"].values())
        rivals = row["microseconds"]["nn.LSTMCell"]
        assert row["ratio"] == pytest.approx(rivals / row["microseconds"]["lstm_ext"])
        if row["mode"] == "forward":
            N, _, H = row["shape"]
            assert row["kept_bytes"]["lstm_ext"] == 4 * N * H * 4
            assert row["kept_bytes"]["nn.LSTMCell"] > row["kept_bytes"]["lstm_ext"]
    report = run(BENCHMARKS / "report.py", out, "--png")
    assert report.returncode == 0, report.stderr
    assert out.with_suffix(".png").stat().st_size > 10_000
    markdown = run(BENCHMARKS / "report.py", out, "--markdown").stdout
    assert "| 1 x 3 -> 2 |" in markdown


@pytest.mark.slow
def test_sequence_benchmark(tmp_path):
    out = tmp_path / "sequence.json"
    result = run(
        BENCHMARKS / "bench_sequence.py", "--shapes", "4x2x3x5", "--threads", 1, "--rounds", 2,
        "--peers", "nn.LSTM", "lstm_ext, frozen", "loop of nn.LSTMCell", "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = {row["mode"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 9
    for mode, row in rows.items():
        times = row["microseconds"]
        assert ("lstm_ext, frozen" in times) == ("inference" in mode)
        assert row["ratio"] == pytest.approx(times["nn.LSTM"] / times["lstm_ext"])
    assert "loop of nn.LSTMCell" in rows["inference"]["microseconds"]
    assert rows["training"]["kept_bytes"]["lstm_ext"] == 4 * 5 * (4 * 2) * 5
    # 4 gates x (I + H) x rows, twice for a multiplication and an addition; three times to train,
    # less the gradient of the input where nobody asks for it.
    per_step = 2 * 4 * 2 * 4 * 5
    for mode, products in (
        ("inference", 3 + 5), ("training", 2 * 3 + 3 * 5), ("input gradient training", 3 * (3 + 5)),
    ):  # fmt: skip
        row = rows[mode]
        flops = row["gflops"] * 1e3 * row["microseconds"]["lstm_ext"]
        assert flops == pytest.approx(per_step * products)


@pytest.mark.slow
def test_frozen_benchmark(tmp_path):
    out = tmp_path / "frozen.json"
    result = run(
        BENCHMARKS / "bench_frozen.py", "--shapes", "9x3x8x24", "--threads", 1, "--rounds", 2,
        "--peers", "nn.LSTM", "torch.ao int8", "--out", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = {row["mode"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["float32", "bfloat16", "int8", "int8, int16 activations"]
    for mode, row in rows.items():
        times, errors = row["microseconds"], row["error_percent"]
        rival = times["nn.LSTM" if mode == "float32" else "torch.ao int8"]
        assert row["ratio"] == pytest.approx(rival / times["lstm_ext"])
        assert (errors["lstm_ext"] < 1e-3) == (mode == "float32")
        assert errors["lstm_ext"] < errors["torch.ao int8"] < 10
    assert "times float32" in result.stdout


@pytest.mark.slow
def test_models_benchmark(tmp_path):
    out = tmp_path / "models.json"
    result = run(BENCHMARKS / "bench_models.py", "--quick", "--eager", "--threads", 1, "--out", out)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    names = {row["model"] for row in rows} - {"RecurrentPPO's policy"}  # if it is installed
    assert names == {"attention decoder", "recurrent policy", "tagger"}
    for row in rows:
        times = row["microseconds"]
        assert row["ratio"] == pytest.approx(times["torch"] / times["lstm_ext"])
    assert "tagger 3 x 4 -> 7" in result.stdout


def test_a_wrong_layer_is_not_timed():
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import torch, bench_sequence; "
        "from sequence_peers import FROZEN, OURS, TORCH, layers; "
        "peers = layers(3, 2, torch.float32, [OURS, TORCH, FROZEN]); "
        "assert 'frozen' in repr(peers[FROZEN].module); "
        "x, states = torch.randn(4, 1, 3), (torch.zeros(1, 1, 2),) * 2; "
        "bench_sequence.check_correct(peers, x, states, None); "
        "torch.nn.init.ones_(peers[TORCH].module.bias_hh_l0); "
        "bench_sequence.check_correct(peers, x, states, None)"
    )
    result = run("-c", code)
    assert result.returncode == 1
    assert "a peer's result is off by" in result.stderr


@pytest.mark.slow
def test_a_wrong_peer_is_not_timed():
    """The check before a row is timed fails when a peer computes something else."""
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import torch, peers, bench_cell; "
        "cells = peers.cells(3, 2, torch.float32, [peers.OURS, peers.TORCH]); "
        "torch.nn.init.zeros_(cells[peers.TORCH].module.bias_hh); "
        "bench_cell.calls(cells, (1, 3, 2), 'inference', torch.float32)"
    )
    result = run("-c", code)
    assert result.returncode == 1
    assert "a peer's result is off by" in result.stderr


@pytest.mark.slow
def test_shapes_are_checked():
    result = run(BENCHMARKS / "bench_cell.py", "--shapes", "3x2")
    assert result.returncode == 2
    assert "'3x2' is not batch x input x hidden" in result.stderr


@pytest.mark.slow
def test_cuda_benchmark(tmp_path):
    """The script itself, on the CPU: what runs on a GPU is made of the same rows."""
    out = tmp_path / "cuda.json"
    script = [BENCHMARKS / "bench_cuda.py", "--quick", "--rounds", 1, "--out", out]
    result = run(*script, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    kinds = {
        "cell": "nn.LSTMCell",
        "layer": "nn.LSTM",
        "packed layer": "nn.LSTM",
        "two layers": "nn.LSTM",
    }
    assert {row["mode"] for row in rows} == {
        f"{kind} {mode}, eager" for kind in kinds for mode in ("inference", "training")
    }
    for row in rows:
        rival = kinds[row["mode"].split(" inference")[0].split(" training")[0]]
        times = row["microseconds"]
        assert set(times) == {"lstm_ext", rival}
        assert row["ratio"] == pytest.approx(times[rival] / times["lstm_ext"])
    short = run(BENCHMARKS / "report.py", out, "--short", "--png").stdout
    assert len([line for line in short.splitlines() if "geometric mean" in line]) == 2 * len(kinds)
    # What there was no time for is said.
    hurried = run(*script, "--device", "cpu", "--seconds", 0)
    assert f"{len(kinds) - 1} of {len(kinds)} cases left out" in hurried.stdout
    if not torch.cuda.is_available():
        refused = run(*script)
        assert refused.returncode == 2
        assert "no CUDA device" in refused.stderr


def test_decay_benchmark(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_decay = importlib.import_module("bench_decay")
    monkeypatch.setattr(bench_decay, "SHAPES", [(1, 3, 2)])
    monkeypatch.setattr(bench_decay.protocol, "ROUND_SECONDS", 0.001)
    bench_decay.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        [kind, package] for kind in ("cell", "layer") for package in ("lstm_ext", "torch.nn")
    ]
    for line in lines:
        ordinary, tiny, ratio = map(float, line.split()[-3:])
        assert ratio == pytest.approx(tiny / ordinary, rel=0.005, abs=0.01)


@pytest.mark.slow
def test_what_the_tagger_is_measured_by():
    """Its tags are those of Python's tokenizer, and a span counts as a whole."""
    source = 'def add(a):\n    """Two\n    lines."""\n    return len("x") + 12  # all\n'
    code = (
        f"import sys, json; sys.path.insert(0, {str(BENCHMARKS)!r}); import accuracy_frozen as a; "
        "import torch; "
        f"row = a.tags({source!r}); spans = sorted(a.spans(row)); "
        "right = torch.tensor([[1, 1, 0, 2, 2, 3], [0, 0, 0, 0, 5, 5]]); "
        "found = torch.tensor([[1, 1, 0, 2, 3, 3], [0, 5, 5, 0, 5, 5]]); "
        "print(json.dumps([spans, a.f1(found, right), a.f1(right, right)]))"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    spans, partly, wholly = json.loads(result.stdout)
    assert [(source[a:b], tag) for a, b, tag in spans] == [
        ("def", 1), ("add", 2), ('"""Two\n    lines."""', 4), ("return", 1), ("len", 3),
        ('"x"', 4), ("12", 6), ("# all", 5),
    ]  # fmt: skip
    # Of 5 found and 4 right ones, 2 are both.
    assert partly == pytest.approx(100 * 2 * 2 / (5 + 4))
    assert wholly == 100


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs a benchmark in this process, one shape on one thread, and returns its rows."""

    def measure(name, shape, *options):
        monkeypatch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module(name)
        monkeypatch.setattr(module.protocol, "ROUND_SECONDS", 0.001)
        out = tmp_path / "rows.json"
        options = ["--shapes", shape, "--threads", "1", "--rounds", "1", *options]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--out", str(out)])
        threads = torch.get_num_threads()
        module.main()
        torch.set_num_threads(threads)
        return json.loads(out.read_text())["rows"]

    return measure


def test_ragged_benchmark(bench, capsys):
    rows = bench("bench_ragged", "4x3x3x2")
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["4x3x3x2", "inference"],
        ["4x3x3x2", "training"],
    ]
    assert [row["mode"] for row in rows] == ["inference", "training"]
    for row in rows:
        assert list(row["us"]) == ["padded", "list by hand", "list", "nested by hand", "nested"]
        for name, ratio in row["ratios"].items():
            assert ratio == pytest.approx(row["us"][f"{name} by hand"] / row["us"][name])


def test_states_benchmark(bench, capsys):
    tables, modes = ("cells", "resets"), ("inference", "training")
    rows = bench("bench_states", "4x3x3x2", "--tables", *tables)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        [table, "4x3x3x2", mode] for table in tables for mode in modes
    ]
    assert [(row["table"], row["mode"]) for row in rows] == [(t, m) for t in tables for m in modes]
    for row in rows:
        for name, ratio in row["ratios"].items():
            a, b = name.split(" / ")
            assert ratio == pytest.approx(row["us"][a] / row["us"][b])


def test_wrong_cell_states_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_states = importlib.import_module("bench_states")
    ways = {"on": lambda: [torch.ones(2), torch.ones(2)], "off": lambda: [torch.ones(2)]}
    bench_states.compare(ways, ["on", "off"])
    ways["loop of cells"] = lambda: [torch.ones(2), torch.zeros(2)]
    with pytest.raises(AssertionError):
        bench_states.compare(ways, ["on", "off", "loop of cells"])


def test_projection_benchmark(bench, capsys, tmp_path):
    rows = bench("bench_projection", "4x3x3x4x2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["4x3x3x4x2"] * 4
    assert [row["mode"] for row in rows] == [
        "inference", "training", "packed inference", "packed training",
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in rows)
    clips = json.loads((tmp_path / "rows_clips.json").read_text())["rows"]
    assert [row["mode"] for row in clips] == ["inference", "training"]
    for row in clips:
        assert list(row["us"]) == ["no clip", "both clips", "loop by hand"]
        assert all(ratio > 0 for ratio in row["ratios"].values())


def test_wrong_clips_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_projection")
    x = torch.ones(2)
    ways = {"no clip": lambda: 2 * x, "both clips": lambda: x, "loop by hand": lambda: x}
    bench.compare_clips(ways)
    with pytest.raises(AssertionError, match="Mismatched"):
        bench.compare_clips({**ways, "loop by hand": lambda: 0.99 * x})
    with pytest.raises(AssertionError, match="nothing was clipped"):
        bench.compare_clips({**ways, "no clip": lambda: x})


def test_setup_benchmark(bench, capsys):
    rows = bench("bench_setup", "2x3x2x2")
    kinds = [
        ("init", "forget_bias_"), ("init", "orthogonal_"), ("replacing", "cpu"),
        ("replacing", "meta"),
    ]  # fmt: skip
    assert [(row["table"], row["what"]) for row in rows] == kinds
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for row in rows:
        for name, ratio in row["ratios"].items():
            a, b = name.split(" / ")
            assert ratio == pytest.approx(row["us"][a] / row["us"][b])
    assert type(torch.nn.LSTM(2, 3)) is torch.nn.LSTM


def test_wrong_setups_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_setup")
    model = torch.nn.Sequential(torch.nn.LSTM(2, 3))
    by_hand, ours = bench.INIT["forget_bias_"]
    bench.compare_init(by_hand, ours, model)
    with pytest.raises(AssertionError, match="not equal"):
        bench.compare_init(by_hand, lambda m: ours(m, 2.0), model)
    with pytest.raises(AssertionError, match="by ours"):
        bench.compare_init(by_hand, lambda m: ours(m)[:1], model)
    ways = bench.building_ways((2, 3, 1, 1), "cpu")
    with pytest.raises(AssertionError, match="wanted"):
        bench.compare_built({**ways, "convert": ways["outside"]})


@pytest.mark.parametrize("loops", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_variants_benchmark(monkeypatch, capsys, tmp_path, loops):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_variants")
    monkeypatch.setattr(bench.protocol, "ROUND_SECONDS", 0.001)
    out = tmp_path / "rows.json"
    options = ["--shapes", "4x3x3x4", "--rounds", "1", "--out", str(out), *["--loops"] * loops]
    monkeypatch.setattr(sys, "argv", ["bench_variants.py", *options])
    bench.main()
    rows = json.loads(out.read_text())["rows"]
    cost = [row for row in rows if row["table"] == "cost"]
    assert [(row["mode"], row["variant"]) for row in cost] == [
        (mode, name) for mode in bench.MODES for name in bench.VARIANTS
    ]
    assert len(rows) - len(cost) == 6 * loops
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_variant_models_benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_variant_models")
    monkeypatch.setattr(bench.protocol, "ROUND_SECONDS", 0.001)
    out = tmp_path / "rows.json"
    options = ["--models", "awd_lstm", "zoneout_decoder", "--modes", "inference", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_variant_models.py", *options, "--out", str(out)])
    bench.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == ["awd_lstm", "zoneout_decoder"]
    ours, theirs, run = bench.zoneout()
    with torch.no_grad():
        theirs.cells[0].cell.bias_hh += 0.01
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        bench.compare(ours, theirs, run)


def test_a_wrong_variant_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_variants")
    x = torch.randn(3)
    runs = {"eager loop": lambda x: x + 1e-6, "lstm_ext": lambda x: x + 2e-6}
    bench.compare(runs, lambda x: x, x)
    runs["lstm_ext"] = lambda x: x + 1e-4
    with pytest.raises(AssertionError, match="lstm_ext"):
        bench.compare(runs, lambda x: x, x)


def test_a_wrong_projection_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_projection")
    shape = (4, 3, 3, 4, 2)
    modules = {name: torch.nn.LSTM(3, 4, proj_size=2) for name in ("torch", "lstm_ext")}
    with pytest.raises(AssertionError):
        bench.compare(modules, shape, torch.float32)


def test_a_wrong_way_of_ragged_sequences_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench_ragged = importlib.import_module("bench_ragged")
    batch = [torch.randn(n, 2) for n in (2, 3)]
    ways = {"padded": lambda: torch.ones(2, 3, 2), "list": lambda: torch.zeros(5, 2)}
    with pytest.raises(AssertionError):
        bench_ragged.compare(ways, batch)
