# `make demo` and `make test` are all a newcomer needs; both make the `.venv` on first use.
# Quiet when all is well; one line that starts with "unmask:" when something is missing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
SHM ?= /dev/shm
DISK_GIB ?= 4
SHM_MIB ?= 256
SEED ?=
FRESH ?=
CONFIG ?= configs/demo.yaml
WORKERS ?= 2
TESTS ?= tests

BIN := $(VENV)/bin
PACKAGES := common diffusion models sandbox rewards pretrain rl workers
# Tests share the cores between processes, not between threads of one.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# $(call quietly,name,command): the output is shown only if the command fails.
define quietly
out=$$($(2) 2>&1) || { printf '%s\n' "$$out"; echo "unmask: $(1) failed" >&2; exit 1; }
endef

.PHONY: help setup demo test check format bench clean need-python need-disk need-shm

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(VENV)/.installed $(VENV)/.linked ## the .venv from requirements/cpu.txt (only if it changed)

demo: need-shm setup ## the whole pipeline on this machine; SEED=k, FRESH=1 starts anew
	@HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python -m rl.demo --config $(CONFIG) $(if $(SEED),--seed $(SEED)) $(if $(FRESH),--fresh)

test: need-shm setup ## all tests that this machine can run; TESTS=tests/rl for some
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup $(TESTS)

check: setup ## lint, format, types, layers
	@$(call quietly,ruff check,$(BIN)/ruff check .)
	@$(call quietly,ruff format --check (`make format` mends it),$(BIN)/ruff format --check .)
	@$(call quietly,mypy,$(BIN)/mypy)
	@$(call quietly,lint-imports,$(BIN)/lint-imports --no-logo)

format: setup ## mend what ruff can mend
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

bench: setup ## every benchmarks/*.py, one table each
	@shopt -s nullglob; for file in benchmarks/*.py; do $(BIN)/python "$$file"; done

clean: ## caches and build leftovers; keeps .venv and runs/
	@rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: requirements/cpu.txt | need-python need-disk
	@echo "unmask: installing into $(VENV) (once, some minutes; log: $(VENV)/install.log)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  echo "unmask: $(PYTHON) cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip install --disable-pip-version-check -r requirements/cpu.txt >$(VENV)/install.log 2>&1 || { \
	  grep -iE 'error|no space' $(VENV)/install.log | tail -n 3 >&2 || true; \
	  echo "unmask: installing requirements/cpu.txt failed; the whole story is in $(VENV)/install.log" >&2; exit 2; }
	@touch $@

# The `unmask` command; the packages themselves are found in the checkout.
$(VENV)/.linked: pyproject.toml $(VENV)/.installed
	@$(call quietly,installing the unmask command,$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .)
	@touch $@

need-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "unmask: needs Python 3.11 or newer, but '$(PYTHON)' is $$({ command -v $(PYTHON) >/dev/null && $(PYTHON) --version; } || echo missing); name another: make PYTHON=python3.12 ..." >&2; exit 2; }

need-disk:
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); test "$$free" -ge $(DISK_GIB) || { \
	  echo "unmask: needs $(DISK_GIB) GiB of free disk for $(VENV), but $$PWD has $$free GiB; free some, or put VENV=/elsewhere" >&2; exit 2; }

need-shm:
	@test -d $(SHM) -a -w $(SHM) || { \
	  echo "unmask: no shared memory for Ray: $(SHM) is missing or not writable; in a container, start it with --shm-size=1g" >&2; exit 2; }
	@free=$$(df -Pk $(SHM) | awk 'NR == 2 {print int($$4 / 1024)}'); test "$$free" -ge $(SHM_MIB) || { \
	  echo "unmask: Ray needs $(SHM_MIB) MiB of shared memory, but $(SHM) has $$free MiB free; in a container, start it with --shm-size=1g" >&2; exit 2; }
