# Everything runs in .venv, which the first target makes. On another Python: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A plain `pip install torch` takes several GB of CUDA libraries on Linux; this release is installed first, by number.
TORCH ?= torch==2.13.0

.PHONY: demo test check format bench interop clean

demo: $(STAMP)
	$(BIN)/bitwright demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

bench: $(STAMP)
	@echo "see benchmarks/README.md: each script names the model, the texts and the peers' environments that it needs"

interop: $(STAMP)
	BITWRIGHT_INTEROP=1 $(BIN)/python -m pytest tests/interop

$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,interop,llamacpp,report,tasks]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache
