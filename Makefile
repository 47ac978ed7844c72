# Every target sets up what it needs in .venv, from a bare Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: browser demo test test-tensorflow test-notebooks test-oldest test-wheel notebooks lint bench gpu docs docs-en docs-zh docs-examples docs-demo clean

demo: $(VENV)/train.stamp  ## train, evaluate and predict on scikit-learn's digits; leaves runs/demo
	$(BIN)/cvt demo --output runs/demo

# Keras, TensorFlow, Triton's interpreter and notebooks need processes of their own.
APART := keras tensorflow gpu_kernels notebooks

test: $(VENV)/dev.stamp  ## every test that needs no GPU and no network; Keras' on every backend
	$(MAKE) test-torch
	$(MAKE) --jobs $(JOBS) --output-sync test-tensorflow test-keras-jax test-keras-tensorflow \
	  test-keras-torch test-gpu_kernels test-notebooks

test-torch: $(VENV)/dev.stamp
	$(BIN)/pytest tests $(APART:%=--ignore tests/%) --numprocesses $(JOBS) --dist loadfile

test-tensorflow test-gpu_kernels test-notebooks: test-%: $(VENV)/dev.stamp
	$(BIN)/pytest tests/$*

test-keras-%: $(VENV)/dev.stamp
	KERAS_BACKEND=$* $(BIN)/pytest tests/keras

test-wheel:  ## build and install the wheel outside the checkout, and run the README's commands there
	$(PYTHON) tests/wheel/check.py

test-oldest:  ## the tests of `make test` with the oldest Python and libraries that are supported
	mkdir -p .venv-oldest
	$(PYTHON) tests/oldest_versions.py > .venv-oldest/constraints.txt
	PIP_CONSTRAINT=.venv-oldest/constraints.txt $(MAKE) test VENV=.venv-oldest

# Without them, the tests in the browser are skipped by name.
browser: $(VENV)/export.stamp  ## Chromium and ONNX Runtime Web for the tests of pages, if they can be had
	.ci/browser.sh
	-$(BIN)/python -c 'from cvt.export.web import runtime_folder; runtime_folder()'

notebooks: $(VENV)/dev.stamp  ## run every notebook from a clean kernel; their files stay as they are
	$(BIN)/python notebooks/execute.py --check --jobs $(JOBS)

lint: $(VENV)/dev.stamp  ## ruff, mypy and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/train.stamp  ## the training step beside transformers'; leaves benchmarks/results/*.csv
	$(BIN)/python benchmarks/training.py

# In its own environment, or with BIN=/path/bin in one that exists, in which nothing is installed.
# A GPU may be there for ten minutes only: each step has a limit, and the least important is last.
DEVICE ?= cuda
BUDGET ?= 300
ifeq ($(origin BIN),command line)
GPU_BIN := $(BIN)
else
GPU_BIN := .venv-gpu/bin
gpu: .venv-gpu/gpu.stamp
endif
GPU_PYTHON = PYTHONPATH=src $(GPU_BIN)/python
GPU_TESTS = $(GPU_PYTHON) -m pytest --timeout 100 --continue-on-collection-errors
GPU_TABLE = $(GPU_PYTHON) benchmarks/gpu.py --device $(DEVICE) --budget $(BUDGET) \
  $(if $(QUICK),--quick --results runs/gpu --overwrite) $(OPTIONS)

gpu:  ## test and measure on a CUDA device within ten minutes; DEVICE=cpu QUICK=1 tries it on a CPU
	$(GPU_TABLE) --list
	failed=0; \
	$(GPU_TESTS) --session-timeout 150 -m gpu \
	  $$(grep -rl --include='test_*.py' mark.gpu tests | sort) || failed=1; \
	$(GPU_TABLE) || failed=1; \
	$(if $(QUICK),true,$(GPU_TESTS) --session-timeout 60 tests/gpu_kernels) || failed=1; \
	exit $$failed

# The torch of $(PYTHON) is used where there is one: it fits the machine's driver, and is large.
.venv-gpu/gpu.stamp: pyproject.toml
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv --system-site-packages .venv-gpu
	.venv-gpu/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  > .venv-gpu/constraints.txt 2> /dev/null || true
	.venv-gpu/bin/python -m pip install --quiet --constraint .venv-gpu/constraints.txt \
	  --editable '.[train,export]' pytest pytest-timeout
	touch $@

# Offline, with warnings as errors. The examples of the reference are the same in both languages.
SPHINX = $(BIN)/python -m sphinx -q -W --keep-going -c docs

docs: $(VENV)/docs.stamp  ## the site in English and Chinese; runs the examples of the reference
	$(MAKE) --jobs $(JOBS) --output-sync docs-en docs-zh
	$(MAKE) docs-examples docs-demo
	cp docs/index.html docs/_build/html/
	@echo "open docs/_build/html/index.html"

docs-en docs-zh: docs-%: $(VENV)/docs.stamp
	$(SPHINX) -t $* -d docs/_build/$* docs/$* docs/_build/html/$*

docs-examples: $(VENV)/docs.stamp
	$(SPHINX) -b doctest -t en -d docs/_build/en docs/en docs/_build/examples

# It trains a small model once, and needs npm, or what npm fetched before, for the demo to run.
docs-demo: $(VENV)/docs.stamp
	$(BIN)/python docs/web_demo.py docs/_build/html/demo

clean:  ## remove what the targets above made, but never runs/
	rm -rf .venv .venv-oldest .venv-gpu build dist docs/_build

# One stamp an extra: the environment is made again only when the dependencies change.
$(VENV)/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
