# Every target sets up .venv by itself; nothing needs to be installed by hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two threads on a busy machine stall small operations.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint bench faults clean

demo: $(READY)
	$(BIN)/medssl demo

test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check medssl tests benchmarks
	$(BIN)/ruff format --check medssl tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(READY)
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(ONE_THREAD) $(BIN)/python $$script || exit 1; done

faults: $(READY)
	MEDSSL_FAULTS=full $(ONE_THREAD) $(BIN)/python -m pytest -m faults

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
