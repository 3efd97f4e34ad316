# Five verbs, the same on a laptop and in CI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/generic/*.h csrc/isa/*.cpp csrc/isa/*.h)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/generic/*.h csrc/isa/*.cpp csrc/isa/*.h)

.PHONY: demo test lint format bench docs clean

demo: $(VENV)/.installed  ## install, then show the main job on the embedded model
	$(BIN)/gossamer demo

test: $(VENV)/.dev  ## install with the development extras, then lint and run the fast tests
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.installed  ## this machine's limits, then the embedded model against them
	$(BIN)/gossamer probe
	$(BIN)/gossamer bench latency gossamer/pocket --quantization int4 --input-len 256 --output-len 128 --batch-size 1
	$(BIN)/gossamer bench throughput gossamer/pocket --quantization int4 --num-prompts 64

docs: $(VENV)/.installed  ## write the pages of docs/ that are made from the code
	$(BIN)/python tools/docs.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.installed $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Editable: Python changes need no reinstall, native ones are rebuilt by these rules.
$(VENV)/.installed: $(NATIVE) | $(VENV)/bin/python
	@echo "installing into $(VENV): compiling the kernels takes a minute or two the first time"
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(NATIVE) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
