# Two commands do all the set-up: `make quickstart` and `make test` create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: test lint format conformance quickstart bench cifar10-study clean

$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The common model tests of transformers, about three minutes. The first run downloads them.
conformance: $(INSTALLED)
	$(BIN)/python tests/conformance/run.py $(CONFORMANCE_OPTIONS)

quickstart: $(INSTALLED)
	$(BIN)/python scripts/quickstart.py --output_dir runs/quickstart

# About 18 minutes on two quiet cores; BENCH_OPTIONS goes to benchmarks/bench.py.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py $(BENCH_OPTIONS)
	$(BIN)/python -m benchmarks.performance

# About two hours of two cores; started again, it continues. STUDY_OPTIONS goes to benchmarks/cifar10_study.py.
cifar10-study: $(INSTALLED)
	$(BIN)/python -m benchmarks.cifar10_study $(STUDY_OPTIONS)
	$(BIN)/python -m benchmarks.study_report

clean:
	rm -rf $(VENV) build dist *.egg-info
