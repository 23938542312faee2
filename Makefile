# One command each: `make demo`, `make test`. Everything lives in .venv, made on first use.
# Tests run in as many processes as JOBS says: make test JOBS=8
# Another torch build than the default: make PIP_TORCH_ARGS="--index-url URL" demo   (see README)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_TORCH_ARGS ?=
JOBS ?= 2
EXTRAS := export,cpu
DEV_EXTRAS := $(EXTRAS),rtx,dev
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadfile  # what a file's tests share is made once

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.installed
	$(BIN)/nemotron-export demo

test: lint
	$(PYTEST) -m "not slow and not foreign"

test-all: $(VENV)/.installed-dev
	$(PYTEST) -m "slow or foreign"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

# Installed once; again when what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install -q -c constraints.txt --no-deps $(PIP_TORCH_ARGS) torch
	$(BIN)/pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

# What tests need beyond that: TensorRT-RTX builds engines without a GPU.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[$(DEV_EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
