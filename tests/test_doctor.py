"""python -m lstm_ext doctor: fine where all is well, and each planted fault is named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lstm_ext
from lstm_ext import cli
from lstm_ext.cli import bench, doctor

ROWS = [
    {"module": "LSTM", "mode": "inference", "shape": [1, 2, 3, 4], "ours": 1.0, "torchs": 2.0,
     "ratio": 2.0},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_time(monkeypatch):
    """How fast the machine is while it tests says nothing."""
    monkeypatch.setattr(doctor, "timings", lambda: [dict(row) for row in ROWS])


def asked(capsys, *arguments):
    status = cli.main(["doctor", "--json", *arguments])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["fine"] == (status == 0)
    assert found["fine"] == all(check["status"] != "wrong" for check in found["checks"])
    return found, {check["name"]: check for check in found["checks"]}, captured.err


def test_fine(capsys):
    found, checks, said = asked(capsys)
    assert found["fine"], said
    assert found["build"] == lstm_ext.build_info()
    assert found["speed"] == ROWS
    assert torch.__version__ in checks["lstm_ext"]["says"]
    assert checks["numbers"]["status"] == checks["openmp"]["status"] == "ok"
    assert said.endswith("Nothing is wrong.\n")
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == said


def test_it_times_what_it_says(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_ROUNDS", 1)
    before = torch.get_num_threads()
    rows = doctor.timings()
    assert torch.get_num_threads() == before
    assert [(row["module"], row["mode"]) for row in rows] == [
        (module, mode) for module in ("LSTMCell", "LSTM") for mode in bench.MODES
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["torchs"] / row["ours"])
        assert row["ours"] > 0.1


@pytest.mark.parametrize(
    ("ratio", "load", "status"),
    [(0.4, 0, "wrong"), (0.4, 9, "note"), (0.8, 0, "note"), (1.5, 0, "ok"), (1.5, 9, "ok")],
)
def test_too_slow(capsys, monkeypatch, ratio, load, status):
    monkeypatch.setattr(doctor, "timings", lambda: [*ROWS, {**ROWS[0], "ratio": ratio}])
    monkeypatch.setattr(os, "getloadavg", lambda: (load * doctor.processors(), 0, 0))
    found, checks, _ = asked(capsys)
    assert checks["speed"]["status"] == status
    assert found["fine"] == (status != "wrong")
    assert bool(checks["speed"]["do"]) == (status != "ok")
    assert ("the machine is busy" in checks["speed"]["says"]) == (status == "note" and load > 0)


def off_by_a_little(result):
    return result + 1e-4


@pytest.mark.parametrize("module", [lstm_ext.LSTM, lstm_ext.LSTMCell])
@pytest.mark.parametrize("spoil", [off_by_a_little, lambda h: h * float("nan")])
def test_wrong_numbers(capsys, monkeypatch, module, spoil):
    right = module.forward

    def wrong(self, *arguments):
        first, *rest = right(self, *arguments)
        if isinstance(first, torch.Tensor):
            return spoil(first), *rest
        return first._replace(data=spoil(first.data)), *rest

    monkeypatch.setattr(module, "forward", wrong)
    found, checks, said = asked(capsys)
    assert not found["fine"]
    assert checks["numbers"]["status"] == "wrong"
    what = ("the layer", "packed input") if module is lstm_ext.LSTM else ("the cell",)
    assert all(f"{part} is off by" in checks["numbers"]["says"] for part in what)
    assert "WRONG  numbers" in said


def test_wrong_gradients(capsys, monkeypatch):
    right = lstm_ext.LSTM.forward

    def wrong(self, *arguments):
        output, states = right(self, *arguments)
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda g: 1.001 * g)
        return output, states

    monkeypatch.setattr(lstm_ext.LSTM, "forward", wrong)
    _, checks, _ = asked(capsys)
    assert "a gradient of the layer is off by" in checks["numbers"]["says"]
    assert "the layer is off" not in checks["numbers"]["says"].replace("of the layer", "")


def test_numbers_leave_the_seed_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    assert doctor.numbers().status == "ok"
    assert torch.equal(torch.rand(2), wanted)


def test_switches(capsys, monkeypatch):
    monkeypatch.setenv("LSTM_EXT_VERBOSE", "0")
    monkeypatch.setenv("LSTM_EXT_CUDE", "fused")
    _, checks, _ = asked(capsys)
    assert "LSTM_EXT_VERBOSE=0" in checks["switches"]["says"]
    assert "nothing reads LSTM_EXT_CUDE" in checks["switches"]["says"]
    monkeypatch.delenv("LSTM_EXT_CUDE")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    _, checks, _ = asked(capsys)
    assert checks["switches"]["status"] == "ok"
    assert checks["instruction sets"]["status"] == "note"
    assert "unset ATEN_CPU_CAPABILITY" in checks["instruction sets"]["do"]


def test_kernels_of_an_older_processor(capsys, monkeypatch):
    info = {**lstm_ext.build_info(), "cpu_instruction_set": "DEFAULT",
            "cpu_instruction_sets": "DEFAULT,AVX2"}  # fmt: skip
    monkeypatch.setattr(lstm_ext, "build_info", lambda: info)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(doctor, "_processor_flags", lambda: {"avx2"})
    _, checks, _ = asked(capsys)
    assert checks["instruction sets"]["status"] == "wrong"
    monkeypatch.setattr(doctor, "_processor_flags", lambda: {"sse2"})
    _, checks, _ = asked(capsys)
    assert checks["instruction sets"]["status"] == "ok"


def test_too_many_threads(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "processors", lambda: torch.get_num_threads() - 0.5)
    _, checks, _ = asked(capsys)
    assert checks["threads"]["status"] == "note"
    assert "OMP_NUM_THREADS=" in checks["threads"]["do"]


def test_another_patch_of_torch(capsys, monkeypatch):
    info = {**lstm_ext.build_info(), "torch": ".".join([*torch.__version__.split(".")[:2], "99"])}
    monkeypatch.setattr(lstm_ext, "build_info", lambda: info)
    found, checks, _ = asked(capsys)
    assert checks["lstm_ext"]["status"] == "note"
    assert found["fine"]


def test_built_without_openmp(capsys, monkeypatch):
    monkeypatch.setattr(lstm_ext, "build_info", lambda: {**lstm_ext_info, "openmp": False})
    lstm_ext_info = lstm_ext._info.build_info()
    monkeypatch.setattr(sys, "platform", "linux")
    _, checks, _ = asked(capsys)
    assert checks["openmp"]["status"] == "wrong"


def test_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for built, status in ((None, "note"), ("13.0", "ok"), ("12.6", "wrong")):
        info = {**lstm_ext._info.build_info(), "cuda": built}
        monkeypatch.setattr(lstm_ext, "build_info", lambda info=info: info)
        finding = doctor.gpu()
        assert finding.status == status
        assert bool(finding.do) == (status != "ok")
        assert "a card" in finding.says


# In processes of their own.


# The doctor, without the hook of an editable install, which would find what the copy lacks.
WITHOUT_EDITABLE = (
    "import sys; sys.argv[:] = ['-m', 'doctor']; "
    "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
    "import lstm_ext"
)


def in_process(folder, *arguments, code=None, **variables):
    start = ["-c", code] if code else ["-m", "lstm_ext", "doctor", *arguments]
    environment = {**os.environ, **variables}
    result = subprocess.run(
        [sys.executable, *start], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, which a Python started in its folder takes, to spoil."""
    package = tmp_path / "lstm_ext"
    shutil.copytree(Path(lstm_ext.__file__).parent, package, ignore=shutil.ignore_patterns("__py*"))
    return package


def test_another_torch(copy):
    (copy / "_built_with.py").write_text("TORCH_VERSION = '2.5.1+cpu'\nCUDA_VERSION = None\n")
    status, out, err = in_process(copy.parent)
    assert (status, err) == (1, "")
    assert "WRONG  lstm_ext" in out
    assert "built against torch 2.5.1+cpu" in out
    assert "-> rebuild it in this environment: pip install" in out
    assert "compiler" in out
    status, out, err = in_process(copy.parent, "--json")
    assert (status, err) == (1, "")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["lstm_ext"]["status"] == "wrong"
    assert checks["torch"]["status"] == checks["python"]["status"] == "ok"
    # Any other command fails as every import does.
    status, out, err = in_process(copy.parent, code="import lstm_ext")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("ImportError: lstm_ext was built against torch 2.5.1")


@pytest.mark.slow
def test_wheel_for_another_torch(copy):
    (copy / "_built_with.py").write_text("TORCH_VERSION = '2.5.1+cpu'\nCUDA_VERSION = None\n")
    installed = copy.parent / "lstm_ext-0.7.1+torch2.5.cpu.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lstm_ext\nVersion: 0.7.1+torch2.5.cpu\n"
    )
    release = ".".join(torch.__version__.split(".")[:2])
    for status, out, err in (
        in_process(copy.parent), in_process(copy.parent, code="import lstm_ext")
    ):  # fmt: skip
        assert status == 1
        assert f"pip install --no-deps 'lstm_ext==0.7.1+torch{release}.cpu'" in out + err
        assert "pip install 'torch==2.5.*'" in out + err
    (copy / "_built_with.py").unlink()
    _, out, _ = in_process(copy.parent, code=WITHOUT_EDITABLE)
    assert "--force-reinstall 'lstm_ext==0.7.1+torch2.5.cpu'" in out


def test_broken_switch():
    status, out, _ = in_process(None, LSTM_EXT_CUDA="fast")
    assert status == 1
    assert "LSTM_EXT_CUDA must be one of auto, fused, torch, got 'fast'" in out
    assert "-> unset LSTM_EXT_CUDA" in out


def test_checkout_that_was_not_built(copy):
    for module in copy.glob("_C.*so"):
        module.unlink()
    (copy / "_built_with.py").unlink()
    (copy.parent / "setup.py").touch()
    status, out, _ = in_process(copy.parent, code=WITHOUT_EDITABLE)
    assert status == 1
    assert "is a checkout that was not built, and Python looks there first" in out


def test_no_torch(tmp_path, copy):
    (copy.parent / "torch.py").write_text("raise ImportError('no torch here')\n")
    status, out, _ = in_process(copy.parent)
    assert status == 1
    assert "no torch here" in out
    assert "pip install 'torch>=2.11'" in out


@pytest.mark.slow
def test_without_the_gil():
    code = "import sys; sys.abiflags = 't'; {}import lstm_ext"
    status, _, err = in_process(None, code=code.format(""))
    assert status == 1
    assert "ImportError: lstm_ext is not for a free-threaded Python" in err.splitlines()[-1]
    status, out, _ = in_process(None, code=code.format("sys.argv[:] = ['-m', 'doctor']; "))
    assert status == 1
    assert "free-threaded" in out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_two_runtimes_of_openmp(tmp_path):
    """A second copy under another name, as a package that vendors its own would bring it."""
    use = (
        "import torch, lstm_ext; from lstm_ext.cli import doctor; "
        "lstm_ext.LSTM(64, 64)(torch.randn(20, 30, 64)); "
    )
    show = "print('runtimes', len(doctor.openmp_runtimes()), doctor.openmp().status)"
    status, out, err = in_process(None, code=use + show + "; print(*doctor.openmp_runtimes())")
    assert status == 0, err
    assert out.splitlines()[0] == "runtimes 1 ok"  # torch's own: ours brings none
    runtime = out.splitlines()[1]
    second = tmp_path / "libgomp-4d5e6f.so.1.0.0"
    shutil.copy(runtime, second)
    load = f"import ctypes; ctypes.CDLL({str(second)!r}); "
    status, out, err = in_process(None, code=use + load + show)
    assert (status, out) == (0, "runtimes 2 wrong\n"), err
