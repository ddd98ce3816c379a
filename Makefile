# What a person types. Every target makes the environment it needs on first use.
#
#   make quickstart   from a folder of text to two exported models and a report, on a CPU
#   make test         the tests, without the long proofs
#   make test-all     the tests with the long proofs
#   make test-gpu     the tests that need a GPU, in the environment that is active
#   make test-next    the tests on Python 3.12 with the newest supported megatron-core, and with
#                     Megatron-Bridge
#   make lint         formatter, linter and type checker
#   make format       let the formatter and the linter change the files
#
# PYTHON, PYTHON_NEXT, PYTHON_GPU, TORCH and WORKERS may be set: make test PYTHON=python3.12 TORCH=torch

PYTHON ?= python3
# A python3.12 on the path may be a stand-in that does not run: ask it.
PYTHON_NEXT ?= $(shell \
    if python3.12 -c '' 2>/dev/null; then echo python3.12; \
    else PYENV_VERSION=3.12 pyenv which python3.12 2>/dev/null || echo python3.12; fi)
TORCH ?= torch==2.13.0
# A container's own: its torch and TransformerEngine fit its GPUs, and pip would replace them.
PYTHON_GPU ?= python3

# What Megatron-Bridge imports on a CPU. It asks for far more, which only GPUs have, so it comes itself
# without what it asks for; it reads no newer transformers.
BRIDGE := "transformers<=5.12.1" accelerate datasets einops omegaconf

# Two files of tests at a time: many tests start ranks of their own. In their order, as the few of
# tests/slurm take longest and are not to be the last. WORKERS= is one after the other.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

VENV := .venv
VENV_NEXT := .venv-next
READY := $(VENV)/.ready
READY_NEXT := $(VENV_NEXT)/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-gpu test-next lint format

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(READY)
	$(VENV)/bin/python tools/launch.py recipes/quickstart/recipe.yaml

test: $(READY)
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not long and not gpu"

test-all: $(READY)
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not gpu"

test-gpu:
	$(PYTHON_GPU) -m pytest -m gpu tests/gpu

test-next: $(READY_NEXT)
	$(VENV_NEXT)/bin/python -m pytest $(WORKERS) -m "not long and not gpu"

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# torch comes first and by its exact version: some machines offer a CPU build of it, while any torch
# that pip chooses by itself is the CUDA build of several GB (it runs on a CPU as well).
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: " + sys.executable + " is Python " + sys.version.split()[0] + ", 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(READY_NEXT): pyproject.toml
	@$(PYTHON_NEXT) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "error: megatron-core 0.19 needs Python 3.12: make test-next PYTHON_NEXT=...")'
	$(PYTHON_NEXT) -m venv $(VENV_NEXT)
	$(VENV_NEXT)/bin/python -m pip install --quiet "$(TORCH)" "megatron-core==0.19.2"
	$(VENV_NEXT)/bin/python -m pip install --quiet --editable ".[dev]" $(BRIDGE)
	$(VENV_NEXT)/bin/python -m pip install --quiet --no-deps "megatron-bridge==0.6.2"
	@touch $@
