# `make demo` and `make test` need Python 3.11, 3.12 or 3.13, make and a package index; nothing else.
# The first of these that runs; a name that exists but does not run, such as a pyenv shim, is passed over.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13; do \
	$$name -c 'import ensurepip, venv' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= config/demo.yaml

.PHONY: demo ui test check bench format clean

demo: $(VENV)/.installed  ## make the demo's pool, run everything on it, print the truth table
	$(BIN)/python -m examples.demo

ui: $(VENV)/.installed  ## open Dagster on http://127.0.0.1:3000
	$(BIN)/clip-select ui $(CONFIG)

test: $(VENV)/.installed  ## run the tests; one process of the three mostly waits for a browser
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

check: $(VENV)/.installed  ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed  ## measure, as ratios within one run
	$(BIN)/python -m benchmarks

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the demo made
	rm -rf .demo

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "No python3.11, python3.12 or python3.13 runs here." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
