# Each of these works as the first command in a fresh clone; they need make and Python 3.10 or newer.
#   make demo    build .venv with what the demo needs, run the demo     (DEMO="--fast" hands it options)
#   make demo-gluon    build .venv-gluon, train the demo's net in MXNet Gluon   (DEMO="--fast")
#   make experiment    build .venv with what the experiment needs, train the DCNv2 paper's detectors (an hour and a half on two
#                processors), write benchmarks/detection.* and the figures in docs/detection.md; after Ctrl-C it goes on
#                (with options only train and print: EXPERIMENT="--fast", EXPERIMENT="--help" for the others)
#   make test    test-torch, test-gluon, test-mmdet, then test-jax; a part that fails does not stop the next, and all fails at
#                the end
#   make test-torch    build .venv for development, check style and types, run every test but those of the other three
#   make run-interpreter    the part of make test-torch that runs the GPU kernels without a GPU, in Triton's interpreter
#   make test-gpu    the tests that need a GPU (GPU="-n 8" hands pytest options: that many processes, which compile)
#   make test-gluon    build .venv-gluon, where torch is absent, and run there what needs MXNet or no framework
#   make test-mmdet    build .venv-mmdet, .venv with mmdetection and mmcv-lite besides, and run there what needs them
#   make test-jax    build .venv-jax, .venv with JAX, Flax, Equinox, Keras and TensorFlow besides, and run there what needs them;
#                Keras' tests once with each backend
#   make test-fast    what make test-torch tests but for the slow tests: under a minute, once the kernels are compiled
#   make test-other-kernels    what could differ on another processor, with PyTorch's, MKL's, oneDNN's and OpenBLAS's
#                kernels for an older one (KERNELS="NAME=value ..." sets other variables)
#   make check-serving    what examples/serving/Dockerfile does, without Docker: its steps and its server, in build/serving
#   make docs    build the documentation site in site/, every warning an error; then open site/index.html
#   make test-oldest    with the oldest Python, NumPy and Numba that pyproject.toml allows, in .venv-oldest: what needs no
#                framework; make test-oldest-torch does it with the oldest PyTorch too (2.8 GB to download on Linux)
#   make lint    style and types alone
#   make wheel   build dist/ (wheel and sdist) and check what is inside
#   make test-wheel    install the wheel into clean environments, one for each Python that is here from 3.10 on, and run
#                there what needs no framework (WHEEL_PYTHONS="python3.12 ..." names others)
#   make bench   measure everything (half an hour), write benchmarks/ and the README's comparison from it
#                (with options only measure and print: BENCH="--quick", BENCH="--base main" beside another commit,
#                BENCH="--help" for the others)
#   make bench-gpu    on a machine with a GPU: beside torchvision, deformops and a plain convolution, in nine minutes; writes
#                benchmarks/gpu.* and docs/performance.md's part on it (BENCH="--budget 120" and other options only measure)
#   make bench-gluon    a training step in Gluon and the pooling of boxes beside MXNet's own (a minute), write
#                benchmarks/gluon.json and what docs say of it (with options only measure and print: BENCH="--rounds 2")
#   make bench-jax    JAX's operator beside XLA's dense convolution and NumPy's front end, Keras' layer beside its Conv2D (some
#                minutes), write benchmarks/jax.json and what docs say of it (with options only measure: BENCH="--quick")
PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY := $(VENV)/$(BIN)/python
# MXNet needs NumPy 1.23, which is there for Python 3.10 and 3.11.
GLUON_PYTHON ?= $(shell for python in $(PYTHON) python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)
GLUON_VENV ?= .venv-gluon
GLUON_PY := $(GLUON_VENV)/$(BIN)/python
MMDET_VENV ?= .venv-mmdet
MMDET_PY := $(MMDET_VENV)/$(BIN)/python
JAX_VENV ?= .venv-jax
JAX_PY := $(JAX_VENV)/$(BIN)/python
KERAS_BACKENDS ?= jax tensorflow torch numpy openvino
# What needs no framework, but for some of its tests, which skip themselves.
INSTALLED_TESTS := tests/convert tests/ops tests/runtime tests/sampling \
	tests/test_dispatch.py tests/test_functional.py tests/test_installation.py tests/test_package.py
GLUON_TESTS := tests/gluon $(filter-out tests/test_installation.py,$(INSTALLED_TESTS)) tests/test_readme.py
# What has to do with MXNet, or with the absence of PyTorch. Of the other tests the slow ones are left out, which make test-torch
# runs.
GLUON_SHARED := tests/gluon tests/convert tests/test_functional.py tests/test_package.py tests/test_readme.py
GLUON_ALONE := tests/runtime/test_atomics.py tests/runtime/test_openmp.py tests/runtime/test_threads.py
# What asks for clocks, processor time, signals or a browser, or starts processes for all processors: one at a time. All
# else keeps one processor busy most of the time, and runs two at a time.
ALONE_TESTS := tests/runtime/test_atomics.py tests/runtime/test_openmp.py tests/runtime/test_threads.py \
	tests/cli/test_demo.py tests/cli/test_experiment.py tests/plots/test_browser.py
# Two processes at a time. Each has threads for both processors, which must not spin while the other process has work.
BOTH := OMP_WAIT_POLICY=PASSIVE
TWO := -n 2 --dist worksteal
JAX_TESTS := tests/jax tests/flax tests/equinox tests/convert/test_weights.py tests/bench/test_jax.py
JAX_DOCUMENTS := tests/test_readme.py tests/test_examples.py tests/test_package.py tests/cli/test_main.py
# Without what a user's keras.json says, and without warnings and notes of TensorFlow's own.
KERAS := KERAS_HOME=$(CURDIR)/build/keras TF_CPP_MIN_LOG_LEVEL=3
OLDEST_PYTHON ?= python3.10
OLDEST_VENV ?= .venv-oldest
OLDEST_PY := $(OLDEST_VENV)/$(BIN)/python
WHEEL_VENV ?= .venv-wheel
WHEEL_PY := $(WHEEL_VENV)/$(BIN)/python
# It ends with true because make drops all that a shell printed whose last command was not found.
WHEEL_PYTHONS ?= $(shell for python in python3.10 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c '' 2>/dev/null && echo $$python; done; true)

# The libraries' plainest kernels, on one thread: sums go in another order than on any processor of today.
# MKL_CBWR is not among them: every value of it makes MKL's bits the same for any strides, which they are not without it.
KERNELS ?= ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott \
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Without those of OpenVINO, which by SSE4.1 alone computes its own deformable convolution wrongly, and a document's program
# that runs it.
OTHER_KERNELS_TESTS := tests/torch tests/convert tests/ops/conv/test_portable.py tests/ops/conv/test_portable_torch.py \
	tests/ops/conv/test_reference.py tests/ops/roi_pool/test_portable.py tests/test_functional.py tests/test_examples.py \
	tests/test_readme.py tests/studies -k "not (openvino or beginning)"
# PyTorch 2.4 warns of itself, and cannot do what these tests ask: it maps a registered operator image by image, has no
# Dim.AUTO, and its compiler reads less (one-dimensional lists of dynamic sizes, pairs of padding, a reverse derivative of
# jvp, the text of an error).
OLDEST_TORCH_TESTS := tests/torch -W default -k "not (test_opcheck or test_compile_of_the_function or test_of_a_layers_input \
	or test_export_with_any_batch_and_size or test_export_to_training_and_decomposed or test_compiled_autograd \
	or test_vmap_of_the_registered_operator or test_transforms_within_a_compiled_function)"

# Triton asks for the variable when kernels are defined, so that they are interpreted in a process of their own.
INTERPRETED_TESTS := tests/test_interpreted.py tests/runtime/test_product.py tests/ops/conv/test_gpu.py \
	tests/ops/roi_pool/test_gpu.py tests/ops/attention/test_gpu.py tests/ops/aggregate/test_gpu.py tests/torch/test_gpu.py
GPU_TESTS := tests/runtime/test_product.py tests/ops/conv/test_gpu_cuda.py tests/ops/roi_pool/test_gpu_cuda.py \
	tests/ops/attention/test_gpu_cuda.py tests/ops/aggregate/test_gpu_cuda.py tests/torch/test_gpu_cuda.py tests/plots/test_monitor.py

.PHONY: help demo demo-gluon experiment test test-torch run-torch run-shared run-alone run-interpreter test-gpu test-gluon \
	run-gluon-shared run-gluon-alone test-mmdet test-jax run-jax run-jax-documents run-keras \
	test-fast test-other-kernels test-oldest test-oldest-torch check-serving docs wheel test-wheel lint \
	bench bench-gpu bench-gluon bench-jax clean
help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/installed-demo
	$(PY) -m deformconv.cli demo $(DEMO)

experiment: $(VENV)/installed-experiment
	$(PY) -m deformconv.cli experiment detect $(or $(EXPERIMENT),--seeds 3 --sweep --base-steps 1200 --steps 400 --output build/experiment)
	$(if $(EXPERIMENT),,$(PY) -m deformconv.studies.detection.document build/experiment)

demo-gluon: $(GLUON_VENV)/installed-dev-gluon
	$(GLUON_PY) -m deformconv.cli demo-gluon $(DEMO)

# Every part, also after one that failed.
define parts
	+@failed=; for part in $(1); do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
	test -z "$$failed" || { echo "make $@: failed:$$failed" >&2; exit 1; }
endef

test:
	$(call parts,test-torch test-gluon test-mmdet test-jax)

test-torch:
	$(call parts,lint run-torch run-interpreter)

run-torch:
	$(call parts,run-shared run-alone)

run-shared: $(VENV)/installed-dev
	$(BOTH) $(PY) -m pytest $(TWO) $(addprefix --ignore=,$(ALONE_TESTS))

run-alone: $(VENV)/installed-dev
	$(PY) -m pytest $(ALONE_TESTS)

run-interpreter: $(VENV)/installed-dev
	$(BOTH) TRITON_INTERPRET=1 $(PY) -m pytest -n 2 $(INTERPRETED_TESTS)

test-gpu: $(VENV)/installed-dev
	$(PY) -m pytest -m cuda $(GPU_TESTS) $(GPU)

test-fast: $(VENV)/installed-dev
	$(PY) -m pytest -m 'not slow'

test-other-kernels: $(VENV)/installed-dev
	env $(KERNELS) $(PY) -m pytest $(OTHER_KERNELS_TESTS)

test-gluon:
	$(call parts,run-gluon-shared run-gluon-alone)

run-gluon-shared: $(GLUON_VENV)/installed-dev-gluon
	$(BOTH) $(GLUON_PY) -m pytest $(TWO) $(GLUON_SHARED)
	$(BOTH) $(GLUON_PY) -m pytest $(TWO) -m 'not slow' $(filter-out $(GLUON_SHARED),$(GLUON_TESTS)) $(addprefix --ignore=,$(GLUON_ALONE))

run-gluon-alone: $(GLUON_VENV)/installed-dev-gluon
	$(GLUON_PY) -m pytest $(GLUON_ALONE)

test-mmdet: $(MMDET_VENV)/installed-mmdet
	$(MMDET_PY) -m pytest tests/mmdet

test-jax:
	$(call parts,run-jax run-jax-documents run-keras)

run-jax: $(JAX_VENV)/installed-jax
	$(BOTH) $(KERAS) $(JAX_PY) -m pytest $(TWO) $(wildcard $(JAX_TESTS))

# What these rooms' pages and examples say, and what the package promises of them.
run-jax-documents: $(JAX_VENV)/installed-jax
	$(BOTH) $(KERAS) KERAS_BACKEND=jax $(JAX_PY) -m pytest $(TWO) -k "jax or flax or equinox or keras" $(JAX_DOCUMENTS)

# Keras asks for its backend when it is imported. One that is not there for this Python is named, and left out.
run-keras: $(JAX_VENV)/installed-jax
	@failed=; for backend in $(KERAS_BACKENDS); do \
	$(JAX_PY) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$$backend') is None)" || \
	{ echo "Keras' backend $$backend is left out: it is not installed here."; continue; }; \
	echo "Keras with $$backend"; $(BOTH) $(KERAS) KERAS_BACKEND=$$backend $(JAX_PY) -m pytest $(TWO) tests/keras || failed="$$failed $$backend"; done; \
	test -z "$$failed" || { echo "make $@: failed with$$failed" >&2; exit 1; }

check-serving:
	rm -rf build/serving
	$(PYTHON) tests/dockerfile.py build/serving

docs: $(VENV)/installed-docs
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --doctree-dir build/doctrees --conf-dir docs/site . site

test-oldest: $(OLDEST_VENV)/installed-oldest
	$(OLDEST_PY) -m pytest $(INSTALLED_TESTS)

test-oldest-torch: $(OLDEST_VENV)/installed-oldest-torch
	$(OLDEST_PY) -m pytest $(INSTALLED_TESTS) $(OLDEST_TORCH_TESTS)

# The versions that build are pinned as well, and so not installed by pip for the occasion.
wheel: $(WHEEL_VENV)/installed-wheel
	rm -rf dist
	$(WHEEL_PY) -m build --no-isolation
	$(WHEEL_PY) tools/try_wheel.py dist

test-wheel: wheel
	@test -n "$(WHEEL_PYTHONS)" || { echo 'No python3.10 to python3.14 is on the path. Name one, make WHEEL_PYTHONS=/path/to/python test-wheel.'; exit 1; }
	$(WHEEL_PY) tools/try_wheel.py dist $(addprefix --python=,$(WHEEL_PYTHONS)) --tests $(INSTALLED_TESTS)

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/installed-dev
	$(PY) -m deformconv.cli bench $(or $(BENCH),all --json benchmarks/results.json)
	$(if $(BENCH),,$(PY) -m deformconv.bench.readme)

bench-gpu: $(VENV)/installed-dev
	$(PY) -m deformconv.bench.gpu $(or $(BENCH),--json benchmarks/gpu.json)
	$(if $(BENCH),,$(PY) -m deformconv.bench.gpu_figures)

bench-gluon: $(GLUON_VENV)/installed-dev-gluon
	$(GLUON_PY) -m deformconv.bench.gluon $(or $(BENCH),--write .)

bench-jax: $(JAX_VENV)/installed-jax
	$(KERAS) $(JAX_PY) -m deformconv.bench.jax $(or $(BENCH),--write .)

# Running venv again repairs an environment whose making was interrupted before pip was in it.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "deformconv needs Python 3.10 or newer, and $(PYTHON) is older: try make PYTHON=python3.12")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'
endef

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(VENV)/installed-demo $(VENV)/installed-experiment $@
	@! $(PY) -c 'import sphinx' 2>/dev/null || touch $(VENV)/installed-docs

$(VENV)/installed-demo: pyproject.toml constraints.txt
	$(call install,demo)
	@touch $@

$(VENV)/installed-experiment: pyproject.toml constraints.txt
	$(call install,experiment)
	@touch $(VENV)/installed-demo $@

$(VENV)/installed-docs: pyproject.toml constraints.txt
	$(call install,docs)
	@touch $@

$(GLUON_VENV)/installed-dev-gluon: pyproject.toml constraints-gluon.txt
	@test -n "$(GLUON_PYTHON)" || { echo 'MXNet needs Python 3.10 or 3.11, and neither is here. Name one, make GLUON_PYTHON=/path/to/python3.11,' \
		'or leave it out: make test-torch runs all other tests.'; exit 1; }
	@$(GLUON_PY) -m pip --version >/dev/null 2>&1 || $(GLUON_PYTHON) -m venv $(GLUON_VENV)
	$(GLUON_PY) -m pip install --disable-pip-version-check --constraint constraints-gluon.txt --editable '.[dev-gluon]'
	@touch $@

# An environment on top of .venv, whose packages it sees, PyTorch's gigabytes among them. What it has besides comes without what
# that asks for: OpenCV with windows, as an example.
define install-on-top
	@$(1)/$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv $(1)
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(1)/$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv-below.pth"
	$(1)/$(BIN)/python -m pip install --disable-pip-version-check --no-deps --requirement $(2)
endef

$(MMDET_VENV)/installed-mmdet: $(VENV)/installed-dev constraints-mmdet.txt
	$(call install-on-top,$(MMDET_VENV),constraints-mmdet.txt)
	@touch $@

$(JAX_VENV)/installed-jax: $(VENV)/installed-dev constraints-jax.txt
	$(call install-on-top,$(JAX_VENV),constraints-jax.txt)
	@touch $@

# pyproject.toml asks for the oldest versions, and the constraints name them: pip refuses where the two do not agree.
define install-oldest
	@$(OLDEST_PY) -m pip --version >/dev/null 2>&1 || $(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_PY) -m pip install --disable-pip-version-check --constraint constraints-oldest.txt --editable . \
		hypothesis packaging pytest pyyaml $(1)
endef

$(OLDEST_VENV)/installed-oldest: pyproject.toml constraints-oldest.txt
	$(call install-oldest,)
	@touch $@

$(OLDEST_VENV)/installed-oldest-torch: pyproject.toml constraints-oldest.txt
	$(call install-oldest,torch torchvision)
	@touch $(OLDEST_VENV)/installed-oldest $@

$(WHEEL_VENV)/installed-wheel: constraints.txt
	@$(WHEEL_PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_PY) -m pip install --disable-pip-version-check --constraint constraints.txt build hatchling
	@touch $@

clean:
	rm -rf $(VENV) $(GLUON_VENV) $(MMDET_VENV) $(JAX_VENV) $(OLDEST_VENV) $(WHEEL_VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis demo-output detect-output
