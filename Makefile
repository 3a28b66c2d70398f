# No set-up is needed: every target that runs Python creates .venv first and installs what it needs.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed

# Each test process uses one thread (tests/conftest.py). PYTEST_OPTIONS="-n 0 -x -k NAME" overrides the defaults.
# Three on two cores: tests of runs that are killed or cut off spend much of their time waiting.
TEST_PROCESSES ?= 3
PYTEST := -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_OPTIONS)

.PHONY: test test-fast test-oldest lint format build docs conformance quickstart bench cifar10-study clean

$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --editable '.[dev]'
	touch $@

$(OLDEST_INSTALLED): setup.cfg constraints-oldest.txt
	@if $(PYTHON_OLDEST) -c '' 2>/dev/null; then python=$(PYTHON_OLDEST); \
	else python=$(PYTHON); echo "$(PYTHON_OLDEST) is not available: using $(PYTHON)"; fi; \
	test -x $(OLDEST)/bin/python || $$python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --progress-bar off --upgrade pip
	$(OLDEST)/bin/python -m pip install --progress-bar off --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

test: $(INSTALLED)
	$(BIN)/python $(PYTEST)

# Without the tests marked `slow`.
test-fast: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m "not slow"

# The oldest release of every dependency that setup.cfg allows, on the oldest Python where it is available.
test-oldest: $(OLDEST_INSTALLED)
	$(OLDEST)/bin/python $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel and the sdist, in dist/.
build: $(INSTALLED)
	$(BIN)/python -m build

# The documentation with the API reference, as a site in build/site.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --progress-bar off --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict

# The common model tests of transformers, about three minutes. The first run downloads them.
conformance: $(INSTALLED)
	$(BIN)/python tests/conformance/run.py $(CONFORMANCE_OPTIONS)

quickstart: $(INSTALLED)
	$(BIN)/python scripts/quickstart.py --output_dir runs/quickstart

# About 18 minutes on two quiet cores; BENCH_OPTIONS goes to benchmarks/bench.py.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py $(BENCH_OPTIONS)
	$(BIN)/python -m benchmarks.performance

# About two hours on two cores; resumes if interrupted. STUDY_OPTIONS goes to benchmarks/cifar10_study.py.
cifar10-study: $(INSTALLED)
	$(BIN)/python -m benchmarks.cifar10_study $(STUDY_OPTIONS)
	$(BIN)/python -m benchmarks.study_report

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
