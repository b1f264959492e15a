# Two commands do everything: `make demo` measures the bundled model, `make test` runs the tests.
# Both install what they need into .venv first; outside this folder only caches of compiled code are written.

PYTHON ?= python3
# Which build of PyTorch: `make TORCH="torch --index-url URL"` takes it from the index at URL instead.
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/installed

# What the caller's shell holds must not decide what runs here; tests and demo need no network.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench methods study steps benchmarks tables clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## install slimdit and what its tests need into .venv

demo: $(INSTALLED) ## measure the bundled model and its recipes; a second run repeats nothing finished
	$(BIN)/slimdit bench --out runs/demo --resume

test: lint ## check the code, then run the tests
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED) ## measure what results/demo lacks: the records that the README's table is rendered from
	$(BIN)/slimdit bench --out results/demo --resume

methods: $(INSTALLED) ## measure what results/methods lacks: every other shipped recipe, an hour; some train on Fashion-MNIST
	$(BIN)/slimdit bench slimdit/assets/recipes/compression/*.toml --out results/methods --resume

study: $(INSTALLED) ## measure what results/study lacks: attention, students and experts with their controls, two hours
	$(BIN)/slimdit bench slimdit/assets/recipes/attention/*.toml slimdit/assets/recipes/students/*.toml \
	  slimdit/assets/recipes/experts/*.toml slimdit/assets/recipes/compression/finetune-*.toml \
	  --protocol study --out results/study --resume

steps: $(INSTALLED) ## measure what results/steps lacks: ten steps beside the published 250 of DDPM, half an hour
	$(BIN)/slimdit bench slimdit/assets/recipes/steps/*.toml --protocol published --out results/steps --resume

benchmarks: $(INSTALLED) ## time slimdit's own hot paths into results/benchmarks, an hour on an idle machine
	$(BIN)/python -m benchmarks.record int8 sampling_run historical attention attention_kinds few_rows load_memory startup \
	  measuring bootstrap

tables: $(INSTALLED) ## render the tables of README, docs/ and benchmarks/README.md from their records
	$(BIN)/slimdit report results/demo --update README.md
	$(BIN)/slimdit report results/methods --update docs/methods.md --name methods
	$(BIN)/slimdit report results/study --update docs/study.md --name study
	$(BIN)/slimdit report results/steps --update docs/steps.md --name steps
	$(BIN)/python -m benchmarks.record

clean: ## remove the environment and the caches; runs/ and results/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build slimdit.egg-info

# PyTorch comes before whatever needs it and without its dependencies, so that TORCH decides its build and nothing
# else; they follow with the rest. setuptools is pinned too, so slimdit's own build is not isolated from it.
# torch-fidelity stands apart, for tests alone: it asks for torchvision, and torchmetrics would import it.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "slimdit needs Python 3.11 or newer and $(PYTHON) is not: make PYTHON=/path/to/one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) setuptools
	$(PIP) install --quiet --no-deps --constraint $(CONSTRAINTS) $(TORCH)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[test]'
	$(PIP) install --quiet --no-deps --upgrade --constraint $(CONSTRAINTS) --target $(VENV)/references torch-fidelity
	@touch $@
