# `make demo` shows what the project does, `make test` proves it; each makes the environment it needs.

# The first interpreter that is new enough and can make environments.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test lint tables install clean

demo: .venv/plain
	$(BIN)/visiontune demo

test: .venv/installed
	$(BIN)/python -m pytest -q -n auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables: .venv/installed
	$(BIN)/python tests/catalogue_tables.py

install: .venv/installed

# What users have. The lower bound keeps pip from preferring an older local torch whose operators the newest torchvision
# does not fit.
.venv/plain: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: install one, or run make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "torch>=2.14" -e .
	@touch $@

# And what tests need besides.
.venv/installed: .venv/plain
	$(BIN)/python -m pip install --quiet "torch>=2.14" -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache
