# Every target makes its own virtual environment where none is there. Overridable: PYTHON, VENV, CPU, CMAKE_ARGS, TORCH, TORCH_INDEX.
#   make demo      install, pull the embedded model's base, convert, verify, ask, measure
#   make chat      the clinic's terminal program
#   make test      everything that CI runs
#   make demo CPU=native                                         for this machine's processor: faster, not to be carried elsewhere
#   CMAKE_ARGS="-DGGML_CUDA=ON -DGGML_NATIVE=OFF" make demo      on a GPU

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

# How llama-cpp-python is built. Portable at first: no instructions of the building machine alone. `make … CPU=native`: for this machine's
# processor, faster and not to be carried elsewhere. Where neither CPU nor CMAKE_ARGS is given, what is installed stays. pip's cache does
# not know CMAKE_ARGS, so a build with other ones goes past it, and a change of them installs anew. A CPU in the environment is
# something else: some systems name the processor there.
PORTABLE = -DGGML_NATIVE=OFF
ifneq ($(filter command% override,$(origin CPU)),)
ifeq ($(CPU),native)
WANTED := $(shell $(PYTHON) runtimes/native.py)
else ifeq ($(CPU),portable)
WANTED := $(PORTABLE)
endif
ifeq ($(strip $(WANTED)),)
$(error Expected CPU=portable or, on Linux, CPU=native; found CPU=$(CPU))
endif
ifdef CMAKE_ARGS
$(error Expected CPU or CMAKE_ARGS, found both: add what `$(PYTHON) runtimes/native.py` prints to CMAKE_ARGS)
endif
CMAKE_ARGS := $(WANTED)
endif
ifeq ($(strip $(CMAKE_ARGS)),)
override CMAKE_ARGS := $(strip $(shell cat $(VENV)/.cmake-args 2>/dev/null))
endif
ifeq ($(CMAKE_ARGS),)
override CMAKE_ARGS := $(PORTABLE)
endif
export CMAKE_ARGS
BUILD_OPTIONS = $(if $(filter-out $(PORTABLE),$(CMAKE_ARGS)),--no-cache-dir)

# PyTorch's own index has CPU builds; it is asked only where it answers, otherwise the usual indexes are.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

METADATA = pyproject.toml setup.py

.PHONY: demo chat test pytest lint docs docs-check bench clean FORCE

demo: $(VENV)/.stamp-base
	$(BIN)/edgemed models pull edgemed-demo
	$(BIN)/edgemed demo

chat: $(VENV)/.stamp-clinic
	$(BIN)/edgemed models pull edgemed-demo
	$(BIN)/edgemed chat

test: pytest lint docs-check

pytest: $(VENV)/.stamp-test
	$(BIN)/python -m pytest

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-base
	$(BIN)/python -m edgemed.cli.docs

docs-check: $(VENV)/.stamp-test
	$(BIN)/python -m edgemed.cli.docs --check

bench: $(VENV)/.stamp-base
	$(BIN)/edgemed models pull edgemed-demo
	$(BIN)/edgemed bench --device cpu

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cmake-wanted: FORCE | $(BIN)/python
	@printf '%s\n' "$$CMAKE_ARGS" | cmp -s - $@ || printf '%s\n' "$$CMAKE_ARGS" > $@

# .cmake-args is what the installed build was made with, so it is written once the build has succeeded.
$(VENV)/.stamp-base: $(METADATA) $(VENV)/.cmake-wanted | $(BIN)/python
	@cmp -s $(VENV)/.cmake-wanted $(VENV)/.cmake-args || test ! -e $(VENV)/.cmake-args || $(PIP) uninstall -y llama-cpp-python
	$(PIP) install $(BUILD_OPTIONS) -e .
	@cp $(VENV)/.cmake-wanted $(VENV)/.cmake-args
	@touch $@

$(VENV)/.stamp-clinic: $(METADATA) $(VENV)/.stamp-base
	$(PIP) install -e '.[clinic]'
	@touch $@

$(VENV)/.stamp-torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  $(BIN)/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)' $(TORCH_INDEX) 2>/dev/null && \
	  $(PIP) install --extra-index-url $(TORCH_INDEX) '$(TORCH)'; } || $(PIP) install '$(TORCH)'
	@touch $@

$(VENV)/.stamp-test: $(METADATA) $(VENV)/.stamp-torch $(VENV)/.stamp-base
	$(PIP) install -e '.[dev,train,plots,clinic,judge]'
	@touch $@
