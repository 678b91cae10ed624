# Every target makes .venv and installs into it by itself; nothing outside this folder is touched.
# Another interpreter: make test PYTHON=python3.12. More for the command line of pytest: make test ARGS="-k pooling".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

# One thread per process: ranks share the cores, and sums are the same on every machine with the same libraries.
export OMP_NUM_THREADS = 1
export MLFLOW_DISABLE_TELEMETRY = true
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint lint-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## make .venv and install gigamil with the tested versions

# The stamp is as new as the last installation: it is made again only when the declared or the pinned versions change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gigamil needs Python 3.11 or newer; try: make PYTHON=python3.12 install" >&2; exit 4; }
	@echo "installing into $(VENV) (several GB with PyTorch: minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv
	@# Compiled once here: every rank of every run imports torch and DeepSpeed, which takes twice as long from source.
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## slides -> shards -> training on two ranks -> heatmaps, on synthetic slides
	@$(BIN)/gigamil demo $(ARGS)

test: lint-quick ## checks and quick tests (no GPU, no network)
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: lint ## checks and every test
	@$(BIN)/python -m pytest $(ARGS)

lint-quick: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/shellcheck launch/*.sh launch/slurm/*.sh launch/slurm/*.sbatch .ci/run
	@$(BIN)/lint-imports --no-cache >$(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@$(BIN)/mypy

lint: lint-quick ## ruff, formatting, import contracts, mypy, shellcheck
	@$(BIN)/ruff format --quiet --check .

clean: ## remove .venv, caches and build files; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
