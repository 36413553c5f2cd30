# One loop for people and for CI. Every target makes .venv first and installs into it what is missing.

PYTHON ?= python3
VENV ?= .venv
# Where pip should also look for torch: the index that pytorch.org names for your machine. Empty: pip's default build.
TORCH_INDEX_URL ?=
# More words for `pip install`, such as -v to watch it.
PIP_ARGS ?=
# More words for pytest, such as PYTEST_ARGS='tests/labels -x'.
PYTEST_ARGS ?=
# More words for benchmarks/fetch.py, such as BENCH_ARGS='--only http'.
BENCH_ARGS ?=
OUT ?= demo-output

BENCH_RESULT = benchmarks/results/$(1)-$(shell date +%F)-$(shell nproc)-cores
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) $(PIP_ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test smoke check format bench bench-long proof audit lock clean

help: ## Say what the targets do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1	/' | expand -t 12
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX_URL=$(TORCH_INDEX_URL) PIP_ARGS=$(PIP_ARGS) PYTEST_ARGS=$(PYTEST_ARGS)"

demo: $(INSTALLED) ## Label digits and tokens, serve the labels, train students three ways: two minutes
	$(BIN)/logitcache demo --out $(OUT)

test: $(INSTALLED) ## The tests, on all cores; one after the other with PYTEST_ARGS
	$(BIN)/python -m pytest $(or $(PYTEST_ARGS),--numprocesses=auto --dist=worksteal)

smoke: $(INSTALLED) ## The benchmarks at a small size, to see that they run
	$(BIN)/python -m pytest -m smoke $(or $(PYTEST_ARGS),--numprocesses=auto --dist=worksteal)

check: $(INSTALLED) ## Format, lint, types and import contracts, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Mend what `check` can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Rows a second beside what people use instead, clients at once, cold pages, many shards, recording: ten minutes
	$(BIN)/python benchmarks/fetch.py --out $(call BENCH_RESULT,fetch).json --plot $(call BENCH_RESULT,fetch).png $(BENCH_ARGS)
	$(BIN)/python benchmarks/clients.py --out $(call BENCH_RESULT,clients).json
	$(BIN)/python benchmarks/cold.py --out $(call BENCH_RESULT,cold).json
	$(BIN)/python benchmarks/verify.py --out $(call BENCH_RESULT,verify).json
	$(BIN)/python benchmarks/sparse.py --out $(call BENCH_RESULT,sparse).json
	$(BIN)/python benchmarks/recording.py --out $(call BENCH_RESULT,recording).json

bench-long: $(INSTALLED) ## Training steps with labels over HTTP, over a slow link, and the cost of labelling: half an hour
	$(BIN)/python benchmarks/step.py --out $(call BENCH_RESULT,step).json
	$(BIN)/python benchmarks/step.py --link 1Gbit --steps 400 --out $(call BENCH_RESULT,step-1gbit).json
	$(BIN)/python benchmarks/step.py --link 1Mbit --steps 60 --block 60 --out $(call BENCH_RESULT,step-1mbit).json
	$(BIN)/python benchmarks/labelling.py --out $(call BENCH_RESULT,labelling).json
	$(BIN)/python benchmarks/labelling.py --tokens --out $(call BENCH_RESULT,labelling-tokens).json

audit: ## Look every pinned package up in the Python advisory database: needs pypi.org
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python $(PIP_INSTALL) pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

proof: $(INSTALLED) ## The tests that take minutes to hours; one of them with python -m pytest -m proof -s FILE
	$(BIN)/python -m pytest -m proof $(PYTEST_ARGS)

lock: ## Resolve the newest versions and write constraints.txt
	rm -rf $(VENV)/lock
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python $(PIP_INSTALL) "torch==$$(sed -n 's/^torch==//p' constraints.txt)" '.[dev,bench]'
	sed '/^#/!d' constraints.txt > $(VENV)/lock/constraints.txt
	$(VENV)/lock/bin/python -m pip freeze --all --exclude pip --exclude logitcache \
		| sed 's/+[a-z0-9.]*$$//' >> $(VENV)/lock/constraints.txt
	mv $(VENV)/lock/constraints.txt constraints.txt
	rm -rf $(VENV)/lock

clean: ## Remove what the targets made: the environment, tools' own files, the demo's output (label sets stay)
	rm -rf $(VENV) .venv-audit $(OUT) dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find labels storage server client tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "logitcache needs Python 3.11 or newer as $(PYTHON); name another with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is the bulk of it; PIP_ARGS=-v shows progress)"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev,bench]'
	@touch $@
