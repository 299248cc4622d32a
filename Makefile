# Two commands do all the set-up: `make demo` and `make test`. Both make .venv and build the libraries first, and reuse them after.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check

# Building for CUDA takes minutes and serves only a machine with a GPU; `make cuda` builds it anywhere that has nvcc.
ifeq ($(shell command -v nvidia-smi),)
export FASTGEN_CUDA ?= 0
endif

.PHONY: demo test check test-op types build cuda wheel wheel-matrix triton-matrix bench bench-compare figures machine-code gpu docs lint
.PHONY: format clean

demo: build
	$(RUN) examples/demo.py

# In two processes, as on two cores that takes two thirds of the time. The second run: the Triton backend, in Triton's interpreter,
# every fourth test, since all of them take as long as the first run; INTERPRETED= takes them all. The third: the CUDA kernels' PTX.
INTERPRETED ?= --share 0/4
test: build
	$(RUN) -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(RUN) -m pytest -n 2 --backend triton $(INTERPRETED)
	$(RUN) tests/device_on_ptx.py

# For an edit, in a minute and a half: lint, types, and the tests that neither compile nor start programs.
check: build lint types
	$(RUN) -m pytest -q -n 2 --dist worksteal $(QUICK)

OPS := $(notdir $(patsubst %/,%,$(filter-out csrc/common/,$(wildcard csrc/*/))))
QUICK := $(patsubst %,tests/test_%.py,$(OPS) declared checks rng schedule device_code half_precision models patch source threads)

# All of one op, on every backend that runs here: OP=ddpm_step. The CPU's kernels and eager, the Triton kernels in Triton's
# interpreter and compiled, and the CUDA kernels' PTX on the host.
OF_AN_OP := $(patsubst %,tests/test_%.py,$(OP) declared dispatch compile checks device_code half_precision every_call threads \
	transforms triton_code)
test-op: build
	$(RUN) -m pytest -q -n 2 --dist worksteal --op $(OP) $(OF_AN_OP)
	TRITON_INTERPRET=1 $(RUN) -m pytest -q -n 2 --backend triton --op $(OP) $(INTERPRETED) $(OF_AN_OP)
	$(RUN) tests/device_on_ptx.py --op $(OP) tests/test_$(OP).py tests/test_device_code.py tests/test_half_precision.py

types: $(VENV)/installed
	$(RUN) -m basedpyright

build: $(VENV)/installed
	@$(RUN) setup.py --quiet build_ext --inplace

# The environment, exactly as pinned, and this project in place. --no-build-isolation: build against the torch that is installed.
$(VENV)/installed: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -r requirements/dev.txt
	@$(RUN) setup.py --quiet build_ext --inplace  # before pip, which would not show how far it is, and then finds it done
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

cuda: $(VENV)/installed
	FASTGEN_CUDA=1 $(RUN) setup.py build_ext --inplace

# One wheel with the CPU and CUDA libraries, checked by auditwheel, then installed beside torch in a new environment and tested
# there, away from the sources. FASTGEN_CUDA_ARCHS="8.0" makes it faster and the wheel useless on other GPUs.
wheel: $(VENV)/installed-wheel
	rm -rf dist build/wheel build/lib build/bdist.*
	FASTGEN_CUDA=1 FASTGEN_CUDA_ARCHS="$${FASTGEN_CUDA_ARCHS:-$${TORCH_CUDA_ARCH_LIST:-all}}" $(PIP) wheel \
		--no-build-isolation --no-deps --wheel-dir build/wheel/built .
	PATH="$(abspath $(VENV))/bin:$$PATH" auditwheel repair --plat manylinux_2_28_x86_64 --only-plat \
		--exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/wheel/built/*.whl
	$(VENV)/bin/auditwheel show dist/*.whl  # the symbol versions; its verdict counts torch's libraries, which are excluded above
	ls -l dist/*-py3-none-manylinux_2_28_x86_64.whl
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/dev.txt torch pytest dist/*.whl
	cp -r tests build/wheel/tests
	cd build/wheel && venv/bin/python -I ../../tools/check_wheel.py
	cd build/wheel && venv/bin/python -I -m pytest -q $(addprefix tests/test_,import.py dispatch.py rng.py checks.py)

# That wheel under every torch from 2.10 on; writes the table into docs/versions.md.
wheel-matrix: wheel
	$(RUN) tools/wheel_matrix.py dist/*.whl

# The Triton backend under every supported pair of torch and Triton; writes the table into docs/versions.md.
triton-matrix: build
	$(RUN) tools/triton_matrix.py

$(VENV)/installed-wheel: requirements/wheel.txt $(VENV)/installed
	$(PIP) install -r requirements/wheel.txt
	touch $@

# Ten minutes, then a report with plots in benchmarks/results/<device>.
bench: build
	$(RUN) -m pytest benchmarks --benchmark-only --benchmark-json=build/benchmarks.json
	$(RUN) -m benchmarks.report build/benchmarks.json

# Every report and plot, and the figures of docs/performance.md and README.md, from the committed
# benchmarks/results/*/benchmarks.json; a new one of this device:
#     pytest benchmarks --benchmark-only --benchmark-json=FILE; python -m benchmarks.report FILE
figures: $(VENV)/installed
	$(RUN) -m benchmarks.report --pages

# The kernels of this tree beside those of another revision: BASE=rev, ONLY="ddpm_step-seed", COMPARE_OPTIONS="--seconds 5".
bench-compare: build
	$(RUN) -m benchmarks.compare $(BASE) $(if $(ONLY),--only "$(ONLY)") $(COMPARE_OPTIONS)

# Registers, spills and instructions per element of every kernel, nvcc's and Triton's; needs nvcc, but no GPU, and a tree without
# changes: what is written names its commit. Hence not straight into the tracked file, which would be a change.
machine-code: $(VENV)/installed
	$(RUN) -m tools.machine_code --json benchmarks/results/machine_code.json > build/machine_code.txt
	mv build/machine_code.txt benchmarks/results/machine_code.txt
	cat benchmarks/results/machine_code.txt

# Under ten minutes on a machine with an NVIDIA GPU, with the torch that $(PYTHON) has: no .venv, no network.
# GPU_OPTIONS: "--wheel FILE", "--out DIR", "--minutes M", "--only build,tests,sanitizer,bench".
gpu:
	$(PYTHON) -m benchmarks.gpu_check $(GPU_OPTIONS)

# The site in build/site; a link or a name that leads nowhere is an error (not with --quiet, which counts no warnings). Nothing is
# fetched but, the first time, the tools.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(VENV)/installed-docs: requirements/docs.txt $(VENV)/installed
	$(PIP) install --no-deps -r requirements/docs.txt
	touch $@

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/ptx/*')

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*' 'tests/ptx/*')

clean:
	rm -rf build dist *.egg-info fastgen/*.so
