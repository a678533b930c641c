# `make` alone lists the targets. Every one works in a fresh clone.
PYTHON ?= python3
PART ?= train
ARGS ?=
JOBS ?= 2

VENV := .venv
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
CPP := $(wildcard csrc/*/*.cpp csrc/*.hpp csrc/*/*.hpp)
PYBIND_INCLUDES = $(shell $(VENV)/bin/python -m pybind11 --includes)

# DeepSpeed builds what it needs at first use and looks for ninja on PATH. Only the setup targets use the user's own PATH:
# the environment must not be made by the interpreter inside it.
USER_PATH := $(PATH)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Threads that wait for each other by spinning make a step on busy cores several times slower; idle cores lose nothing.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup setup-dev quickstart test test-all bench sanitize lint format gpu-check clean
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## the environment in .venv (PYTHON=python3.12, TORCH_INDEX=URL)

setup-dev: $(DEV_STAMP)  ## the same with what tests and lint need; they call it themselves

ifdef TORCH_INDEX
.PHONY: $(STAMP)
endif
$(STAMP): bootstrap.py pyproject.toml setup.py constraints.txt $(CPP)
	@PATH="$(USER_PATH)" command -v "$(PYTHON)" > /dev/null || \
	  { echo "setup: $(PYTHON) is not on PATH: sudo apt install python3 python3-venv python3-dev g++" >&2; exit 1; }
	@PATH="$(USER_PATH)" "$(PYTHON)" bootstrap.py $(if $(TORCH_INDEX),--torch_index "$(TORCH_INDEX)")
	@touch $@

$(DEV_STAMP): $(STAMP)
	@PATH="$(USER_PATH)" "$(PYTHON)" bootstrap.py --dev
	@touch $@

quickstart: $(STAMP)  ## from nothing to a small trained model, in ten minutes (ARGS="train.device=cpu")
	@$(VENV)/bin/python -m llm.tools.quickstart $(ARGS)

test: $(DEV_STAMP)  ## the suite without what is slow or needs a GPU (JOBS=8 ARGS="-k shards")
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(ARGS)

test-all: $(DEV_STAMP)  ## the suite with what is slow
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu" $(ARGS)

bench: $(DEV_STAMP)  ## the kernels against their rivals (ARGS="--cases attention --variants 'ours|SDPA'")
	$(VENV)/bin/python -m benchmarks.bench_kernels $(ARGS)

sanitize: $(DEV_STAMP)  ## the tests of csrc/ on builds that watch memory, undefined behaviour and threads
	@$(VENV)/bin/python tests/sanitize.py

lint: $(DEV_STAMP)  ## ruff, mypy, clang-format: changes nothing
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	g++ -std=c++17 -fsyntax-only -fopenmp -Wall -Wextra -Werror $(PYBIND_INCLUDES) $(filter %.cpp,$(CPP))

format: $(DEV_STAMP)  ## rewrite the sources in the project's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

gpu-check:  ## on a GPU host, without an environment or package index: tests and measurements (PART=kernels|train|decode|plan)
	@"$(PYTHON)" -m benchmarks.gpu_check $(PART) $(ARGS)

clean:  ## remove what setup and tests made; data/ and artifacts/ stay
	rm -rf $(VENV) build *.egg-info llm/*/*.so kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find llm kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
