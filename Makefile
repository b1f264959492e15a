# Two commands do everything: `make demo` measures the bundled model, `make test` runs the tests.
# Both install what they need into .venv first; outside this folder only caches of compiled code are written.

PYTHON ?= python3
# Which build of PyTorch: `make TORCH="torch --index-url URL"` takes it from the index at URL instead.
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt

# The study: the paper's table of five families, for both bases; what stands beside it for the bundled one; and the
# rows that a conclusion rests on, which are trained with a second seed.
TABLE := finetune-teacher finetune-control sparse-weights sparse-2-4 prune-width prune-width-recovered prune-depth \
  prune-depth-recovered int8-weight-only int8-dynamic int4 fp8 student-half student-half-scratch student-quarter \
  attention-control mediated-4 mediated focused focused-grouped grouped shallow experts-partition-control \
  experts-partition experts-upcycle
STUDY := $(TABLE) few-steps steps-6-searched low-rank-adaln lean lean-6 slim narrow tiny \
  cache-half slimdit/assets/recipes/stacks/*.toml slimdit/assets/recipes/students/distill-*.toml guidance-off \
  mediated-scratch experts-upcycle-timestep finetune-longer
CONCLUSIONS := finetune-teacher finetune-control student-half distill-depth distill-alpha-000 distill-alpha-100 \
  attention-control mediated shallow experts-partition-control experts-partition experts-upcycle-timestep

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/installed

# What the caller's shell holds must not decide what runs here; tests and demo need no network.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench engines methods study steps benchmarks tables clean

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

engines: $(INSTALLED) ## measure what results/engines lacks: OpenVINO, and the static ranges that it multiplies, five minutes
	$(BIN)/slimdit bench slimdit/assets/recipes/engines/*.toml --out results/engines --resume

methods: $(INSTALLED) ## measure what results/methods lacks: every other shipped recipe, an hour; some train on Fashion-MNIST
	$(BIN)/slimdit bench slimdit/assets/recipes/compression/*.toml --images 192 --out results/methods --resume

study: $(INSTALLED) ## measure what results/study and results/study-xs4 lack: all five families, five hours
	$(BIN)/slimdit bench $(STUDY) --protocol study --out results/study --resume
	$(BIN)/slimdit bench $(CONCLUSIONS) --seeds 2 --protocol study --out results/study --resume
	$(BIN)/slimdit bench $(TABLE) --model results/bases/xs4 --protocol study --out results/study-xs4 --resume

steps: $(INSTALLED) ## measure what results/steps lacks: ten steps beside the published 250 of DDPM, half an hour
	$(BIN)/slimdit bench slimdit/assets/recipes/steps/*.toml --protocol published --out results/steps --resume

benchmarks: $(INSTALLED) ## time slimdit's own hot paths into results/benchmarks, an hour on an idle machine
	$(BIN)/python -m benchmarks.record int8 sampling_run prepacked historical "peers --presets XS/4 S/2 --images 1 4 --rounds 3" step launches surroundings compiling growth \
	  attention attention_kinds few_rows load_memory startup measuring bootstrap

tables: $(INSTALLED) ## render the tables of README, docs/ and benchmarks/README.md from their records
	$(BIN)/slimdit report results/demo --update README.md
	$(BIN)/slimdit report results/methods --update docs/methods.md --name methods
	$(BIN)/slimdit report results/study --update docs/study.md --name study --figures docs/figures/study
	$(BIN)/slimdit report results/study --update README.md --name study
	$(BIN)/slimdit report results/study-xs4 --update docs/study.md --name study-xs4
	$(BIN)/slimdit report results/engines --update docs/methods.md --name engines
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
