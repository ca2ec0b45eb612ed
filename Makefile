# Every target sets up what it needs in .venv; nothing outside the checkout is changed except the data folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM := .venv-vllm
# one more process than cores, as some tests wait; at most four
WORKERS := $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); [ $$n -lt 4 ] && echo $$((n + 1)) || echo 4)
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm quick zoo lint unit docs data text constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) data ## train structures side by side on real images (minutes) and write a report
	@$(BIN)/einlinear compare --out results/demo --preset demo

test: $(INSTALLED) ## lint, type check, run the tests on up to four cores, and build the docs
	@$(MAKE) --no-print-directory --jobs 2 lint docs unit

test-vllm: $(INSTALLED) $(VLLM)/.installed ## serve structured models with vLLM, in an environment of its own (x86-64 Linux)
	@$(BIN)/python -m pytest --quiet tests/vllm

quick: $(INSTALLED) ## the tests of the layers that are quick, in two minutes
	@$(BIN)/ruff check
	@$(PYTEST) --quiet -m "not slow" \
		tests/test_architecture.py tests/test_conformance.py tests/structures tests/ops tests/nn tests/fusion tests/conversion tests/mup

zoo: $(INSTALLED) ## try every kind of model, and write the tables of docs/results/models.md (minutes)
	@$(BIN)/python -m tests.zoo --write

unit: $(INSTALLED)
	@$(PYTEST) --ignore tests/vllm

lint: $(INSTALLED) ## ruff, the formatter's check and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

docs: $(INSTALLED) ## build the documentation into build/site; broken links and missing anchors are errors
	@$(BIN)/python tools/cli_reference.py
	@$(BIN)/zensical build --strict --clean
	@$(BIN)/python tools/check_site.py build/site

data: ## fetch Fashion-MNIST (31 MB) into $EINLINEAR_DATA, by default ~/.cache/einlinear
	@tools/fetch_fashion_mnist.sh || echo "Going on without it: the demo says which images it trains on."

text: ## fetch 20 MB of English text (12 MB to download) into $EINLINEAR_DATA
	@tools/fetch_english.sh

constraints: ## pin the newest versions that install together
	@tools/lock_constraints.sh $(PYTHON)

clean: ## remove the virtual environments and all caches
	rm -rf $(VENV) $(VLLM) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is simply done again. A .venv without a working pip
# is one whose creation was interrupted. Pip would compile on one core; templates among the files do not compile.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "einlinear needs Python 3.10 or later")'
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
		--constraint constraints.txt --editable '.[lab,pretrained,dev]'
	@$(BIN)/python -m compileall -qq --workers 0 $(VENV) || true
	@touch $@

# vLLM wants other versions. All are pinned, so nothing is resolved.
$(VLLM)/.installed: tools/vllm_requirements.txt pyproject.toml
	@echo "Setting up $(VLLM) (a few minutes the first time)"
	@$(VLLM)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --no-compile --no-deps --disable-pip-version-check \
		--requirement tools/vllm_requirements.txt --editable .
	@touch $@
