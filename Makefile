# `make demo` and `make test` work from a clean clone: they set up .venv by themselves.

.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

EXTRAS := client,dev,docs,export,heic,kernels,openvino,package,ray,report,serve,tensorrt-rtx
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The first interpreter that really runs and has a version we support (a pyenv shim may exist and not run).
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	if $$p -c "$(SUPPORTED)" >/dev/null 2>&1; then echo $$p; break; fi; done)

# The tests start some hundred processes, and each would compile every module anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test check evidence lint docs real-model bench-peers bench-serve clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## export, verify, predict and measure a real model and a ViT-B/16
	$(BIN)/python examples/demo.py

# Three processes on two cores: slow tests wait for other processes and for sockets.
test: $(READY) lint  ## lint, types, import contracts, the test suite, that benchmarks run (all but make evidence)
	$(BIN)/pytest -n 3 --dist worksteal -m "not gpu"
	$(BIN)/pytest benchmarks --quick -q

check: $(READY) lint  ## the quick loop: the same without the slow tests
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu and not slow" -q

evidence: $(READY)  ## the kernels' long checks (planted faults, registers and spills) again, whatever is recorded
	$(BIN)/pytest -n 2 -m "not gpu" --evidence run tests/kernels/test_planted_faults.py tests/kernels/test_resources.py

lint: $(READY)  ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## build the documentation as a site, in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

real-model: $(READY)  ## DINOv2-small's weights and two tasks for it, in build/real (two or three minutes the first time)
	$(BIN)/python -m benchmarks.real_model

bench-peers: $(READY)  ## measure against other tools, for the documents' tables (more than half an hour, on a quiet machine)
	$(BIN)/python -m benchmarks.peers.run
	$(BIN)/python -m benchmarks.peers.table --write

bench-serve: $(READY)  ## measure the server under load, beside the raw session and other servers (on a quiet machine)
	$(BIN)/python -m benchmarks.serving.run
	$(BIN)/python -m benchmarks.serving.table --write

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-peers-* $(VENV)-triton-* $(VENV)-kserve build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "no Python 3.11 or 3.12 found: install one, or say which: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c "$(SUPPORTED)"; then \
		echo "$(PYTHON) does not run, or is not Python 3.11 or 3.12" >&2; exit 1; fi
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV)
	@echo "installing vitdeploy[$(EXTRAS)] into $(VENV) (minutes the first time)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@
