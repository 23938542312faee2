# One command each: `make demo`, `make test`. Everything lives in .venv, made on first use.
# Another torch build than the default: make PIP_TORCH_ARGS="--index-url URL" demo   (see README)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_TORCH_ARGS ?=
EXTRAS := export,cpu
DEV_EXTRAS := $(EXTRAS),rtx,dev

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.installed
	$(BIN)/nemotron-export demo

test: lint
	$(BIN)/pytest -m "not slow and not foreign"

test-all: $(VENV)/.installed-dev
	$(BIN)/pytest -m "slow or foreign"

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
