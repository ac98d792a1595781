# Two commands do all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test bench bench-slow check lint types layers install clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "Python 3.10 to 3.13 is needed, found %d.%d: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# The main job on the bundled model; prints where the report is.
demo: install
	$(BIN)/tl-looped demo --out demo-report

# One thread a worker: the models are small, and two workers fill two cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# Ratios of times, as a table on the screen and in BENCHMARKS.md. On an idle machine only.
bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/benchmarks -m 'not slow' --table BENCHMARKS.md --section Quick

# Loads a checkpoint of 2.9 GB, which it writes into the temporary folder first.
bench-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/benchmarks -m slow --table BENCHMARKS.md --section Slow

check: lint types layers

lint: install
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo-report
