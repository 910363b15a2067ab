# `make demo` and `make test` set everything up by themselves in .venv: Python and make are all that is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := core $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs setup clean

demo: setup
	$(BIN)/specplug demo

test: setup lint
	$(BIN)/python -m pytest

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

$(STAMP): constraints.txt $(addsuffix /pyproject.toml,$(PACKAGES))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation $(addprefix --editable ./,$(PACKAGES))
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache
