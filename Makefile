# Each of these works as the first command in a fresh clone; they need make and Python 3.10 or newer.
#   make demo    build .venv with what the demo needs, run the demo     (DEMO="--fast" hands it options)
#   make test    build .venv for development, check style and types, run every test
#   make lint    style and types alone
#   make bench   measure everything (half an hour), write benchmarks/ and the README's comparison from it
#                (with options only measure and print: BENCH="--quick", BENCH="--help" for the others)
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: help demo test lint bench clean
help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/installed-demo
	$(PY) -m deformconv.cli demo $(DEMO)

test: lint
	$(PY) -m pytest

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/installed-dev
	$(PY) -m deformconv.cli bench $(or $(BENCH),all --json benchmarks/results.json)
	$(if $(BENCH),,$(PY) -m deformconv.bench.readme)

# Running venv again repairs an environment whose making was interrupted before pip was in it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "deformconv needs Python 3.10 or newer, and $(PYTHON) is older: try make PYTHON=python3.12")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'
endef

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(VENV)/installed-demo $@

$(VENV)/installed-demo: pyproject.toml constraints.txt
	$(call install,demo)
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-output
