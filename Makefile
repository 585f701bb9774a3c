# Everything a newcomer needs; `make demo` and `make test` set up what they need themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch: constraints.txt pins the version that has a CPU build; see there.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# llama-index-core 0.12, for QueryPipeline, which newer ones do not have.
VENV_012 := $(VENV)-llamaindex-012
TESTS_012 := llm hints imports query_pipeline compile engines evaluators extractors

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-llamaindex-012 check format bench bench-attention clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (first time: a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed; this is $$($(PYTHON) --version). Use: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed ## the virtual environment, with everything in it

demo: setup ## a map-reduce chain over a document, three ways (DOC=path for your own text)
	@$(BIN)/macaw demo $(if $(DOC),--doc '$(DOC)')

check: setup ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: check test-llamaindex-012 ## check, then all tests
	@$(BIN)/python -m pytest -n 2 --dist worksteal

test-llamaindex-012: $(VENV_012)/.installed ## the LlamaIndex adapter on llama-index-core 0.12, without torch
	@$(VENV_012)/bin/python -m pytest --confcutdir=tests/llama_index_macaw \
		$(addprefix tests/llama_index_macaw/test_,$(addsuffix .py,$(TESTS_012)))

$(VENV_012)/.installed: pyproject.toml constraints-llamaindex-012.txt
	@echo "Setting up $(VENV_012) (first time: a minute or two)"
	@test -x $(VENV_012)/bin/python || $(PYTHON) -m venv $(VENV_012)
	@$(VENV_012)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-llamaindex-012.txt -e '.[llamaindex,test-llamaindex]'
	@touch $@

test-fast: setup ## the quick loop: everything not marked slow
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

bench: setup ## seven workloads, requests against programs, ~10 min; BENCH="--ablate all": more flags
	@$(BIN)/macaw bench all --rtt-ms 50 --scale 0.05 --speed 4 --repeat 3 --out build/bench $(BENCH)

bench-attention: setup ## attention: two-phase against unshared; planning of LangChain chains
	@$(BIN)/macaw kernels bench
	@$(BIN)/python tests/bench/planning.py

format: setup ## let ruff write
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## remove what was built
	rm -rf $(VENV) $(VENV_012) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
