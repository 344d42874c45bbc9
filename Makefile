# Two commands: `make demo` and `make test`. Both set up what they need in .venv first, and no more,
# from any Python >= 3.10 and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
MATRIX ?=
OUT ?= build/gpu-check
GPU_VENV ?= .venv-gpu
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
TESTS := $(VENV)/.tests
SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -type f)

# Two files at a time: the tests themselves compute on all cores, some of the time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SLOW ?= slow

# Where Python may not write down what it compiles, it compiles torch at every start, for seconds
# each time. Here it may, in a folder of the environment.
ifdef PYTHONDONTWRITEBYTECODE
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache
endif

.PHONY: demo test test-slow test-all test-matrix wheel wheels cuda-build gpu-prebuild gpu-check \
	bench bench-options lint format docs clean

demo: $(BUILT)
	$(BIN)/python -m lstm_ext demo

test: $(TESTS)
	$(PYTEST)

# What `make test` leaves out (docs/testing.md): long runs, sanitizers, published packages, and the
# package built and installed in every way, each in an environment of its own.
test-slow: $(VENV)/.published
	$(PYTEST) --durations 25 -m "$(SLOW)"

# Every test there is, each once.
test-all:
	$(MAKE) test
	$(MAKE) test-slow

# In dist/, for machines without a compiler: a wheel for the torch of VENV, or one for each pair of
# the torches and Pythons that are supported; and the tests with each pair (docs/support.md).
wheel: $(BUILT)
	$(BIN)/python tests/matrix.py here

wheels:
	$(PYTHON) tests/matrix.py wheels $(MATRIX)

test-matrix:
	$(PYTHON) tests/matrix.py test $(MATRIX)

# The whole package against a CUDA build of torch, in a clone with an environment of its own (6 GB):
# builds, links, imports, and passes the tests; a GPU is not needed.
cuda-build:
	rm -rf build/cuda
	git clone --quiet . build/cuda
	LSTM_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0" $(MAKE) -C build/cuda test-all \
		TORCH="$(CUDA_TORCH)" SLOW="slow and not packaging"

# On a machine without a GPU, for one with: build/gpu, to be carried there with the checkout. Makes
# an environment of 5 GB if GPU_VENV has none.
gpu-prebuild:
	$(PYTHON) tests/gpu/prebuild.py --venv "$(GPU_VENV)"

# On a machine with a GPU, by the Python that has its torch, and without a network: six minutes at
# most, a table comes last (docs/gpu.md).
gpu-check:
	$(PYTHON) tests/gpu/check.py --out "$(OUT)"

# On a machine with nothing else to do: it takes about forty minutes.
bench: $(TESTS)
	$(BIN)/python benchmarks/bench_cell.py
	$(BIN)/python benchmarks/report.py benchmarks/results/cell.json --png
	$(BIN)/python -m pip install -e ".[bench,published]"
	$(BIN)/python benchmarks/bench_sequence.py
	$(BIN)/python benchmarks/report.py benchmarks/results/sequence.json --png
	$(BIN)/python benchmarks/bench_models.py

# The options that torch's layer lacks or has in its slow path, each with its rows, in one run.
bench-options: $(TESTS)
	$(BIN)/python -m pip install -e ".[published]"
	$(BIN)/python benchmarks/bench_projection.py
	$(BIN)/python benchmarks/bench_states.py
	$(BIN)/python benchmarks/bench_ragged.py
	$(BIN)/python benchmarks/bench_setup.py
	$(BIN)/python benchmarks/tables.py

# The site of the documentation, in build/docs: no warning allowed, every public name has an entry.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	LSTM_EXT_SITE=build/docs $(BIN)/python -m pytest -q tests/test_site.py

lint: $(VENV)/.tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')
	$(BIN)/python tests/cuda_tools.py
	$(BIN)/mypy
	$(BIN)/python tests/commit_subjects.py

format: $(VENV)/.tools
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

clean:
	rm -rf $(VENV) build dist docs/project *.egg-info lstm_ext/_C.*.so lstm_ext/_built_with.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# --no-compile: of torch's thousands of Python files few are ever imported, and those that are get
# compiled then; to compile all of them takes longer than to install torch.
PIP := $(BIN)/python -m pip install --no-compile

$(BUILT): $(BIN)/python $(SOURCES)
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[demo]"
	touch $@

# By the name of the package that is installed already: its extra, and no build.
$(TESTS): $(BUILT)
	$(PIP) "lstm_ext[test]"
	touch $@

$(VENV)/.docs: $(TESTS)
	$(PIP) "lstm_ext[docs]"
	touch $@

# With torch named again: what is built for one release of it must not bring another.
$(VENV)/.published: $(TESTS)
	$(PIP) "$(TORCH)" "lstm_ext[published]"
	touch $@

$(VENV)/.tools: $(BUILT) requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
