# `make` alone lists the targets. Every one works in a fresh clone.
PYTHON ?= python3
PART ?= train
ARGS ?=
JOBS ?= 2
SECONDS ?= 600
DIR ?= .whl
PYTHON_VERSION ?= 3.12
CUDA_INDEX ?=

VENV := .venv
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
CPP := $(wildcard csrc/*/*.cpp csrc/*.hpp csrc/*/*.hpp)
STUB_CPP := $(wildcard tests/stub_gpu/library/*.cpp tests/stub_gpu/library/*.hpp)
PYBIND_INCLUDES = $(shell $(VENV)/bin/python -m pybind11 --includes)

# DeepSpeed builds its ops at first use and looks for ninja on PATH. Only the setup targets use the user's own PATH,
# because the interpreter inside the environment must not make the environment.
USER_PATH := $(PATH)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# On busy cores, threads that spin while they wait make a step several times slower; on idle cores it costs nothing.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup setup-dev quickstart test test-all bench sanitize fuzz lint format wheels tritons stub-gpu gpu-check clean
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make the environment in .venv (PYTHON=python3.12, TORCH_INDEX=URL)

setup-dev: $(DEV_STAMP)  ## setup plus the packages for tests and lint, which call it themselves

# The scripts of an environment name its path, so `make setup` mends one that was moved.
MOVED := $(shell [ ! -f $(VENV)/bin/activate ] || \
  grep -qF -e "$$(pwd -P)/$(VENV)" -e "$$(readlink -f $(VENV))" $(VENV)/bin/activate || echo yes)

ifneq ($(TORCH_INDEX)$(MOVED),)
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

quickstart: $(STAMP)  ## train and evaluate a small model in ten minutes (ARGS="train.device=cpu")
	@$(VENV)/bin/python -m llm.tools.quickstart $(ARGS)

test: $(DEV_STAMP)  ## the tests that are not slow and need no GPU (JOBS=8 ARGS="-k shards")
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(ARGS)

test-all: $(DEV_STAMP)  ## all tests that need no GPU, the slow ones too
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu" $(ARGS)

bench: $(DEV_STAMP)  ## compare the kernels with other implementations (ARGS="--cases attention --variants 'ours|SDPA'")
	$(VENV)/bin/python -m benchmarks.bench_kernels $(ARGS)

sanitize: $(DEV_STAMP)  ## the tests of csrc/ on builds with memory, undefined-behaviour and thread sanitizers
	@$(VENV)/bin/python tests/sanitize.py

fuzz: $(DEV_STAMP)  ## give damaged files to every reader (SECONDS=600 ARGS="jsonl shard")
	@$(VENV)/bin/python -m tests.fuzz --seconds $(SECONDS) $(ARGS)

lint: $(DEV_STAMP)  ## check the sources with ruff, mypy, clang-format and g++
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(STUB_CPP)
	g++ -std=c++17 -fsyntax-only -fopenmp -Wall -Wextra -Werror $(PYBIND_INCLUDES) $(filter %.cpp,$(CPP))

format: $(DEV_STAMP)  ## format the sources
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP) $(STUB_CPP)

wheels:  ## fetch packages for a host without a package index (DIR=.whl PYTHON_VERSION=3.12 ONLY=missing)
	@"$(PYTHON)" bootstrap.py --wheels "$(DIR)" --python_version "$(PYTHON_VERSION)" --only $(ONLY)

tritons: $(DEV_STAMP)  ## compile and test the kernels with the first and the last version of Triton (0.5 GB each)
	@$(VENV)/bin/python tests/tritons.py $(ARGS)

stub-gpu: $(DEV_STAMP)  ## run the host's part of GPU code on CUDA builds, without a GPU (4.7 GB; ARGS="-k ranks" CUDA_INDEX=URL)
	@CUDA_INDEX="$(CUDA_INDEX)" $(VENV)/bin/python -m tests.stub_gpu $(ARGS)

gpu-check:  ## tests and measurements on a GPU host; needs no environment or package index (PART=day-one|kernels|train|decode|plan)
	@"$(PYTHON)" -m benchmarks.gpu_check $(PART) $(ARGS)

clean:  ## remove what setup and tests made; data/ and artifacts/ stay
	rm -rf $(VENV) build *.egg-info llm/*/*.so kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find llm kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
