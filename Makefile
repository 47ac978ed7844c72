# Every target sets up what it needs in .venv, from a bare Python 3.10 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-tensorflow test-wheel lint bench clean

demo: .venv/train.stamp  ## train, evaluate and predict on scikit-learn's digits; leaves runs/demo
	$(BIN)/cvt demo --output runs/demo

# The longest part first; two of them at a time.
test: .venv/dev.stamp  ## every test that needs no GPU and no network; Keras' on every backend
	$(MAKE) --jobs 2 --output-sync test-torch test-tensorflow test-gpu_kernels \
	  $(addprefix test-keras-,jax tensorflow torch)

test-torch: .venv/dev.stamp
	$(BIN)/pytest --ignore tests/keras --ignore tests/tensorflow --ignore tests/gpu_kernels

test-tensorflow test-gpu_kernels: test-%: .venv/dev.stamp
	$(BIN)/pytest tests/$*

test-keras-%: .venv/dev.stamp
	KERAS_BACKEND=$* $(BIN)/pytest tests/keras

test-wheel:  ## build and install the wheel outside the checkout, and run the README's commands there
	$(PYTHON) tests/wheel/check.py

lint: .venv/dev.stamp  ## ruff, mypy and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/train.stamp  ## the training step beside transformers'; leaves benchmarks/results/*.csv
	$(BIN)/python benchmarks/training.py

clean:  ## remove what the targets above made, but never runs/
	rm -rf .venv build dist

# One stamp an extra: the environment is made again only when the dependencies change.
.venv/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
