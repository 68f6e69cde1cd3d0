# `make demo` and `make test` need nothing but Python 3.11 or later, make and network access for pip:
# both build the environment in .venv first. Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
EXTRAS := lint,plot,test
# Of the demo's cross-validation.
FOLDS ?= 3

BIN := .venv/bin
READY := .venv/.ready
# Sphinx and its extensions, which tests do not need.
DOCS_READY := .venv/.docs-ready
# One thread: the tests' matrices are small, and threads that wait for each other take most of the time.
# With SciPy's switch on, scikit-learn skips none of its checks.
PYTEST := OMP_NUM_THREADS=1 SCIPY_ARRAY_API=1 $(BIN)/python -m pytest
WORKERS := --numprocesses=auto --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help venv demo docs bundled-zoo zoos test coverage test-slow test-gpu bench-guard lint format clean

help:
	@echo "make demo       compare the five architectures on the bundled LoRAs: a table and a chart"
	@echo "make docs       build the documentation in docs/_build/html, warnings are errors"
	@echo "make bundled-zoo  train the bundled LoRAs anew"
	@echo "make zoos       train the zoos of the paper's tables, or go on with them"
	@echo "make test       tests and docstring examples"
	@echo "make coverage   the same, and which lines and branches they did not reach"
	@echo "make test-slow  the tests that take longer, which 'make test' leaves out"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make bench-guard  compare times, as ratios, with those recorded"
	@echo "make lint       ruff, format check, mypy"
	@echo "make format     let ruff format the code and mend what it can"
	@echo "make venv       only build the environment in .venv"
	@echo "make clean      remove the environment and caches"

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/plot_compare_architectures.py --folds $(FOLDS)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

# Pages and examples that have not changed are not made again; `make clean` forgets them.
docs: $(DOCS_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -j auto -b html \
		-d docs/_build/doctrees docs docs/_build/html

bundled-zoo: $(READY)
	$(BIN)/python -c "from sklora.datasets._bundle import make_bundle; make_bundle()"

zoos: $(READY)
	$(BIN)/python examples/zoos/train_twins.py

test: $(READY)
	$(PYTEST) $(WORKERS)

# Tracing the branches takes a third of the time more.
coverage: $(READY)
	$(PYTEST) $(WORKERS) --cov

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(READY)
	$(PYTEST) -m gpu

bench-guard: $(READY)
	$(BIN)/python benchmarks/guard.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist *.egg-info \
		docs/_build docs/auto_examples docs/generated
