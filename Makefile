# Two commands: `make demo` and `make test`. Both set up what they need in .venv first, from any
# Python >= 3.10 and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
MARK := $(VENV)/.built
SOURCES := setup.py build_backend.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-packaging test-published bench lint format clean

demo: $(MARK)
	$(BIN)/python -m lstm_ext demo

test: $(MARK)
	$(BIN)/python -m pytest

# Builds the package in every way it can be installed, each in an environment of its own.
test-packaging: $(MARK)
	$(BIN)/python -m pytest -m packaging

# On published packages that know nothing of ours.
test-published: $(MARK)
	$(BIN)/python -m pip install -e ".[published]"
	$(BIN)/python -m pytest -m published

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
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp')
	$(BIN)/mypy

format: $(VENV)/.tools
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp')

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
