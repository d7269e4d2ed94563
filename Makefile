# Every target works in its own virtual environment, .venv; nothing is installed anywhere else.
# PYTHON=python3.12 chooses an interpreter for a new .venv, PYTEST_ARGS="-k loader" selects tests.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all lint format audit bench clean

PYTHON ?= python3
PYTEST_ARGS ?=
# Tests start processes of their own, so more workers than cores only slow each other down.
TEST_WORKERS ?= 2
export DEMO_DIR ?= runs/demo
# Relative, because pip splits the value at spaces; make's working directory is the repository.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OP := $(VENV)/.op-
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: $(INSTALLED)  ## create .venv with everything in it

demo: $(INSTALLED)  ## run the stages from nothing on two CPU ranks; results in DEMO_DIR
	$(BIN)/python samples/demo.py

test: $(INSTALLED) $(OP)cpu_adam  ## run the tests
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(INSTALLED) $(OP)cpu_adam $(OP)async_io  ## run the slow tests
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: $(INSTALLED) $(OP)cpu_adam $(OP)async_io  ## run all tests
	$(PYTEST) $(PYTEST_ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pip-audit lives apart: what it needs itself is no part of the lock.
audit: $(INSTALLED)  ## look for known vulnerabilities in the versions of constraints.txt
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && \
	    PIP_CONSTRAINT= $(VENV)/audit/bin/pip install --quiet 'pip-audit>=2.9,<3'; } || \
	    echo "pip-audit cannot be installed here" >&2
	$(BIN)/python tests/audit_dependencies.py $(VENV)/audit/bin/pip-audit

bench: $(INSTALLED)  ## measure; every script's last line is JSON
	@set -e; for script in benchmarks/*.py; do \
	    echo "== $$script"; $(BIN)/python "$$script"; \
	done

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: its build (CPU or CUDA) is pip's choice by the machine's own settings, and
# everything after it must accept that one.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) cannot create virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

# One build before the tests, which would otherwise wait for each other's; a minute or more each.
$(OP)%: tests/build_ops.py $(INSTALLED)
	@echo "building DeepSpeed's $* into $(VENV)"
	@$(BIN)/python $< $* && touch $@ || echo "the tests that need $* are skipped" >&2
