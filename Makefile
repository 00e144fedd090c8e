# `make demo` and `make test` do everything on a fresh machine: Python >= 3.11, a C++ compiler, make.
# Settings: PYTHON, VENV, TORCH (what pip is told to install), ORT=cpu|gpu, GRAINS_CUDA=ON|OFF|AUTO,
# CMAKE_CUDA_ARCHITECTURES. `make setup GRAINS_CUDA=OFF` skips the CUDA compile.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# onnxruntime and onnxruntime-gpu share an import name: exactly one is installed.
ORT ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# The oldest onnxruntime that is supported, in a folder of its own for the tests.
ORT_OLDEST := 1.20.1
ORT_OLDEST_DIR := build/onnxruntime-1.20

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test test-gpu lint format bench wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make setup | demo | test | test-gpu | lint | format | bench | wheel | clean"

setup: $(VENV)/.built

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit("grains_ext needs Python >= 3.11, got " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=77' wheel
	touch $@

# torch first and alone: a later resolve must find it satisfied, not fetch another build.
$(VENV)/.torch: $(VENV)/.created
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.dependencies: pyproject.toml $(VENV)/.torch
	$(PIP) cmake ninja pybind11
	$(PIP) --no-build-isolation -e '.[$(ORT),dev]'
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(ORT_OLDEST_DIR)/.installed:
	$(PIP) --no-deps --upgrade --target $(ORT_OLDEST_DIR) onnxruntime==$(ORT_OLDEST)
	touch $@

demo: setup
	$(BIN)/grains demo

test: setup $(ORT_OLDEST_DIR)/.installed
	GRAINS_REQUIRE_ORT_VERSIONS=1 $(BIN)/python -m pytest -m "not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup
	$(BIN)/python -m benchmarks.kernels

wheel: setup
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist demo-output *.egg-info grains_ext/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
