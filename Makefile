# make run    builds, installs and runs the demonstration on real images
# make test   builds, installs and runs all tests
#
# Both set up everything that is missing, under .venv, and nothing twice. To choose:
#   TORCH=2.14.1                     the torch version (torchvision follows)
#   PYTHON=python3.12                the interpreter behind .venv
#   TORCH_CUDA_ARCH_LIST="8.0 9.0a"  the GPU architectures
#   INCEPTION_EXT_CUDA=0             no CUDA kernels
#   INCEPTION_EXT_EMULATOR=0         no emulator of the CUDA kernels, and so not its tests
#   TESTS="-k max_pool"              arguments of pytest

SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c

TORCH ?= 2.13.0
PYTHON ?= python3
TESTS ?=
VENV ?= .venv
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a
INCEPTION_EXT_EMULATOR ?= auto

# torchvision 0.28 belongs to torch 2.13, and so on.
TORCHVISION = 0.$(shell expr $(word 2,$(subst ., ,$(TORCH))) + 15).*
BIN = $(VENV)/bin
# --no-compile: Python compiles what it imports, a small part of what is installed.
PIP = $(BIN)/python -m pip --disable-pip-version-check install --no-compile
SOURCES = $(shell find csrc -type f) setup.py
WORKERS = $(shell nproc)

.PHONY: run test demo info build lint format clean
run: demo

demo: build
	$(BIN)/python -m inception_ext demo

info: build
	$(BIN)/python -m inception_ext info

test: build
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

build: $(VENV)/.built

$(VENV)/.torch-$(TORCH):
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet torch==$(TORCH)
	$(PIP) --quiet "setuptools>=77" wheel build ninja numpy pybind11
	$(PIP) --quiet --no-deps "torchvision==$(TORCHVISION)"
	rm -f $(VENV)/.torch-* $(VENV)/.built
	touch $@

$(VENV)/.built: $(VENV)/.torch-$(TORCH) pyproject.toml $(SOURCES)
	@mkdir -p build
	@INCEPTION_EXT_EMULATOR=$(INCEPTION_EXT_EMULATOR) $(PIP) --verbose --no-build-isolation --editable ".[demo,test]" 2>&1 | tee build/install.log \
	  | { grep -E "^ *(inception_ext:|\[[0-9]+/[0-9]+\])" || true; } \
	  || { grep -vE "^ *(adding|copying|creating|running|writing)" build/install.log | tail -n 60; exit 1; }
	@INCEPTION_EXT_REQUIRE=1 $(BIN)/python -c "import inception_ext"
	touch $@

lint:
	$(PIP) --quiet ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format:
	$(PIP) --quiet ruff clang-format
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist *.egg-info inception_ext/*.so $(VENV)/.built
