# Each of these works as the first command in a fresh clone; they need make and Python 3.10 or newer.
#   make demo    build .venv with what the demo needs, run the demo     (DEMO="--fast" hands it options)
#   make demo-gluon    build .venv-gluon, train the demo's net in MXNet Gluon   (DEMO="--fast")
#   make test    test-torch, then test-gluon; a part that fails does not stop the next, and all fails at the end
#   make test-torch    build .venv for development, check style and types, run every test but MXNet's
#   make test-gluon    build .venv-gluon, where torch is absent, and run there what needs MXNet or no framework
#   make test-fast    what make test-torch tests but for the slow tests: under a minute, once the kernels are compiled
#   make test-other-kernels    what could differ on another processor, with PyTorch's, MKL's, oneDNN's and OpenBLAS's
#                kernels for an older one (KERNELS="NAME=value ..." sets other variables)
#   make check-serving    what examples/serving/Dockerfile does, without Docker: its steps and its server, in build/serving
#   make docs    build the documentation site in site/, every warning an error; then open site/index.html
#   make lint    style and types alone
#   make bench   measure everything (half an hour), write benchmarks/ and the README's comparison from it
#                (with options only measure and print: BENCH="--quick", BENCH="--base main" beside another commit,
#                BENCH="--help" for the others)
#   make bench-gluon    a training step in Gluon beside MXNet's own
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# MXNet needs NumPy 1.23, which is there for Python 3.10 and 3.11.
GLUON_PYTHON ?= $(shell for python in $(PYTHON) python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)
GLUON_VENV ?= .venv-gluon
GLUON_PY := $(GLUON_VENV)/bin/python
# Beside tests/gluon: what needs no framework.
GLUON_TESTS := tests/gluon tests/convert tests/ops tests/runtime tests/sampling \
	tests/test_dispatch.py tests/test_functional.py tests/test_package.py tests/test_readme.py

# The libraries' plainest kernels, on one thread: sums go in another order than on any processor of today.
# MKL_CBWR is not among them: every value of it makes MKL's bits the same for any strides, which they are not without it.
KERNELS ?= ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott \
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
OTHER_KERNELS_TESTS := tests/torch tests/convert tests/ops/conv/test_portable.py tests/ops/conv/test_portable_torch.py \
	tests/ops/conv/test_reference.py tests/test_functional.py tests/test_examples.py tests/test_readme.py tests/studies

.PHONY: help demo demo-gluon test test-torch run-torch test-gluon test-fast test-other-kernels check-serving docs lint bench bench-gluon clean
help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/installed-demo
	$(PY) -m deformconv.cli demo $(DEMO)

demo-gluon: $(GLUON_VENV)/installed-dev-gluon
	$(GLUON_PY) -m deformconv.cli demo-gluon $(DEMO)

# Every part, also after one that failed.
define parts
	+@failed=; for part in $(1); do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	test -z "$$failed" || { echo "make $@: failed:$$failed" >&2; exit 1; }
endef

test:
	$(call parts,test-torch test-gluon)

test-torch:
	$(call parts,lint run-torch)

run-torch: $(VENV)/installed-dev
	$(PY) -m pytest

test-fast: $(VENV)/installed-dev
	$(PY) -m pytest -m 'not slow'

test-other-kernels: $(VENV)/installed-dev
	env $(KERNELS) $(PY) -m pytest $(OTHER_KERNELS_TESTS)

test-gluon: $(GLUON_VENV)/installed-dev-gluon
	$(GLUON_PY) -m pytest $(GLUON_TESTS)

check-serving:
	rm -rf build/serving
	$(PYTHON) tests/dockerfile.py build/serving

docs: $(VENV)/installed-docs
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --doctree-dir build/doctrees --conf-dir docs/site . site

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/installed-dev
	$(PY) -m deformconv.cli bench $(or $(BENCH),all --json benchmarks/results.json)
	$(if $(BENCH),,$(PY) -m deformconv.bench.readme)

bench-gluon: $(GLUON_VENV)/installed-dev-gluon
	$(GLUON_PY) -m deformconv.bench.gluon

# Running venv again repairs an environment whose making was interrupted before pip was in it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "deformconv needs Python 3.10 or newer, and $(PYTHON) is older: try make PYTHON=python3.12")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'
endef

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(VENV)/installed-demo $@
	@! $(PY) -c 'import sphinx' 2>/dev/null || touch $(VENV)/installed-docs

$(VENV)/installed-demo: pyproject.toml constraints.txt
	$(call install,demo)
	@touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt
	$(call install,docs)
	@touch $@

$(GLUON_VENV)/installed-dev-gluon: pyproject.toml constraints-gluon.txt
	@test -n "$(GLUON_PYTHON)" || { echo 'MXNet needs Python 3.10 or 3.11, and neither is here. Name one, make GLUON_PYTHON=/path/to/python3.11,' \
		'or leave it out: make test-torch runs all other tests.'; exit 1; }
	@$(GLUON_PY) -m pip --version >/dev/null 2>&1 || $(GLUON_PYTHON) -m venv $(GLUON_VENV)
	$(GLUON_PY) -m pip install --disable-pip-version-check --constraint constraints-gluon.txt --editable '.[dev-gluon]'
	@touch $@

clean:
	rm -rf $(VENV) $(GLUON_VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-output
