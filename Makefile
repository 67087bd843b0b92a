# Chores of the project. `make help` lists them.
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-more demo test lint types rooms proto proto-check tests test-lowest test-vm coverage interop bench fuzz soak clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## system packages and .venv; does nothing when all is there
	@scripts/setup.sh

setup-more: ## setup, and tpm2-pkcs11 with its broker for the tests of a second HSM module
	@scripts/setup.sh --more

demo: setup ## from a bare machine to a workload's SVID, narrated (KEEP=1 leaves it running)
	@$(PY) -m spire_hw_sim demo $(if $(KEEP),--keep)

test: setup lint types rooms proto-check tests ## everything CI checks

lint: setup ## ruff: rules and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: setup ## mypy --strict
	@$(PY) -m mypy spire_hw plugins/spire_hw_plugins server/spire_hw_server server/spire_hw_signer agent/spire_hw_agent sim/spire_hw_sim

rooms: setup ## who may import whom
	@.venv/bin/lint-imports

proto: setup ## generate spire_hw/_pb from proto/
	@scripts/proto.sh

proto-check: setup ## fail when spire_hw/_pb is not what proto/ says
	@scripts/proto.sh --check

tests: setup ## the tests alone (ARGS="-k name" narrows them)
	@$(PY) -m pytest -n 3 --dist loadgroup $(ARGS)

test-lowest: setup ## the tests with the lowest releases of libraries that pyproject.toml admits
	@scripts/lowest.sh $(ARGS)

test-vm: setup ## a virtual machine with real firmware and a TPM attests (needs qemu; some minutes)
	@scripts/vm-image.sh
	@SPIRE_HW_VM_IMAGE=$(CURDIR)/build/vm $(PY) -m pytest tests/vm $(ARGS)

coverage: setup ## tests with line coverage; fails when a room of the security core is below 90 %
	@$(PY) -m pytest -n 3 --dist loadgroup --cov --cov-report= --cov-report=json:build/coverage.json $(ARGS)
	@$(PY) scripts/coverage_floor.py build/coverage.json

interop: setup ## upstream's programs and clients with ours, where they are at hand; writes build/interop.json
	@$(PY) -m tests.interop $(ARGS)

bench: setup ## speed, as ratios; writes build/bench.json
	@$(PY) -m tests.bench

fuzz: setup ## parsers of what nodes send, coverage-guided, a minute each (ARGS="--seconds 600 ima_list"); needs atheris
	@$(PY) -m tests.fuzz $(ARGS)

soak: setup ## each hostile case 10,000 times, what is left behind by case; hours (SPIRE_HW_SOAK=500, ARGS="--known" goes on, ARGS="98 150")
	@$(PY) -m tests.soak $(ARGS)

clean: ## remove what was built, not .venv
	@rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage*
