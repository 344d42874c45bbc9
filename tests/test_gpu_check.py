"""`make gpu-check` (tests/gpu) loses nothing, whatever its stages do: on no GPU."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import pytest
import torch
from limits import HUNG
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext  # noqa: F401

ROOT = Path(__file__).parent.parent
GPU = ROOT / "tests" / "gpu"
sys.path.insert(0, str(GPU))

import check  # noqa: E402
import fakes  # noqa: E402
import path_list  # noqa: E402
import path_worker  # noqa: E402
import paths  # noqa: E402
import prebuild  # noqa: E402
import prebuilt  # noqa: E402
import process  # noqa: E402
import runner as runner_module  # noqa: E402
import stages  # noqa: E402
import table  # noqa: E402
from runner import Job, Runner, Stage  # noqa: E402

sys.path.remove(str(GPU))  # its names are for its own scripts

DRY_RUN = {
    "good": "passed",
    "crash": "failed (killed by SIGABRT)",
    "fails": "failed (1)",
    "import_fails": "failed (1)",
    "stubborn": "cut off",
    "polite": "cut off",
    "silent": "failed: it said nothing",
    "endless": "cut off",
    "long": "passed",
    "leaves_children": "passed",
    "needs_gpu": "needs a GPU",
    "together": "failed (1)",
    "no program": "failed: ",
    "absent": "failed: no such tool",
    "last": "passed",
}


class Run:
    """A run of check.py whose processes can be found by a token in their environment."""

    def __init__(self, out, *arguments):
        self.out = out
        self.token = f"GPU_CHECK_TEST_{uuid.uuid4().hex}"
        command = [sys.executable, GPU / "check.py", "--out", out, *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, self.token: "1"},
        )  # fmt: skip

    def wait_for(self, stage):
        """Until a stage has begun and its process has said something."""
        while True:
            assert self.process.poll() is None
            found = self.results() if (self.out / "results.json").exists() else {"stages": []}
            last = found["stages"][-1] if found["stages"] else {}
            if last.get("name") == stage and any(job.get("said") for job in last["jobs"]):
                return
            time.sleep(0.05)

    def finish(self):
        said = self.process.communicate()[0]
        return self.process.returncode, said

    def results(self):
        return json.loads((self.out / "results.json").read_text())

    def left(self):
        """Processes that the run has left."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.token.encode() in (entry / "environ").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("dry") / "out", "--dry-run")
    run.code, run.said = run.finish()
    return run


def test_every_stage_has_its_result_in_order(dry):
    results = dry.results()
    assert list(DRY_RUN) == results["plan"] == [s["name"] for s in results["stages"]]
    for stage in results["stages"]:
        assert stage["status"].startswith(DRY_RUN[stage["name"]]), stage
    assert results["status"] == "complete"
    assert dry.code == 1


def test_what_stages_said_is_kept(dry):
    jobs = {s["name"]: s["jobs"] for s in dry.results()["stages"]}
    assert jobs["good"][0]["lines"] == [{"test": "good", "status": "passed"}]
    assert jobs["stubborn"][0]["lines"] == [{"test": "stubborn", "status": "begun"}]
    assert jobs["long"][0]["said"][-1] == "the last line"
    assert "this is why" in jobs["fails"][0]["said"]
    assert "no_such_module" in jobs["import_fails"][0]["said"][-1]
    with tarfile.open(dry.out / "logs.tar.gz") as logs:
        names = logs.getnames()
        assert {"logs/crash.log", "logs/good.jsonl", "logs/together_fails.log"} <= set(names)
        long = logs.extractfile("logs/long.log").read().decode()
    assert len(long) < 1_000_000
    assert long.endswith("the last line\n")
    assert "left out" in long


def test_no_process_is_left(dry):
    assert dry.left() == []


def test_few_files_come_back(dry):
    files = [path for path in dry.out.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"results.json", "table.txt", "logs.tar.gz"}
    assert all(path.stat().st_size < 4 * 2**20 for path in files)


def test_the_table_comes_last(dry):
    text = (dry.out / "table.txt").read_text()
    assert dry.said.endswith(text)
    for name in DRY_RUN:
        assert text.count(f"\n{name} ") == 1, name


def test_a_signal_ends_it_with_a_table(tmp_path):
    run = Run(tmp_path / "out", "--dry-run", "--only", "crash", "stubborn", "last",
              "--seconds-each", "600")  # fmt: skip
    run.wait_for("stubborn")
    run.process.send_signal(signal.SIGTERM)
    code, said = run.finish()
    assert code == 1
    statuses = [stage["status"] for stage in run.results()["stages"]]
    assert statuses[0].startswith("failed")
    assert statuses[1:] == ["interrupted by SIGTERM", "not run: interrupted by SIGTERM"]
    assert run.results()["status"] == "interrupted by SIGTERM"
    assert said.endswith((tmp_path / "out" / "table.txt").read_text())
    assert run.left() == []


def test_killed_it_leaves_what_was_known(tmp_path):
    run = Run(tmp_path / "out", "--dry-run", "--only", "good", "stubborn", "--seconds-each", "600")
    run.wait_for("stubborn")
    run.process.kill()
    run.finish()
    good, stubborn = run.results()["stages"]
    assert (good["status"], stubborn["status"]) == ("passed", "begun")
    assert stubborn["jobs"][0]["lines"] == [{"test": "stubborn", "status": "begun"}]
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert "logs/good.log" in logs.getnames()
    until = time.monotonic() + HUNG  # the kernel tells the processes, in its own time
    while run.left() and time.monotonic() < until:
        time.sleep(0.05)
    assert run.left() == []


def test_nobody_has_to_read_what_it_prints(tmp_path):
    run = Run(tmp_path / "out", "--dry-run", "--only", "good", "fails", "last")
    run.process.stdout.close()
    assert run.process.wait(HUNG) == 1
    assert run.results()["status"] == "complete"
    statuses = [stage["status"] for stage in run.results()["stages"]]
    assert statuses == ["passed", "failed (1)", "passed"]
    assert "GPU check on" in (tmp_path / "out" / "table.txt").read_text()


def test_the_time_of_all_is_limited(tmp_path):
    run = Run(tmp_path / "out", "--dry-run", "--only", "stubborn", "last", "--seconds", "0")
    _, said = run.finish()
    assert [stage["status"] for stage in run.results()["stages"]] == ["not run: no time left"] * 2
    assert "last" in said.splitlines()[-1]


class Clock:
    """The time of a runner: it stands still, and makes a leap when a file exists."""

    time = staticmethod(time.time)

    def __init__(self, leap, file):
        self.now, self.leap, self.file = 0.0, leap, file

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        time.sleep(seconds)
        if self.leap and self.file.exists():
            self.now, self.leap = self.now + self.leap, 0


def test_a_stage_is_cut_off_when_the_time_of_all_is_over(tmp_path, monkeypatch, signals):
    ready = tmp_path / "ready"
    code = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    monkeypatch.setattr(runner_module, "time", Clock(1000, ready))
    runner = Runner(tmp_path / "out", tmp_path / "work", ROOT, 1000, {}, grace=HUNG)
    runner.run([Stage("hangs", 1e6, [Job("hangs", [sys.executable, "-c", code])]),
                Stage("last", 1e6, [Job("last", [sys.executable, "-c", "print(1)"])])])  # fmt: skip
    hangs, last = runner.results["stages"]
    assert hangs["status"].startswith("cut off")
    assert last["status"] == "not run: no time left"


@pytest.fixture
def signals():
    """Handlers of signals as they were: a runner has its own."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_unused_time_goes_on(tmp_path, signals):
    runner = Runner(tmp_path / "out", tmp_path / "work", ROOT, 1000, {})
    quick = [Job("quick", [sys.executable, "-c", "print('{seconds}')"])]
    runner.run([Stage("first", 100, quick), Stage("second", 100, quick),
                Stage("alone", 100, quick, inherits=False),
                Stage("far", 1e6, quick)])  # fmt: skip
    limits = [stage["limit"] for stage in runner.results["stages"]]
    assert limits[0] <= 100 < limits[1] <= 200
    assert limits[2] <= 100
    assert limits[3] < 1000
    assert int(runner.results["stages"][1]["jobs"][0]["said"][0]) > 100


def test_a_process_is_asked_before_it_is_killed(tmp_path):
    ready = tmp_path / "ready"
    code = (
        "import pathlib, time\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "try:\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    print('saved')\n"
    )
    child = process.Child([sys.executable, "-c", code], tmp_path / "log", os.environ, ROOT)
    while not ready.exists():
        time.sleep(0.02)
    process.end([child], grace=HUNG)
    assert (tmp_path / "log").read_text() == "saved\n"
    assert child.poll() == 0


def test_a_process_that_ignores_signals_is_killed(tmp_path):
    code = (
        "import signal, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\n"
        "time.sleep(600)\n"
    )
    child = process.Child([sys.executable, "-c", code], tmp_path / "log", os.environ, ROOT)
    while not (tmp_path / "log").read_text():
        time.sleep(0.02)
    process.end([child], grace=0.1)
    assert child.process.wait(HUNG) == -signal.SIGKILL


def test_what_a_process_leaves_in_its_group_ends_with_it(tmp_path):
    sleep = f"{sys.executable} -c 'import time; time.sleep(600)' & echo $!"
    child = process.Child(["sh", "-c", sleep], tmp_path / "log", os.environ, ROOT)
    while child.poll() is None:
        time.sleep(0.02)
    left = Path("/proc") / (tmp_path / "log").read_text().strip() / "stat"
    until = time.monotonic() + HUNG
    with contextlib.suppress(OSError):  # it is gone, between two looks or within one
        while left.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < until
            time.sleep(0.02)


def run_paths(folder, groups, *arguments):
    cases = {
        group: [{"name": f"{group} {way}", "op": "layer", "way": way, "dtype": "float32",
                 "watchdog": 1 if "hang" in way else 600} for way in ways]
        for group, ways in groups.items()
    }  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    out = folder / "lines.jsonl"
    command = [sys.executable, GPU / "paths.py", "--cases", folder / "cases.json", "--out", out,
               *arguments, "--worker", sys.executable, GPU / "fake_worker.py"]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=600
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return done, {line["path"]: line for line in table.latest(lines, "path")}


def test_a_path_that_goes_wrong_costs_itself_alone(tmp_path):
    groups = {
        "a": ["is right", "hangs", "is right too", "crashes", "is wrong", "CUDA error", "is last"],
        "b": ["no start", "is never reached"],
        "c": ["hangs in the profiler", "is right"],
        "d": ["is right"],
    }
    done, found = run_paths(tmp_path, groups)
    assert {name: line["status"] for name, line in found.items()} == {
        "a is right": "ok", "a hangs": "hung", "a is right too": "ok", "a crashes": "crashed",
        "a is wrong": "wrong", "a CUDA error": "error", "a is last": "ok",
        "b no start": "crashed", "b is never reached": "ok",
        "c hangs in the profiler": "ok", "c is right": "ok", "d is right": "ok",
    }  # fmt: skip
    assert "cannot open shared object" in found["b no start"]["worst"]
    assert "profiler" in found["c hangs in the profiler"]["other_way"]
    assert "7 of 12 paths agree" in done.stdout
    assert "ImportError: libsomething.so" in done.stdout  # what the process said last
    assert done.returncode == 1


def test_a_process_that_never_starts_is_not_started_for_ever(tmp_path):
    done, found = run_paths(tmp_path, {"a": ["no start"] * 1 + ["no start 2"], "b": ["is right"]})
    assert found["b is right"]["status"] == "ok"
    assert found["a no start"]["status"] == "crashed"
    assert done.returncode == 1


def test_paths_end_in_time(tmp_path):
    done, found = run_paths(tmp_path, {"a": ["is right", "waits", "hangs"]}, "--seconds", 2,
                        "--patience", 600)  # fmt: skip
    assert found["a hangs"]["status"] in ("cut off", "not reached")
    assert done.returncode == 1


def test_the_truth_of_paths_is_nn_lstm():
    L, N, I, H = 5, 4, 3, 6
    module = nn.LSTM(I, H, bidirectional=True, dtype=torch.float64)
    x, h, c = (torch.randn(*s, dtype=torch.float64) for s in ((L, N, I), (2, N, H), (2, N, H)))
    packed = pack_padded_sequence(x, torch.tensor([5, 5, 2, 1]))
    expected, (hn, cn) = module(packed, (h, c))
    for d in range(2):
        weights = list(module.parameters())[4 * d : 4 * d + 4]
        found = path_worker.in_steps(packed.data, h[d], c[d], weights,
                                     packed.batch_sizes.tolist(), None, d == 1)  # fmt: skip
        torch.testing.assert_close(found[0], expected.data[:, d * H : (d + 1) * H])
        torch.testing.assert_close(found[1], hn[d])
        torch.testing.assert_close(found[2], cn[d])
    # Before a reset step, nothing matters.
    reset = torch.zeros(L, N, dtype=torch.bool)
    reset[3] = True
    weights = list(module.parameters())[:4]
    whole = path_worker.in_steps(x.flatten(0, 1), h[0], c[0], weights, [N] * L, reset, False)
    part = path_worker.in_steps(x[3:].flatten(0, 1), 0 * h[0], 0 * c[0], weights, [N] * 2, None,
                                False)  # fmt: skip
    torch.testing.assert_close(whole[0][3 * N :], part[0])


CASE = path_list.Case("layer", path_list.ONE, "float32", 5, 6, 7, 4, ("packed", "reset")).as_dict()


def operator(case=CASE, spoil=None):
    """Results of a path on the CPU, with one of its tensors spoilt."""
    told = {}
    numbers = path_worker.Numbers
    run_ours = numbers.run_ours

    def spoilt(self):
        found = run_ours(self)
        for name, tensor in zip(self.names(), found, strict=True):
            if name == spoil:
                tensor.view(-1)[0] += 3e-6 * tensor.abs().max()
        return found

    numbers.run_ours = spoilt
    try:
        path_worker.run_operator(case, "cpu", told.update)
    finally:
        numbers.run_ours = run_ours
    return told


def test_a_path_is_right():
    told = operator()
    assert told["status"] == "ok"
    assert list(told["errors"]) == path_worker.NAMES


@pytest.mark.parametrize("name", path_worker.NAMES)
def test_an_error_of_a_path_is_seen_in_each_tensor(name):
    told = operator(spoil=name)
    assert told["status"] == "wrong"
    assert told["worst"] == name


def test_other_bits_at_a_second_call_are_an_error(monkeypatch):
    run_ours, calls = path_worker.Numbers.run_ours, []

    def changing(self):
        calls.append(1)
        found = run_ours(self)
        found[3].view(-1)[0] *= 1 + 1e-7 * len(calls)
        return found

    monkeypatch.setattr(path_worker.Numbers, "run_ours", changing)
    told = operator()
    assert (told["status"], told["worst"]) == ("wrong", "other bits at a second call")


def test_inference_is_compared_too(monkeypatch):
    ours = path_worker.Numbers.ours

    def spoilt(self, *values):
        found = ours(self, *values)
        return found if torch.is_grad_enabled() else [found[0] + 1e-3, *found[1:]]

    monkeypatch.setattr(path_worker.Numbers, "ours", spoilt)
    told = operator()
    assert (told["status"], told["worst"]) == ("wrong", "output without gradients")


def test_nan_is_an_error():
    zeros, nan = torch.zeros(3, dtype=torch.float64), torch.tensor([0, float("nan"), 0])
    for dtype in path_list.DTYPES:
        told = path_worker.judge(["x"], [nan], [[zeros]], [zeros + 1], dtype)
        assert told["status"] == "wrong"
        # Nor is torch's own a licence.
        assert path_worker.judge(["x"], [nan], [[nan]], [zeros + 1], dtype)["status"] == "wrong"


def kernel(name, blocks):
    return {"name": name, "grid": [blocks, 1, 1], "block": [256, 1, 1], "times": 1}


def test_another_way_is_seen():
    layer = {"op": "layer", "N": 5, "H": 256}
    both = [kernel("layer_forward_kernel<FmaTile<float, 8>>", 32),
            kernel("layer_backward_kernel<FmaTile<float, 8>>", 32)]  # fmt: skip
    steps = [kernel("cell_finish_kernel<float>", 1), kernel("cell_backward_kernel<float>", 1)]
    assert path_worker.other_way({**layer, "way": path_list.SPREAD}, both) == ""
    assert "32 blocks" in path_worker.other_way({**layer, "way": path_list.ONE}, both)
    assert "no cell_finish" in path_worker.other_way({**layer, "way": path_list.STEPS}, both)
    assert path_worker.other_way({**layer, "way": path_list.STEPS}, steps) == ""
    assert "no layer" in path_worker.other_way({**layer, "way": path_list.SPREAD}, steps)
    assert "no kernel" in path_worker.other_way({**layer, "way": path_list.SPREAD}, [])


def test_names_of_kernels_are_readable():
    for hidden in ("(anonymous namespace)", "_GLOBAL__N__1a2b_16_layer_forward_cu_3c4d_5e6f"):
        name = f"void lstm_ext::cuda::{hidden}::layer_forward_kernel<lstm_ext::cuda::FmaTile<float"
        name += ", (int)8>, (bool)1>(lstm_ext::cuda::LayerForward<float>, lstm_ext::cuda::Plan)"
        assert path_worker.readable(name) == "layer_forward_kernel<FmaTile<float, 8>, 1>"


def test_every_path_of_the_plan_has_a_name_of_its_own():
    for device in ("cpu", "cuda"):
        names = [case.name for cases in path_list.groups(device).values() for case in cases]
        assert len(names) == len(set(names))
    for cases in path_list.groups("cuda").values():
        for case in cases:
            assert case.op == "module" or case.way in path_worker.WAYS


def test_a_long_table_is_cut_short():
    line = {"status": "wrong", "op": "layer", "way": "spread", "dtype": "float32", "error": 1.0,
            "torch": 1e-7, "allowed": 1e-6, "worst": "grad w_hh " * 30}  # fmt: skip
    job = {"name": "job " * 20, "status": "failed (1)", "said": ["word " * 99] * 30}
    some = {
        "kernel paths": [{**line, "path": f"path {k} " * 9} for k in range(300)],
        "test_gpu.py": [{"test": f"test {k} " * 9, "status": "failed"} for k in range(300)],
        "other tests": [{"test": f"test {k} " * 9, "status": "begun"} for k in range(300)],
        "microbenchmarks": [{"name": f"n{k} " * 9, "value": 0.123456, "unit": "us"}
                            for k in range(300)],
        "environment": [{"part": "gpu", "gpu": "a card " * 99}],
    }  # fmt: skip
    names = [*some, "compute-sanitizer", "variants", "ncu", "benchmark", *map(str, range(20))]
    found = [{"name": name, "status": "failed " * 20, "seconds": 1.0,
              "jobs": [{**job, "lines": some.get(name, [])}] * 6} for name in names]  # fmt: skip
    text = table.make({"status": "complete", "stages": found, "plan": [*names, "never begun"]})
    assert len(text) <= 11_000
    assert len(text.splitlines()) <= 110
    assert text.splitlines()[-1].split() == ["never", "begun", "not", "reached"]
    for name in names:
        assert f"\n{name} " in text


def test_the_table_survives_what_it_cannot_read():
    jobs = [{"name": "j", "status": "passed", "lines": [{"path": 1}, {"value": "x"}, {}]}]
    found = [{"name": name, "status": "passed", "jobs": jobs} for name in table.SECTIONS]
    text = table.make({"status": "complete", "stages": found})
    assert "this part of the table fails" in text
    assert "benchmark" in text.splitlines()[-3]


NCU = """
==PROF== Connected to process 8343 (/usr/bin/python3.12)
"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value","Rule Name","Advice"
"0","void unnamed>::a_kernel<Tile<__half, 32>, 1>(A<T>)","(128, 1, 1)","Duration","ns","278,592",
"0","void unnamed>::a_kernel<Tile<__half, 32>, 1>(A<T>)","(128, 1, 1)","No Eligible","%","80.1"
"0","void unnamed>::a_kernel<Tile<__half, 32>, 1>(A<T>)","(128, 1, 1)","","","","Rule","words"
"1","b_kernel(B)","(8, 1, 1)","Duration","us","1.5",
"""


def test_what_ncu_says_is_a_line_a_kernel():
    stage = {"name": "ncu", "jobs": [{"name": "ncu", "status": "passed", "said": NCU.splitlines()}]}
    assert table.section(stage) == [
        "  a_kernel: blocks (128, 1, 1), time 278,592ns, idle 80.1%",
        "  b_kernel: blocks (8, 1, 1), time 1.5us",
    ]


def test_what_fails_alike_is_one_line():
    lines = [
        {"test": f"tests/test_a.py::test_b[{k}]", "status": "failed", "said": "AssertionError"}
        for k in range(9)
    ]
    lines += [
        {"test": "tests/test_a.py::test_c", "status": "begun"},
        {"test": "tests/test_a.py::test_d", "status": "passed"},
    ]
    stage = {"name": "test_gpu.py", "jobs": [{"name": "t", "status": "failed", "lines": lines}]}
    assert table.section(stage) == [
        "  9 failed, 1 begun, 1 passed",
        "  failed: test_a.py::test_b and 8 more: AssertionError",
        "  begun: test_a.py::test_c:",
    ]


def test_the_benchmark_is_a_line_a_case(tmp_path):
    rows = [
        {"mode": "layer inference, graph", "us": (10, None), "failed": {"nn.LSTM": "no capture"}},
        {"mode": "layer inference, eager", "us": (10, 14)},
        {"mode": "layer training, graph", "us": (20, 10)},
        {"mode": "layer training, eager", "us": (99, 99)},
        {"mode": "cell training, failed", "us": (None, None), "error": "CUDA error"},
    ]
    for row in rows:
        ours, theirs = row.pop("us")
        times = {"lstm_ext": ours, "nn.LSTM": theirs}
        row.update(dtype="float16", shape=[5, 4, 3])
        row["microseconds"] = {name: value for name, value in times.items() if value}
        if ours and theirs:
            row["ratio"] = theirs / ours
    (tmp_path / "cuda.json").write_text(json.dumps({"rows": rows}))
    stage = {"name": "benchmark", "jobs": [], "file": str(tmp_path / "cuda.json")}
    _, *lines = table.section(stage)
    assert [" ".join(line.split()) for line in lines] == [
        "layer float16 5x4x3 inference, graph: nn.LSTM: no capture",
        "cell float16 5x4x3 training, failed: CUDA error",
        "layer float16 5x4x3 inference 10.0 / 14.0 = 1.40e training 20.0 / 10.0 = 0.50",
    ]


TESTS = """
import time
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "because"
@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass
def test_on_cuda(): pass
"""


def with_lines(folder, text, *arguments, which=""):
    (folder / "test_it.py").write_text(text)
    lines = folder / "lines.jsonl"
    # It is no worker, where this is one.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_lines", "-p", "no:cacheprovider", "-v",
         "--rootdir", folder, "-c", os.devnull, *arguments, f"{folder}/test_it.py{which}"],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**alone, "PYTHONPATH": str(GPU / "plugin"), "GPU_CHECK_LINES": str(lines)},
    )  # fmt: skip
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    return done, found


def test_a_line_a_test(tmp_path):
    done, lines = with_lines(tmp_path, TESTS)
    assert [(line["test"].split("::")[1], line["status"]) for line in lines] == [
        ("test_on_cuda", "begun"), ("test_on_cuda", "passed"),
        ("test_good", "begun"), ("test_good", "passed"),
        ("test_bad", "begun"), ("test_bad", "failed"),
        ("test_skipped", "begun"), ("test_skipped", "skipped"),
    ]  # fmt: skip
    assert "because" in lines[5]["said"]
    assert done.returncode == 1


@pytest.mark.slow
def test_skipped_tests_have_not_passed(tmp_path):
    done, _ = with_lines(tmp_path, TESTS, which="::test_skipped")
    assert done.returncode == 77
    done, _ = with_lines(tmp_path, TESTS, which="::test_good")
    assert done.returncode == 0


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    done, lines = with_lines(tmp_path, "import no_such_module")
    assert done.returncode != 0
    assert "no_such_module" in lines[-1]["said"]


BROKEN = """
import pytest
@pytest.mark.parametrize("k", range(8))
def test_cuda(k):
    if k == 2: raise RuntimeError("CUDA error: an illegal memory access was encountered")
broken = []
@pytest.fixture(autouse=True)
def state(request):
    assert not broken, "CUDA error: of an earlier test"
    yield
    if "2" in request.node.name: broken.append(1)
"""


@pytest.mark.slow
def test_a_broken_cuda_does_not_fail_all_later_tests(tmp_path):
    _, lines = with_lines(tmp_path, BROKEN, "-n", "1")
    latest = {line["test"].split("::")[1]: line["status"] for line in lines}
    assert latest["test_cuda[2]"] == "failed"
    assert sum(status == "passed" for status in latest.values()) >= 6


@pytest.fixture
def checkout(tmp_path):
    """A root with sources, and a prebuilt module for this Python made from them."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    (tmp_path / "setup.py").write_text("setup()")
    (tmp_path / "lstm_ext").mkdir()
    folder = tmp_path / "build" / "gpu"
    (folder / "lstm_ext").mkdir(parents=True)
    (folder / "lstm_ext.egg-info").mkdir()
    (folder / "lstm_ext.egg-info" / "PKG-INFO").write_text("Version: 1")
    prebuilt.module_path(folder).write_text("module")
    (folder / "lstm_ext" / "_built_with.py").write_text("TORCH_VERSION = '1'")
    manifest = {**prebuilt.this_python(), "sources": prebuilt.sources_hash(tmp_path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_versions_are_known_without_importing_torch():
    found = prebuilt.this_python()
    assert found["torch"] == str(torch.__version__)
    assert found["cuda"] == torch.version.cuda


def test_a_prebuilt_module_is_put_in_place(checkout):
    folder = checkout / "build" / "gpu"
    assert prebuilt.why_not(folder, checkout) is None
    prebuilt.place(folder, checkout)
    assert prebuilt.module_path(checkout).read_text() == "module"
    assert "TORCH" in (checkout / "lstm_ext" / "_built_with.py").read_text()
    assert (checkout / "lstm_ext.egg-info" / "PKG-INFO").exists()


def test_a_prebuilt_module_that_does_not_fit_is_refused(checkout):
    folder = checkout / "build" / "gpu"
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("python", "torch", "cuda"):
        (folder / "manifest.json").write_text(json.dumps({**manifest, key: "0.1"}))
        assert f"for {key} 0.1" in prebuilt.why_not(folder, checkout)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (checkout / "csrc" / "a.cpp").write_text("int b;")
    assert "other sources" in prebuilt.why_not(folder, checkout)
    (checkout / "csrc" / "a.cpp").write_text("int a;")
    assert prebuilt.why_not(folder, checkout) is None
    (checkout / "csrc" / "b.cpp").write_text("")
    assert "other sources" in prebuilt.why_not(folder, checkout)
    (checkout / "csrc" / "b.cpp").unlink()
    prebuilt.module_path(folder).unlink()
    assert "missing" in prebuilt.why_not(folder, checkout)
    shutil.rmtree(folder)
    assert "no prebuilt module" in prebuilt.why_not(folder, checkout)


@pytest.fixture
def prebuilding(tmp_path, monkeypatch):
    """prebuild.main with nothing compiled; what its parts do, by their names."""

    def compile_module(python, folder):
        (folder / "lstm_ext").mkdir(parents=True, exist_ok=True)
        (folder / "lstm_ext" / "_C.so").write_bytes(b"0" * 2**20)

    monkeypatch.setattr(prebuild, "environment", lambda *_: Path("python"))
    monkeypatch.setattr(prebuild, "compile_module", compile_module)
    monkeypatch.setattr(prebuild, "check_module", lambda *_: {"compiler": "12"})
    monkeypatch.setattr(prebuild, "build_native", lambda _: "built")
    monkeypatch.setattr(sys, "argv", ["prebuild.py", "--out", str(tmp_path / "gpu")])
    return monkeypatch


def test_a_manifest_says_what_was_prebuilt(tmp_path, prebuilding):
    assert prebuild.main() == 0
    manifest = prebuilt.read_manifest(tmp_path / "gpu")
    assert manifest["sources"] == prebuilt.sources_hash()
    assert (manifest["python"], manifest["torch"]) == ("3.12", "2.11.0+cu130")
    assert manifest["native"] == "built"


def test_programs_that_do_not_build_do_not_lose_the_module(tmp_path, prebuilding):
    prebuilding.setattr(prebuild, "build_native", lambda _: "failed (1)")
    assert prebuild.main() == 1
    assert prebuilt.read_manifest(tmp_path / "gpu")["native"] == "failed (1)"


def test_a_module_that_does_not_work_has_no_manifest(tmp_path, prebuilding):
    def refuse(*_):
        raise SystemExit("the module does not work")

    assert prebuild.main() == 0
    prebuilding.setattr(prebuild, "check_module", refuse)
    with pytest.raises(SystemExit, match="does not work"):
        prebuild.main()
    assert prebuilt.read_manifest(tmp_path / "gpu") is None


def test_too_much_to_carry_is_an_error(prebuilding):
    prebuilding.setattr(prebuild, "MOST_MIB", 0.5)
    with pytest.raises(SystemExit, match="too much to carry"):
        prebuild.main()


def before(tmp_path, **statuses):
    path = tmp_path / "before.json"
    lines = {
        "kernel paths": [{"path": "a", "status": "ok"}, {"path": "b", "status": "hung"},
                         {"path": "c", "status": "ok", "other_way": "steps"}],
        "test_gpu.py": [{"test": "t::a", "status": "passed"}, {"test": "t::b", "status": "failed"}],
        "other tests": [{"test": "o::a", "status": "passed"}, {"test": "o::b", "status": "begun"}],
    }  # fmt: skip
    found = [{"name": name, "status": status, "jobs": [{"lines": lines.get(name, [])}]}
             for name, status in statuses.items()]  # fmt: skip
    path.write_text(json.dumps({"stages": found}))
    return path


def test_a_second_call_repeats_what_failed(tmp_path):
    results = before(tmp_path, **{
        "environment": "passed", "kernel paths": "failed (1)", "native checks": "passed",
        "test_gpu.py": "failed (1)", "microbenchmarks": "passed",
        "compute-sanitizer": "cut off after 60 s", "ncu": "passed", "other tests": "failed (1)",
    })  # fmt: skip
    plan = {stage.name: stage for stage in stages.Stages("cuda", tmp_path, results).plan()}
    plan.pop("build", None)
    assert list(plan) == ["environment", "kernel paths", "test_gpu.py", "compute-sanitizer",
                          "variants", "benchmark", "other tests"]  # fmt: skip
    command = plan["test_gpu.py"].jobs[0].command
    assert "t::b" in command
    assert "t::a" not in command
    assert paths.were_right(results) == {"a"}
    command = plan["other tests"].jobs[0].command
    assert "o::b" in command
    assert not any("ignore" in part for part in command)


def test_a_file_of_tests_that_was_cut_off_is_repeated_whole(tmp_path):
    results = before(tmp_path, **{"test_gpu.py": "cut off after 40 s"})
    plan = {stage.name: stage for stage in stages.Stages("cuda", tmp_path, results).plan()}
    assert "tests/test_gpu.py" in plan["test_gpu.py"].jobs[0].command
    assert {"kernel paths", "ncu", "microbenchmarks"} <= set(plan)


def test_the_plan_fits_its_time(tmp_path):
    plan = stages.Stages("cuda", tmp_path).plan()
    assert sum(s.seconds for s in plan if s.name not in ("build", "other tests")) < check.SECONDS
    assert all(Path(job.command[1]).exists() for s in plan for job in s.jobs
               if job.command[0] == sys.executable and job.command[1] != "-m")  # fmt: skip


def test_results_are_kept_by_the_cards_name(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "RESULTS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "results.json").write_text(json.dumps({"card": None, "stages": []}))
    with pytest.raises(SystemExit, match="nothing ran on a GPU"):
        check.commit_results(tmp_path)
    results = {"card": "NVIDIA H100 80GB HBM3", "stages": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "cuda.json").write_text("{}")
    (tmp_path / "table.txt").write_text("a table")
    check.commit_results(tmp_path)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "cuda_h100_80gb_hbm3.json", "gpu_check_h100_80gb_hbm3.txt",
    }  # fmt: skip


def test_the_fakes_are_all_in_the_plan():
    assert set(fakes.FAKES) <= {stage.name for stage in fakes.stages(1)}
    assert list(DRY_RUN) == [stage.name for stage in fakes.stages(1)]


@pytest.mark.packaging  # minutes
@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check itself")
def test_all_that_can_be_tried_without_a_gpu(tmp_path):
    run = Run(tmp_path / "out", "--device", "cpu")
    code, said = run.finish()
    found = {stage["name"]: stage for stage in run.results()["stages"]}
    passed = ["environment", "kernel paths", "benchmark", "other tests"]
    assert {name: stage["status"] for name, stage in found.items()} == {
        name: "passed" if name in passed else "needs a GPU" for name in found
    }, said
    assert set(passed) < set(found)
    paths = table.latest(table.json_lines(found["kernel paths"]), "path")
    assert len(paths) > 60
    assert {path["status"] for path in paths} == {"ok"}
    assert code == 0
    assert len(list(run.out.iterdir())) <= 8
    assert len(said.split("\nGPU check on", 1)[1]) < 12_000
    assert run.left() == []
