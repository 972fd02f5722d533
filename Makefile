# Each command sets up what it needs on a machine with nothing but Python, and then runs.
# The second run installs nothing and needs no network.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# Strict, so that mypy sees conjoin.passes. It links to each file: edits count at once, and a file
# added or removed changes this sum, and with it the stamps below, which reinstalls (no network).
LAYOUT := $(shell find src passes -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(LAYOUT)

.NOTPARALLEL:
.PHONY: help demo bench test zoo lint format clean

help:
	@echo 'make demo    train the VAE of examples/vae_digits.py, plain and optimized'
	@echo 'make bench   measure, and write the tables of the README'
	@echo 'make test    the core tests'
	@echo 'make zoo     the tests on public models'
	@echo 'make lint    ruff and mypy'
	@echo 'make format  let ruff format the code'
	@echo 'make clean   remove $(VENV) and what the builds left'

demo: $(READY)-examples
	$(BIN)/python examples/vae_digits.py

bench: $(READY)-bench
	$(BIN)/python -m benchmarks.run --json benchmarks/results/cpu.json $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.memory --json benchmarks/results/memory-cpu.json
	$(BIN)/python -m benchmarks.tables --write

test: $(READY)-test $(READY)-examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 $(PYTEST_ARGS)

zoo: $(READY)-test $(READY)-zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup -m zoo $(PYTEST_ARGS)

lint: $(READY)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/conjoin.egg-info

# torch by itself and first: a tool that asks for any torch must find the pinned one in place.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools
	$(PIP) torch
	touch $@

$(READY)-%: $(VENV)/.torch pyproject.toml
	rm -f $(VENV)/.ready-*-$*
	$(PIP) --no-build-isolation --config-settings editable_mode=strict -e '.[$*]'
	touch $@
