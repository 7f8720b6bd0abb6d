# `make demo` and `make test` work on a fresh machine with Python ≥ 3.11 and make: each installs what it needs.
# The newest Python that is here and known to work; `make PYTHON=… …` takes another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that run the tests; each starts a Ray of its own.
WORKERS ?= 2

.PHONY: help install demo test check format clean

help:
	@echo "make install   environment in $(VENV), with the versions the tests ran with"
	@echo "make demo      the whole road on handwritten digits: table, report.html (minutes, on 2 cores)"
	@echo "make test      all tests"
	@echo "make check     ruff and mypy"
	@echo "make format    let ruff mend what it can"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv and ensurepip found. Install one (on Debian: python3 python3-venv), or give it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/tmkd demo

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info build
