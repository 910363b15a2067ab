# Every target sets up .venv by itself: Python 3.11 or newer and make are all that is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := core $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
STAMP := $(VENV)/.installed

# Hundreds of modules would be compiled anew in every process that a test starts.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo check test test-all lint docs setup clean

help:
	@echo "make demo      a tiny model, plain versus speculative decoding"
	@echo "make check     lint, types and the fast tests; for every edit"
	@echo "make test      everything that guards correctness"
	@echo "make test-all  the slow rest: all seeds, all architectures, packaging, tutorials"
	@echo "make docs      the documentation as a site, in build/site"

demo: setup
	$(BIN)/specplug demo

check: lint
	LONGEST_TEST_SECONDS=2 $(BIN)/python -m pytest -m "not engine and not slow and not packaging"

test: lint
	$(BIN)/python -m pytest -m "not slow and not packaging"

test-all: setup
	$(BIN)/python -m pytest -m "slow or packaging"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-docs.txt
	$(BIN)/python docs/make_hook_reference.py
	$(BIN)/python docs/make_step_picture.py
	$(BIN)/python -m mkdocs build --quiet --strict

setup: $(STAMP)

$(STAMP): constraints.txt requirements-dev.txt $(addsuffix /pyproject.toml,$(PACKAGES))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation $(addprefix --editable ./,$(PACKAGES))
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache
