"""What was built says so; a build for another torch is refused in one line; the installs work."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import matrix
import pytest
import torch
from built import objects

import lstm_ext

ROOT = Path(__file__).parent.parent


def run(*command, check=True, **kwargs):
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **kwargs
    )
    if check and result.returncode:
        raise AssertionError(f"{command} failed:\n{result.stdout}\n{result.stderr}")
    return result


def test_build_info():
    info = lstm_ext.build_info()
    assert info["version"] == lstm_ext.__version__
    assert info["torch_running"] == torch.__version__
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["openmp"] or not sys.platform.startswith("linux")
    assert info["cpu_instruction_set"] in info["cpu_instruction_sets"].split(",")


def test_info_command():
    result = run(sys.executable, "-m", "lstm_ext", "info")
    for name, value in lstm_ext.build_info().items():
        assert f"{name:22} {value}" in result.stdout


def copy_of_the_package(folder):
    """A copy of the installed package, to spoil."""
    package = folder / "lstm_ext"
    shutil.copytree(Path(lstm_ext.__file__).parent, package, ignore=shutil.ignore_patterns("__py*"))
    return package


def failed_import(folder):
    """The last line of a failed import."""
    # Without the hook of an editable install, which would find what the copy lacks.
    code = (
        "import sys; "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        "import lstm_ext"
    )
    result = run(sys.executable, "-c", code, check=False, cwd=folder)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_import_with_another_torch_names_both_and_the_remedy(tmp_path):
    package = copy_of_the_package(tmp_path)
    (package / "_built_with.py").write_text("TORCH_VERSION = '2.5.1+cpu'\nCUDA_VERSION = None\n")
    line = failed_import(tmp_path)
    assert line.startswith("ImportError: lstm_ext was built against torch 2.5.1+cpu")
    assert f"torch {torch.__version__} is installed" in line
    assert "pip install" in line


def test_import_of_a_module_that_does_not_load(tmp_path):
    package = copy_of_the_package(tmp_path)
    (module,) = package.glob("_C.*so")
    module.write_bytes(b"not a module")
    line = failed_import(tmp_path)
    assert line.startswith("ImportError: lstm_ext was built against torch")
    assert "does not load" in line


def test_import_without_a_build(tmp_path):
    package = copy_of_the_package(tmp_path)
    (package / "_built_with.py").unlink()
    assert failed_import(tmp_path).startswith("ImportError: lstm_ext was not built")


def test_importing_pulls_in_torch_and_nothing_else():
    """No matplotlib, no compiler: the import adds next to nothing to torch's."""
    # torch's counter of operations brings triton, where that is installed.
    code = (
        "import sys, torch, torch.utils.flop_counter; before = set(sys.modules); import lstm_ext; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before}); print(*sys.modules)"
    )
    loaded, everything = map(str.split, run(sys.executable, "-c", code).stdout.splitlines())
    outside = {name for name in loaded if name not in sys.stdlib_module_names}
    assert outside <= {"lstm_ext", "torch"}
    assert "torch._inductor" not in everything


@pytest.mark.skipif(sys.platform != "linux", reason="reads the symbols of an ELF file")
def test_openmp_is_torchs():
    """The module is parallel and names no runtime: it cannot bring a second one."""
    module = lstm_ext._ops._C.__file__
    needed = run("readelf", "--dynamic", module).stdout
    assert "Shared library: [libtorch_cpu.so]" in needed
    assert "omp" not in needed
    assert "GOMP_parallel" in run("nm", "--dynamic", "--undefined-only", module).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads the symbols of an ELF file")
@pytest.mark.parametrize(
    "compiled", ["as built", pytest.param("less optimized", marks=pytest.mark.slow)]
)
def test_newer_instruction_sets_leak_no_shared_functions(compiled, tmp_path):
    """Objects for AVX2 and AVX-512 define their table and nothing else that a linker could share.

    A function that two files emit is kept once: were it the newer set's, older machines would
    meet an illegal instruction.
    """
    for name in ("avx2", "avx512", "avx512bf16"):
        if compiled == "as built":
            (target,) = objects(f"csrc/cpu/kernels_{name}.o")
        else:
            target = tmp_path / f"{name}.o"
            source = ROOT / "csrc" / "cpu" / f"kernels_{name}.cpp"
            compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-fPIC"]
            run(*compiler, "-I", ROOT / "csrc", "-c", source, "-o", target)
        symbols = run("nm", "--extern-only", "--defined-only", "-C", target).stdout.split("\n")
        defined = [line.split(" ", 2)[2] for line in symbols if line]
        assert len(defined) <= 1
        assert all(symbol.startswith("lstm_ext::cpu::kKernelsAVX") for symbol in defined)


# The installs. Each environment sees this one's torch through a path file, so that a second torch
# in it can only come from the build or the install asking for one.


PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where each environment and checkout is, one after the other.

    In the same place the compiler's commands are the same. So it runs for the first test, and for
    the last, which has another setuptools.
    """
    return tmp_path_factory.mktemp("installs")


@pytest.fixture
def environment(place):
    folder = place / "env"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", PURELIB).stdout.strip())
    source = Path(sysconfig.get_path("purelib"))
    for item in source.iterdir():
        if not item.name.startswith(("lstm_ext", "__editable__", "pip", "_virtualenv")):
            target = site / item.name
            if target.is_dir():  # the setuptools that came with the environment
                shutil.rmtree(target)
            if not target.exists():
                target.symlink_to(item)
    return python


@pytest.fixture
def checkout(place):
    """A clean copy of the sources, with nothing built in it but earlier tests' object files."""
    folder, kept = place / "checkout", place / "objects"
    if (folder / "build").exists():
        shutil.rmtree(kept, ignore_errors=True)
        (folder / "build").rename(kept)
        for built in kept.glob("*lib*"):  # modules, and wheels in the making
            shutil.rmtree(built)
    shutil.rmtree(folder, ignore_errors=True)
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = run(*listing, cwd=ROOT).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)  # as old as the objects remember it
    if kept.exists():
        kept.rename(folder / "build")
    return folder


CHECK = (
    "import torch, lstm_ext; assert lstm_ext.LSTMCell(3, 2)(torch.ones(4, 3))[0].shape == (4, 2); "
    "print(torch.__file__, lstm_ext.__file__)"
)


def install(python, *arguments, cwd):
    result = run(python, "-m", "pip", "install", *arguments, cwd=cwd, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Downloading torch-" not in result.stdout
    assert "Collecting torch" not in result.stdout
    return run(python, "-c", CHECK, cwd=python.parent).stdout


@pytest.mark.packaging
def test_wheel_and_incremental_rebuild(environment, checkout):
    wheel = [environment, "-m", "pip", "wheel", "--no-deps", "-v", "-w", "dist", "."]
    first = run(*wheel, cwd=checkout)
    (path,) = (checkout / "dist").glob("lstm_ext-*.whl")
    names = zipfile.ZipFile(path).namelist()
    assert {"lstm_ext/py.typed", "lstm_ext/_C.pyi", "lstm_ext/_built_with.py"} <= set(names)
    assert any(name.startswith("lstm_ext/_C.") and name.endswith(".so") for name in names)
    assert "building for the CPU only" in first.stdout + first.stderr or torch.version.cuda
    install(environment, "--no-deps", path, cwd=checkout)

    # What has not changed is not compiled again; what has, is.
    objects = {p: p.stat().st_mtime_ns for p in (checkout / "build").rglob("*.o")}
    assert objects
    source = checkout / "csrc" / "cpu" / "dispatch.cpp"
    source.write_text(source.read_text() + "\n// touched\n")
    run(*wheel, cwd=checkout)
    changed = [p.name for p, time in objects.items() if p.stat().st_mtime_ns != time]
    assert changed == ["dispatch.o"]


@pytest.mark.packaging
@pytest.mark.parametrize(
    "arguments",
    [
        ["-e", "."],
        ["."],
        ["--no-build-isolation", "--no-deps", "-e", "."],
    ],
    ids=" ".join,
)
def test_install(environment, checkout, arguments):
    where = install(environment, *arguments, cwd=checkout)
    in_checkout = str(checkout) in where
    assert in_checkout == ("-e" in arguments)


@pytest.mark.packaging
@pytest.mark.parametrize("with_torch", [True, False])
def test_build_asks_for_a_torch_only_where_there_is_none(environment, checkout, with_torch):
    site = Path(run(environment, "-c", PURELIB).stdout.strip())
    if not with_torch:
        (site / "torch").unlink()
    for kind in ("wheel", "editable", "sdist"):
        code = f"import build_backend; print(build_backend.get_requires_for_build_{kind}())"
        # Nor is an active environment in sight, which the backend would look into as well.
        variables = {
            k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")
        }
        result = run(environment, "-c", code, cwd=checkout, env=variables)
        assert result.stdout.strip() == ("[]" if with_torch else "['torch>=2.11']")


@pytest.mark.packaging
def test_wheel_for_other_machines(tmp_path):
    """make wheel: named for its torch, without torch's libraries, and works without a compiler."""
    wheel = matrix.build_wheel(Path(sys.executable), ROOT, tmp_path)
    release = ".".join(torch.__version__.split(".")[:2])
    found = matrix.contents(wheel)
    assert found["version"] == f"{lstm_ext.__version__}+torch{release}.cpu"
    assert found["requires"] == [f"torch=={release}.*"]
    assert found["platform"].startswith("manylinux_")
    assert found["libraries"] == []
    checked = matrix.check_wheel(Path(sys.executable), wheel)
    assert checked["doctor"]["build"]["version"] == found["version"]


@pytest.mark.packaging
@pytest.mark.parametrize(
    ("switch", "says"),
    [
        ("0", "building for the CPU only: LSTM_EXT_CUDA=0"),
        ("1", "lstm_ext: LSTM_EXT_CUDA=1, but "),
        ("yes", "LSTM_EXT_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_cuda_switch(checkout, switch, says):
    """Asked for its name only, setup.py has decided about CUDA already."""
    if switch == "1" and torch.version.cuda:
        pytest.skip("this torch can build with CUDA")
    result = run(
        sys.executable, "setup.py", "--name", cwd=checkout, check=False,
        env={**os.environ, "LSTM_EXT_CUDA": switch},
    )  # fmt: skip
    assert says in result.stdout + result.stderr
    assert (result.returncode == 0) == (switch == "0")
