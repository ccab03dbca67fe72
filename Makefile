# Two commands on a fresh machine: `make train` and `make test`. Needs Python >= 3.10, make and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXPERIMENT ?= quickstart
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow lint format clean

help:  ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Make .venv and install the project with its tools (skipped when nothing changed)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; use make PYTHON=/path/to/newer/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: install  ## Train the quickstart within its budget (EXPERIMENT=... for another)
	$(BIN)/python train.py +experiment=$(EXPERIMENT)

test: install  ## Run the tests but the slow ones (WORKERS=n processes)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: install  ## Run the slow tests
	$(BIN)/python -m pytest -m slow

lint: install  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install  ## Fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache
