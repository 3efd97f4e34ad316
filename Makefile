# The verbs, the same on a laptop and in CI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ASAN := .venv-asan
GPU := .venv-gpu
GPU_NEEDS := torch triton numpy ml_dtypes tokenizers huggingface_hub jinja2 rich typer psutil pip scikit_build_core nanobind
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/generic/*.h csrc/isa/*.cpp csrc/isa/*.h)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/generic/*.h csrc/isa/*.cpp csrc/isa/*.h)

.PHONY: demo test test-asan test-gpu lint format bench bench-kernels docs clean

demo: $(VENV)/.installed  ## install, then show the main job on the embedded model
	$(BIN)/gossamer demo

test: $(VENV)/.dev  ## install with the development extras, then lint and run the fast tests; a GPU's kernels beside
	$(MAKE) --no-print-directory lint
	@mkdir -p build; \
	$(BIN)/pytest -p no:cacheprovider tests/backends/cuda > build/test-cuda.txt 2>&1 & cuda=$$!; \
	trap "kill $$cuda 2>/dev/null" INT TERM; \
	$(BIN)/pytest --ignore=tests/backends/cuda; failed=$$?; \
	wait $$cuda || { failed=1; cat build/test-cuda.txt; }; \
	tail -n 1 build/test-cuda.txt; exit $$failed

test-asan: $(ASAN)/.installed  ## the kernels under the address and undefined-behaviour sanitizers, in a build of their own
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(ASAN)/bin/python -m pytest -p no:cacheprovider -o timeout=1800 tests/numerics tests/exactness

test-gpu: $(GPU)/.installed  ## the GPU backend on a GPU, with what $(PYTHON) has beside torch and Triton; no network
	$(GPU)/bin/python -c "from gossamer.backends.cuda.device import open_device; print(open_device())"
	$(GPU)/bin/python -m pytest -q -p no:cacheprovider -o addopts=--strict-markers \
	  $$($(GPU)/bin/python -c "import xdist; print('-n logical --maxprocesses 12')" 2>/dev/null) \
	  --ignore tests/backends/cuda/test_sm90.py --durations 5 tests/backends/cuda

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

bench-kernels: $(VENV)/.installed  ## every native kernel alone, against limits probed in the same run
	$(BIN)/python -m benchmarks.kernels

# In the environment of test-gpu.
.PHONY: bench-gpu
bench-gpu: $(GPU)/.installed  ## the GPU backend's figures, against this GPU's limits and transformers; BENCH="ROW ..." for some
	$(GPU)/bin/python -m benchmarks.cuda $(BENCH)

docs: $(VENV)/.installed  ## write the pages of docs/ that are made from the code
	$(BIN)/python tools/docs.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(ASAN) $(GPU) $(VENV)/.installed $(VENV)/.dev

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

# Everything but the project itself comes from .venv, whose own (editable) copy a path in a .pth does not bring.
$(ASAN)/.installed: $(NATIVE) | $(VENV)/.dev
	test -x $(ASAN)/bin/python || $(PYTHON) -m venv $(ASAN)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > "$$($(ASAN)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/development.pth"
	$(ASAN)/bin/pip install --quiet --no-deps --editable . --config-settings=build-dir=build/asan \
	  --config-settings=cmake.define.GOSSAMER_SANITIZE=ON
	touch $@

# All but the project comes from the packages of $(PYTHON), which may itself be of a virtual environment: hence a .pth
# rather than --system-site-packages. Built with what is there (scikit-build-core, nanobind, cmake), without network.
$(GPU)/.installed: $(NATIVE)
	test -x $(GPU)/bin/python || $(PYTHON) -m venv --without-pip $(GPU)
	$(PYTHON) -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" \
	  > "$$($(GPU)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/image.pth"
	@$(GPU)/bin/python -c "import importlib.util as u; lacks = [p for p in '$(GPU_NEEDS)'.split() if not u.find_spec(p)]; \
	  lacks and exit('$(PYTHON) lacks ' + ', '.join(lacks) + '; PYTHON=... names one that has them (CONTRIBUTING.md)')"
	$(GPU)/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	touch $@
