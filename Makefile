# Two commands do all the set-up: `make demo` and `make test`. Both make .venv and build the libraries first, and reuse them after.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# Building for CUDA takes minutes and serves only a machine with a GPU; `make cuda` builds it anywhere that has nvcc.
ifeq ($(shell command -v nvidia-smi),)
export FASTGEN_CUDA ?= 0
endif

.PHONY: demo test build cuda bench gpu lint format clean

demo: build
	$(RUN) examples/demo.py

test: build
	$(RUN) -m pytest

build: $(VENV)/installed
	@$(RUN) setup.py --quiet build_ext --inplace

# The environment, as pinned, and this project in place. --no-build-isolation: build against the torch that is installed.
$(VENV)/installed: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

cuda: $(VENV)/installed
	FASTGEN_CUDA=1 $(RUN) setup.py build_ext --inplace

bench: build
	$(RUN) -m pytest benchmarks --benchmark-only
	$(RUN) -m benchmarks.side_by_side

# Under ten minutes on a machine with an NVIDIA GPU, with the torch that $(PYTHON) has: no .venv, no network.
# GPU_OPTIONS: "--wheel FILE", "--out DIR", "--minutes M", "--only build,tests,sanitizer,bench".
gpu:
	$(PYTHON) -m benchmarks.gpu_check $(GPU_OPTIONS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*')

clean:
	rm -rf build dist *.egg-info fastgen/*.so
