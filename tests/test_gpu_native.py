"""The torch-free GPU programs of tests/gpu/native, as far as they can be tried without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_tools import NATIVE, ROOT, headers, load
from limits import HUNG
from test_cuda_emu import CHECKS, CSRC, EMULATOR, Builder

native_build = load("build")
run_variants = load("run_variants")

NO_GPU = 77


def run(program, *arguments, **env):
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True, text=True, check=False, timeout=HUNG, env={**os.environ, **env},
    )  # fmt: skip


# ---- The programs themselves.


@pytest.fixture(scope="module")
def programs():
    """Compile them where `make` would: what is there already is not made again."""
    headers()
    names = [check.stem for check in CHECKS]
    names += ["micro", "bench_layer-all_on"]
    out = ROOT / "build" / "gpu" / "native"
    result = run(sys.executable, NATIVE / "build.py", "--out", str(out), "--only", *names)
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: out / name for name in names}


@pytest.mark.slow
def test_programs_say_that_there_is_no_gpu(programs):
    for name, program in programs.items():
        result = run(program, CUDA_VISIBLE_DEVICES="")
        assert result.returncode == NO_GPU, name
        assert result.stdout.startswith("no GPU: "), name


@pytest.mark.slow
def test_programs_explain_themselves(programs):
    for name, program in programs.items():
        result = run(program, "--help")
        assert (result.returncode, "usage: " in result.stdout) == (0, True), name
        assert run(program, "--nonsense").returncode == 2, name


@pytest.mark.slow
def test_programs_are_small(programs):
    # The benchmark is there once a variant. All of them travel to the GPU together, with the module
    # (15.4 MB): 40 MiB in all.
    sizes = {name: program.stat().st_size for name, program in programs.items()}
    benchmark = sizes.pop("bench_layer-all_on")
    assert sum(sizes.values()) + benchmark * len(native_build.variants()) < 26e6


# ---- How they are compiled: with a compiler that only copies.

FAKE_NVCC = """#!/bin/sh
echo "$@" >> "$NVCC_LOG"
case "$*" in *broken*) echo "an error"; exit 1;; esac
for last; do :; done
echo made > "$last"
"""


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """Return a function: how often the compiler has been called since the last time."""
    folder = tmp_path / "bin"
    folder.mkdir()
    nvcc = folder / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NVCC_LOG", str(log))

    def calls():
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return calls


@pytest.fixture
def build_two(tmp_path):
    """Return a folder of two programs' sources, and a function that builds them."""
    (tmp_path / "header.h").write_text("int shared;\n")
    (tmp_path / "both.cu").write_text('#include "header.h"\n')
    (tmp_path / "one.cpp").write_text("int one = SWITCH;\n")
    (tmp_path / "two.cpp").write_text("int two;\n")
    out = tmp_path / "out"

    def build(first="one.cpp"):
        wanted = [
            native_build.Program("one", [tmp_path / first, tmp_path / "both.cu"], ["SWITCH=0"]),
            native_build.Program("two", [tmp_path / "two.cpp", tmp_path / "both.cu"]),
        ]
        return native_build.Builder(out, "90", 2, log=lambda line: None).build(wanted)

    return tmp_path, build


def test_what_has_not_changed_is_not_compiled_again(fake_nvcc, build_two):
    folder, build = build_two
    assert build() == {}
    assert len(fake_nvcc()) == 3 + 2
    assert build() == {}
    assert fake_nvcc() == []
    (folder / "header.h").write_text("int other;\n")
    assert build() == {}
    assert len(fake_nvcc()) == 1 + 2
    (folder / "two.cpp").write_text("int two, three;\n")
    assert build() == {}
    assert len(fake_nvcc()) == 1 + 1


def test_only_sources_that_know_a_macro_get_it(fake_nvcc, build_two):
    _, build = build_two
    assert build() == {}
    with_macro = [line for line in fake_nvcc() if "-DSWITCH=0" in line]
    assert len(with_macro) == 1
    assert "one.cpp" in with_macro[0]


def test_a_program_that_does_not_compile_is_named(fake_nvcc, build_two):
    folder, build = build_two
    (folder / "broken.cpp").write_text("int broken\n")
    wrong = build("broken.cpp")
    assert list(wrong) == ["one"]
    assert "an error" in wrong["one"]
    assert (folder / "out" / "two").exists()


def test_every_variant_is_built_with_its_switches():
    programs = native_build.programs()
    off = [m for m in programs["bench_layer-no_wide_fill"].macros if m.endswith("=0")]
    assert off == ["LSTM_EXT_WIDE_FILL=0"]
    assert len([m for m in programs["bench_layer-all_off"].macros if m.endswith("=0")]) == 8
    assert programs["bench_layer-all_on"].macros == ['VARIANT="all_on"']


# ---- The checks' side of a GPU (on_gpu.h), with a runtime on the host's memory.


@pytest.fixture(scope="module")
def build_host(tmp_path_factory):
    """Return a function that compiles sources for the host with on_gpu.h, and links them."""
    folder = tmp_path_factory.mktemp("host")
    options = ["-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]

    def build(name, sources, objects=()):
        include = [f"-I{CSRC}", f"-I{NATIVE}", f"-I{EMULATOR}", "-isystem", str(headers())]
        program = folder / name
        command = ["g++", *options, *include, *map(str, sources), *objects, "-o", str(program)]
        subprocess.run(command, check=True)
        return program

    return build


@pytest.fixture(scope="module")
def planted(build_host):
    return build_host("planted", [NATIVE / "planted.cpp", NATIVE / "fake_runtime.cpp"])


PLANTED = {
    "nothing": None,
    "before": "4 bytes written before a buffer of 12 bytes",
    "far before": "4 bytes written before a buffer of 12 bytes",
    "after": "4 bytes written after a buffer of 12 bytes",
    "read after": "numbers off by nan",
    "unwritten": "unwritten off by nan",
    "wrong": "numbers off by 0.16",
    "other bits": "not so: the same bits when called again",
    "refused": "not so: it ran",
    "hang": "hangs, cut off",
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_a_check_on_a_gpu_finds(what, planted):
    result = run(planted, what)
    if PLANTED[what] is None:
        assert result.returncode == 0, result.stdout
    else:
        assert result.returncode == (124 if what == "hang" else 1)
        # Also where the buffer does not begin at a multiple of 16 bytes.
        assert result.stdout.count(PLANTED[what]) == (1 if what == "hang" else 2), result.stdout


@pytest.mark.slow
# But for the last, which asks nothing more of the machine than the first.
@pytest.mark.parametrize("check", CHECKS[:-1], ids=lambda check: check.stem)
def test_checks_with_emulated_kernels(check, build_host, tmp_path):
    """All that a GPU would run of a check but the kernels."""
    builder = Builder(tmp_path)
    wanted = native_build.programs()[check.stem].sources
    kernels = [source for source in wanted if source.suffix == ".cu"]
    for kernel in kernels:
        builder.compile_one(kernel, "none")
    objects = [builder.objects[kernel, "none"] for kernel in kernels]
    program = build_host(check.stem, [check, NATIVE / "fake_runtime.cpp"], objects)
    result = run(program, "few")
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(result.stdout.split()[-4]) > 400
    broken = run(program, "few", FAKE_KERNEL_ERROR="1")
    assert broken.returncode == 1
    assert "illegal memory access was encountered; stopped here" in broken.stdout
    assert run(program, FAKE_NO_GPU="1").returncode == NO_GPU


# ---- What goes on after a part that fails.


def test_parts_that_fail_cost_no_other(build_host):
    program = build_host("parts", [NATIVE / "planted_parts.cpp"])
    result = run(program)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "first", "throws: an error", "second", "crashes: ended by Aborted",
        "hangs: ended by Alarm clock", "spoils: ended its process", "last",
    ]  # fmt: skip
    assert run(program, "second").stdout.splitlines() == ["second"]
    assert run(program, NOT_HERE="1").returncode == NO_GPU


# ---- Variants in turns: with shell scripts in their place.

CASE = '"kind": "forward", "dtype": "half", "L": 5, "N": 1, "H": %d'
LINE = f'echo \'{{{CASE}, "us_per_step": %s, "us": 9}}\'\n'


@pytest.fixture
def compare(tmp_path):
    """Return a function that runs run_variants.py on scripts, by their variants' names."""

    def compare(scripts, *options, by=run):
        for name, script in scripts.items():
            program = tmp_path / f"bench_layer-{name}"
            program.write_text("#!/bin/sh\necho " + name + " >> " + f"{tmp_path}/order\n" + script)
            program.chmod(0o755)
        out = tmp_path / "results" / "variants.json"
        command = [NATIVE / "run_variants.py", "--programs", str(tmp_path), "--out", str(out)]
        command += ["--limit", str(HUNG), "--seconds", str(HUNG)]
        result = by(sys.executable, *command, *options)
        ran = tmp_path / "order"
        order = ran.read_text().split() if ran.exists() else []
        return result, json.loads(out.read_text()) if out.exists() else None, order

    return compare


def test_variants_take_turns(compare):
    scripts = {"no_a": LINE % (64, "3.0"), "all_on": LINE % (64, "2.0") + LINE % (128, "4.0")}
    result, written, order = compare(scripts, "--rounds", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert order == ["all_on", "no_a"] * 3
    assert written["failures"] == []
    assert len(written["results"]) == 3 * 3
    first, second = written["summary"]
    assert (first["H"], first["us_per_step"]) == (64, {"all_on": 2.0, "no_a": 3.0})
    assert first["ratio"] == {"all_on": 1.0, "no_a": 1.5}
    assert (second["H"], second["ratio"]) == (128, {"all_on": 1.0})
    assert "forward half L5 N1 H64" in result.stdout
    assert result.stdout.splitlines()[1].split()[-2:] == ["2.000", "1.500"]
    assert result.stdout.splitlines()[2].split()[-2:] == ["4.000", "-"]


class Patient(subprocess.Popen):
    """A process whose limit begins when it says by a file that it hangs; others have none."""

    def communicate(self, input=None, timeout=None):
        if timeout is not None:
            hangs = Path(self.args[0]).parent / "hangs"
            while self.args[0].endswith("hangs") and not hangs.exists():
                time.sleep(0.02)
            timeout = 0.1 if self.args[0].endswith("hangs") else None
        return super().communicate(input, timeout)


def test_variants_that_fail_are_named_and_cost_no_other(compare, monkeypatch, capsys):
    good = LINE % (64, "2.0")
    scripts = {
        "all_on": good,
        "crashes": good + "kill -ABRT $$\n",
        "fails": "echo a reason\nexit 3\n",
        "hangs": good + 'touch "$(dirname "$0")/hangs"\nsleep 600 & sleep 600\n',
        "one_error": good + f'echo \'{{{CASE % 128}, "error": "does not fit"}}\'\n',
        "silent": "exit 0\n",
        "works": LINE % (64, "2.2"),
    }

    def run_here(_python, _script, *arguments):
        monkeypatch.setattr(run_variants.subprocess, "Popen", Patient)
        monkeypatch.setattr(sys, "argv", ["run_variants.py", *arguments])
        return subprocess.CompletedProcess(arguments, run_variants.main(), capsys.readouterr().out)

    options = ("--rounds", "2", "--limit", "1")
    result, written, order = compare(scripts, *options, by=run_here)
    assert result.returncode == 1
    assert {f["variant"]: f["what"] for f in written["failures"]} == {
        "crashes": "ended by SIGABRT",
        "fails": "failed with exit status 3; a reason",
        "hangs": "cut off after 1 s",
        "one_error": "forward half L5 N1 H128: does not fit",
        "silent": "printed no result",
    }
    for failure in written["failures"]:
        assert f"{failure['variant']}: {failure['what']}" in result.stdout
    # What was printed before the end counts; what hung or crashed is not tried again.
    assert written["summary"][0]["ratio"]["hangs"] == 1.0
    assert written["summary"][0]["ratio"]["works"] == pytest.approx(1.1)
    assert (order.count("hangs"), order.count("crashes"), order.count("works")) == (1, 1, 2)


def test_variants_stop_in_time_and_without_a_gpu(compare):
    result, _, order = compare({"all_on": LINE % (64, "2.0")}, "--rounds", "9", "--seconds", "0")
    assert "time was over" in result.stdout
    assert order == []
    result, _, _ = compare({"all_on": "echo no GPU: none; exit 77\n"})
    assert (result.returncode, result.stdout) == (NO_GPU, "no GPU: none\n")


def test_columns_have_names_apart():
    names = [run_variants.short_name(name) for name in native_build.variants()]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 9
