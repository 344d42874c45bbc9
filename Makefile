# Two commands: `make demo` and `make test`. Both set up what they need in .venv first, from any
# Python >= 3.10 and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
OUT ?= build/gpu-check
GPU_VENV ?= .venv-gpu
BIN := $(VENV)/bin
MARK := $(VENV)/.built
SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-packaging test-published cuda-build gpu-prebuild gpu-check bench lint format clean

demo: $(MARK)
	$(BIN)/python -m lstm_ext demo

# Two files at a time: the tests themselves compute on all cores, some of the time.
test: $(MARK)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Builds the package in every way it can be installed, each in an environment of its own.
test-packaging: $(MARK)
	$(BIN)/python -m pytest -m packaging

# On published packages that know nothing of ours.
test-published: $(MARK)
	$(BIN)/python -m pip install -e ".[published]"
	$(BIN)/python -m pytest -m published

# The whole package against a CUDA build of torch, in a clone with an environment of its own (6 GB):
# builds, links, imports, and passes the tests; a GPU is not needed. Some fifteen minutes.
cuda-build:
	rm -rf build/cuda
	git clone --quiet . build/cuda
	LSTM_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0" $(MAKE) -C build/cuda test TORCH="$(CUDA_TORCH)"

# On a machine without a GPU, for one with: build/gpu, to be carried there with the checkout. Makes
# an environment of 5 GB if GPU_VENV has none.
gpu-prebuild:
	$(PYTHON) tests/gpu/prebuild.py --venv "$(GPU_VENV)"

# On a machine with a GPU, by the Python that has its torch, and without a network: six minutes at
# most, a table comes last (docs/gpu.md).
gpu-check:
	$(PYTHON) tests/gpu/check.py --out "$(OUT)"

# On a machine with nothing else to do: it takes about forty minutes.
bench: $(MARK)
	$(BIN)/python benchmarks/bench_cell.py
	$(BIN)/python benchmarks/report.py benchmarks/results/cell.json --png
	$(BIN)/python -m pip install -e ".[bench,published]"
	$(BIN)/python benchmarks/bench_sequence.py
	$(BIN)/python benchmarks/report.py benchmarks/results/sequence.json --png
	$(BIN)/python benchmarks/bench_models.py

lint: $(VENV)/.tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')
	$(BIN)/python tests/cuda_tools.py
	$(BIN)/mypy

format: $(VENV)/.tools
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

clean:
	rm -rf $(VENV) build *.egg-info lstm_ext/_C.*.so lstm_ext/_built_with.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(MARK): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

$(VENV)/.tools: $(MARK) requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
