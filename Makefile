# The two commands to know: `make demo` and `make test`. Both make .venv on first use and reuse it afterwards.
#
#   PYTHON=python3.12 make test     another interpreter for .venv
#   BBFAST_CUDA=0 make demo         without the CUDA half, even where nvcc is (see README.md)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt
# What the extension and the metadata are made of: a change to one of them installs anew.
BUILT_FROM := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-thorough lint bench kernels traffic gpu gpu-quick clean

demo: $(VENV)/.demo-installed
	$(VENV)/bin/bbfast demo

test: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not thorough" -n 2 --dist worksteal $(PYTEST_ARGS)

# What takes minutes of compiling: wheels and installations, more kernels, several processes.
test-thorough: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "thorough and not slow" -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Models and ops on this machine, and a report of them under benchmarks/results.
bench: $(VENV)/.dev-installed
	$(RUN) -m bbfast.benchmarks.run $(BENCH_ARGS)

# Compiles kernels for GPUs that need not be here, which Triton's interpreter would prevent. `make kernels ARCH=90` takes
# one architecture instead of three; Triton's cache makes the second time quick.
ARCH ?= 80 90 100
kernels: $(VENV)/.dev-installed
	env -u TRITON_INTERPRET $(RUN) -m bbfast.benchmarks.kernels --arch $(ARCH) --check

# Plans whole models for an H100 that need not be here: minutes of one core for each. `MODE=train` plans training.
MODE ?= infer
traffic: $(VENV)/.dev-installed
	env -u TRITON_INTERPRET $(RUN) -m bbfast.benchmarks.traffic --mode $(MODE)

# For a machine that has a GPU, torch and pytest, and perhaps no network: builds into build/gpu with the system's
# Python, installs nothing, tests and measures for 10 (quick: 3) minutes, and leaves its results under benchmarks/results.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

gpu-quick:
	$(PYTHON) benchmarks/gpu.py --quick $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks bbfast/_C.*.so
	find bbfast triton_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: building against the installed one, without isolation, saves downloading it a second time.
$(VENV)/.build-tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision setuptools wheel ninja pybind11
	touch $@

$(VENV)/.demo-installed: $(VENV)/.build-tools $(BUILT_FROM)
	$(PIP) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.dev-installed: $(VENV)/.build-tools $(BUILT_FROM)
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@
