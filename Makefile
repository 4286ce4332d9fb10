# `make` lists the targets. All of them install what they need first, into .venv (audit: build/audit), from the package index pip is set to.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-s3 test-machines test-versions chaos check audit bench

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(INSTALLED) ## .venv with masklake and everything that develops it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"masklake needs Python 3.11 or later; $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv: 7 GB with PyTorch's GPU libraries, some minutes the first time …"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## makes a small lake of rendered scenes, labels it, scores the labels
	@$(BIN)/masklake demo

test: setup ## the quick suite
	@$(BIN)/python -m pytest -q

test-slow: setup ## the tests that take longest: ONNX, GPU kernels in an interpreter, whole detectors
	@$(BIN)/python -m pytest -q -m "slow and not s3 and not chaos"

test-s3: setup ## the tests against Ceph RGW, a real S3 server
	@$(BIN)/python -m pytest -q -m s3

test-machines: setup ## labelling, and what the manifests start, over machines in network namespaces; wants root
	@$(BIN)/python -m pytest -q -m chaos tests/chaos/test_manifests_run.py \
	    tests/chaos/test_separate_machines.py::test_labelling_goes_on_when_machines_are_cut_off_lose_power_and_come

# make test-versions ROWS='lowest-3.11 pinned-3.12' takes these rows of its matrix.
ROWS ?=
test-versions: setup ## part of the quick suite against other versions: environments of 7 GB, an hour
	@$(BIN)/python tests/versions.py $(ROWS)

# make chaos SEED=41 SCHEDULES=1 ONLY=random_schedules plays one schedule of kills again.
SEED ?= 1
SCHEDULES ?= 60
ONLY ?=
chaos: setup ## kills processes, breaks storage, fills disks, and judges the table; an hour
	@MASKLAKE_CHAOS_SEED=$(SEED) MASKLAKE_CHAOS_SCHEDULES=$(SCHEDULES) $(BIN)/python -m pytest -q -s -m chaos -k '$(ONLY)'

check: setup ## lint, format, types, import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

AUDITOR := build/audit/bin
audit: ## looks the pinned versions up for known weaknesses; needs the way to PyPI's own service
	@test -x $(AUDITOR)/pip-audit || { $(PYTHON) -m venv build/audit && \
	    $(AUDITOR)/python -m pip install -qq --disable-pip-version-check 'pip-audit>=2.10,<3'; }
	@$(AUDITOR)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

bench: setup ## every benchmark, both sides and the ratio; half an hour on two cores
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done
