# Every target sets itself up in .venv; only Python (3.11 or newer) is needed beforehand.
#
#   make edit    edit a sample photograph with the default model          out/sample.jpg -> out/sample.edited.jpg
#                and an object in a drawn scene                           out/scene.png -> out/scene.edited.png
#   make test    the tests                                                make test-slow for the slow ones as well
#   make lint    ruff and mypy
#   make bench   measure edits and conversion, and write benchmarks/results/
#
# A try of your own: make edit INSTRUCTION="make it night" SEED=3

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

INSTRUCTION ?= make it black and white
SCENE_INSTRUCTION ?= make the red circle blue
SEED ?= 0
OUT := out
VECTORS ?=
# Processes of one thread each, see tests/conftest.py.
IN_PARALLEL := --numprocesses logical --maxprocesses 4

.PHONY: help edit test test-slow lint format bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# torch goes in first and alone, so that nothing else chooses a build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python %d.%d is too old; pass PYTHON=python3.11 or newer" % sys.version_info[:2])'
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[sample]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[sample,dev]"
	@touch $@

edit: $(VENV)/.installed
	@mkdir -p $(OUT)
	$(BIN)/python docs/sample.py photo $(OUT)/sample.jpg
	$(BIN)/varedit edit $(OUT)/sample.jpg "$(INSTRUCTION)" --output $(OUT)/sample.edited.jpg --seed $(SEED) --overwrite
	$(BIN)/python docs/sample.py compare $(OUT)/sample.jpg $(OUT)/sample.edited.jpg $(OUT)/before_after.jpg
	$(BIN)/python docs/sample.py scene $(OUT)/scene.png
	$(BIN)/varedit edit $(OUT)/scene.png "$(SCENE_INSTRUCTION)" --output $(OUT)/scene.edited.png --seed $(SEED) --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev
ifeq ($(VECTORS),)
	@echo "parity is left out: it needs recorded vectors of the released system (VECTORS=FOLDER)"
else
	$(BIN)/python benchmarks/parity.py --vectors $(VECTORS) --output benchmarks/results/parity.md
endif
	$(BIN)/python benchmarks/convert_memory.py
	$(BIN)/python benchmarks/edit.py --model varedit/models/tiny --size 128 --dtype float32 --repeats 31 --output benchmarks/results/edit_tiny_128.md
	$(BIN)/python benchmarks/edit.py --preset 2b-512 --size 256 --output benchmarks/results/edit_2b_256.md

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache
