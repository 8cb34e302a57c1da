# Two commands for people: `make demo` and `make test`. Both set up .venv by themselves.
# `make test-all` is what must pass before a change lands: what is marked slow, too.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CUDA_READY := $(VENV)/.ready-cuda

JOBS ?= 2
# without a restart, or a worker that dies is not named: xdist waits for what it had left
PYTEST := $(BIN)/python -m pytest --strict-skips -n $(JOBS) --max-worker-restart 0

.PHONY: demo test test-all test-triton check check-newest cuda c-runtime setup clean

demo: setup
	$(BIN)/python examples/demo.py demo

test: setup
	$(PYTEST) -m "not slow"

test-all: setup $(CUDA_READY)
	$(PYTEST)

# The Triton of a wheel, which needs an environment with numpy<2.
test-triton: .triton/.ready
	QSM_TRITON_WHEEL=$$(echo .triton/nvidia_pytriton-*.whl) .triton/bin/python -m pytest \
		--confcutdir tests/export/triton tests/export/triton/test_server.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything at its newest, in an environment of its own. Where the tests pass with it the versions are
# written down, for all platforms and with the hashes of PyPI's files, and looked up among the
# advisories. PyTorch stays that of TORCH: its files are those of an index for each kind of GPU.
check-newest:
	rm -rf .newest && $(PYTHON) -m venv .newest/tools
	.newest/tools/bin/python -m pip install --quiet uv
	echo torch > .newest/excluded
	echo hatchling | .newest/tools/bin/uv pip compile --quiet --no-config --universal \
		--python-version 3.11 --fork-strategy fewest --default-index https://pypi.org/simple --generate-hashes \
		--no-annotate --custom-compile-command "make check-newest" --excludes .newest/excluded \
		$(patsubst %,--extra %,cluster dicom export figure mask openvino serve) pyproject.toml - \
		--output-file .newest/requirements.lock
	(echo "# What is in requirements.lock, for pip -c; make check-newest writes both" && echo "$(TORCH)" && \
		sed '/^#/d; /--hash/d; s/ \\$$//' .newest/requirements.lock) > .newest/constraints.txt
	PIP_CONSTRAINT=$(CURDIR)/.newest/constraints.txt $(MAKE) test-all VENV=.newest/venv
	cp .newest/requirements.lock .newest/constraints.txt .
	.newest/tools/bin/uv tool run pip-audit --strict --disable-pip --require-hashes -r requirements.lock

# Needs no GPU to build; run on an H100 so far.
cuda: setup $(CUDA_READY)
	$(BIN)/python -m qsm_deploy.kernels.cuda_build

# libqsm_runtime.so for C hosts; see docs/c-abi.md.
c-runtime: setup
	$(BIN)/python -m qsm_deploy.runtime.c.build

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[export,openvino,figure,mask,dicom,cluster]" --group dev
	touch $@

$(CUDA_READY): $(READY)
	$(BIN)/python -m pip install --quiet --group cuda
	touch $@

.triton/.ready: pyproject.toml
	$(PYTHON) -m venv .triton
	.triton/bin/python -m pip install --quiet 'numpy<2' --editable '.[openvino]' \
		'tritonclient[http,grpc]' pytest
	.triton/bin/python -m pip download --quiet --no-deps --dest .triton nvidia-pytriton==0.7.0
	touch $@

clean:
	rm -rf $(VENV) .triton .newest demo kernels/build runtime/c/build
