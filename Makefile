# Every target sets up what it needs: a virtual environment in .venv, filled once.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(shell command -v $(p) 2>/dev/null)))
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
UV = $$(command -v uv || echo $(VENV)/bin/uv)
PORT ?= 30000
APP_PORT ?= 7860

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-gpu test-cluster fuzz docs image-cpu compose-check lint format

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

venv: $(STAMP) ## Create .venv with everything (once)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 12); \
	  sys.exit(0 if ok else f"Python 3.10 to 3.12 is needed, {sys.executable} is {sys.version.split()[0]}; say PYTHON=/path/to/python3.11")'
	@if command -v uv >/dev/null 2>&1; then uv venv -q --allow-existing --python $(PYTHON) $(VENV); \
	  else $(PYTHON) -m venv $(VENV) && $(PY) -m pip install -q --disable-pip-version-check uv; fi
	@echo "Installing SGLang and this package into $(VENV) (8.5 GB; about a minute when packages are cached) ..."
	@$(UV) pip install --compile-bytecode --python $(PY) -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## Serve the demo model with eight adapters, send a mixed batch, open the page
	@$(PY) -m sgl_bdlora.demo --port $(PORT) --app-port $(APP_PORT) $(DEMO)

test: $(STAMP) ## Run the default test suite
	@$(PY) -m pytest -m "not slow and not gpu"

test-all: $(STAMP) ## Run the whole test matrix (about 20 minutes on 2 cores)
	@$(PY) -m pytest -m "not gpu"

test-gpu: $(STAMP) ## Run the kernels', the pinned memory's and the servers' tests on this machine's GPUs
	@$(PY) -m pytest -s tests/kernels tests/unit/test_host_memory.py tests/server/test_gpu.py

fuzz: $(STAMP) ## Try 100,000 made-up adapters and 20,000 made-up requests (about 40 minutes on 2 cores)
	@BDLORA_FUZZ_CASES=100000 BDLORA_FUZZ_REQUESTS=100 $(PY) -m pytest -s -m slow tests/fuzz

docs: $(STAMP) ## Build the API reference into build/api
	@$(UV) pip install -q --python $(PY) -e '.[docs]'
	@$(PY) docs/reference.py

test-cluster: $(STAMP) ## Run the cluster's tests on Ray Serve, two replicas on this machine's CPUs (about 12 minutes)
	@$(UV) pip install -q --python $(PY) -e '.[cluster]'
	@$(PY) -m pytest tests/cluster

image-cpu: ## Build the CPU image with docker (docs/containers.md)
	docker build -f docker/Dockerfile.cpu -t sgl-bdlora:0.1.0-cpu .

compose-check: $(STAMP) ## Check the container files; needs no engine
	@$(PY) -m pytest -q tests/unit/test_containers.py

lint: $(STAMP) ## Check style
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: $(STAMP) ## Fix style
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .
