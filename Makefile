# Everything from a fresh clone, with Python 3.11 or newer and a package index.
#
#   make quickstart EXTRAS=cuda     jax for NVIDIA GPUs (tpu: for TPUs)
#   make test PYTHON=python3.12     another Python than the first that will do
#   make test JOBS=8                in so many processes, of 1.5 GB each
#   make test PYTEST_ARGS='-k mesh' arguments for pytest

EXTRAS ?=
# As many as there are processors, but no more than fit into memory.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); \
  m=$$(awk '/MemAvailable/ {print int($$2 / 1.5 / 1024 / 1024)}' \
    /proc/meminfo 2>/dev/null || echo 2); \
  test "$$m" -lt "$$n" && n=$$m; test "$$n" -ge 1 && echo $$n || echo 1)
PYTEST_ARGS ?=
WORKDIR ?= runs/quickstart

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
# A file's tests stay together, with the runs that they share. They begin by
# name, since by number of tests the longest run would begin last.
PYTEST = $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
  $(PYTEST_ARGS)
comma := ,
# One for each choice of extras, so that asking for another one installs it.
INSTALLED := $(VENV)/.installed-$(or $(EXTRAS),cpu)

# The first Python that is new enough, asked only when there is no environment.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-thorough test-tree-mode \
  test-interop test-browser test-all lint lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 18

install: $(INSTALLED) ## the environment in .venv, with all that is needed

# By sub-words it learns more in the same minutes than by bytes.
quickstart: $(WORKDIR)-bpe.json ## train a small model, evaluate it, draw its curves
	$(RUN) train.py --config=configs/quickstart.py --workdir=$(WORKDIR) \
	  --config.data.tokenizer=$(WORKDIR)-bpe.json
	$(RUN) eval.py --workdir=$(WORKDIR)
	$(RUN) -m moe_jax plots $(WORKDIR)
	@printf '\nThe run is in %s:\n' $(WORKDIR)
	@printf '  %-16s %s\n' \
	  metrics.jsonl 'every logged step and evaluation' \
	  curve.png 'the loss over the steps' \
	  evaluation/ 'the loss of the newest checkpoint on the whole split' \
	  checkpoints/ 'to go on from: make quickstart again resumes' \
	  tensorboard/ 'the same numbers: tensorboard --logdir=$(WORKDIR)'

# Not anew after an install: a run goes on with the vocabulary that it has.
$(WORKDIR)-bpe.json: | $(INSTALLED)
	$(RUN) -m moe_jax tokenizer train --config=configs/quickstart.py \
	  --kind=bpe --size=4096 --output=$@

test: $(INSTALLED) ## the tests, without the slow ones
	$(PYTEST) -m 'not slow'

test-slow: $(INSTALLED) ## the slow tests only
	$(PYTEST) -m 'slow and not thorough'

# One after another, as they print what they measure.
test-thorough: $(INSTALLED) ## more cases of the slow tests: kills, damage ...
	$(RUN) -m pytest $(PYTEST_ARGS) -s -m thorough

# Flax means to make tree mode its default: the models have to be ready.
test-tree-mode: $(INSTALLED) ## the model tests in Flax's other mode
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false \
	  $(PYTEST) -m 'not slow' \
	  $(wildcard tests/model tests/routing tests/experts)

# PyTorch and transformers: Mixtral's layout, and the benchmark against them.
test-interop: ## the tests that need the extra `interop`, which it installs
	$(MAKE) install EXTRAS=interop
	$(PYTEST) tests/interop/test_mixtral.py \
	  tests/interop/test_tokenizer_files.py tests/benchmarks/test_peers.py \
	  tests/benchmarks/test_generation.py

# Reports are drawn by a browser, which is no Python package.
test-browser: ## the tests of reports in Chromium, which it installs
	$(MAKE) install EXTRAS=browser
	command -v chromium || command -v google-chrome || { \
	  sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq chromium; }
	$(RUN) -m pytest $(PYTEST_ARGS) tests/analysis/test_report_browser.py

test-all: lint test test-slow test-thorough test-tree-mode test-interop \
  test-browser ## all

lint: $(INSTALLED) ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) -m mypy

# Of Linux on x86-64 and the oldest Python, on which the tests run.
lock: $(INSTALLED) ## requirements.lock: the versions to install, with hashes
	$(RUN) -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	$(RUN) -m uv pip compile requirements.txt --output-file requirements.lock \
	  --generate-hashes --no-emit-index-url --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 \
	  --custom-compile-command 'make lock'

clean: ## remove the environment and all caches, but no runs
	rm -rf $(VENV) build .cache .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Only again when what it reads has changed.
$(INSTALLED): requirements.txt pyproject.toml
	@$(RUN) -m pip --version >/dev/null 2>&1 || { \
	  test -n '$(PYTHON)' && $(PYTHON) -c \
	    'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'error: Python 3.11 or newer is needed; name one:' \
	      'make $(MAKECMDGOALS) PYTHON=/path/to/python3.12' >&2; exit 1; }; \
	  echo '$(PYTHON) -m venv $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'Installing into $(VENV); the first time takes some minutes.'
	$(RUN) -m pip install --quiet --disable-pip-version-check \
	  -e '.[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@
