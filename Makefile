VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.memplan-installed
# Without an NVIDIA driver the pinned release is asked for: its CPU build does all that the tests and the demo need.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs setup

help:
	@echo "make demo   fit and train a small language model inside a memory budget (about 4 minutes on 2 cores)"
	@echo "make test   run the tests (under 10 minutes on 2 cores)"
	@echo "make test-slow   run those that train for minutes or start several processes"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the pages into build/site"

demo: setup
	$(BIN)/python examples/01_autofit.py

# One thread a worker: two workers with two threads each would fight over the cores. Whole files, since tests of one file
# share what they have planned.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -c "import importlib.metadata; importlib.metadata.version('torch')" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[dev]'
	touch $@
