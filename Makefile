PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Without bytecode, every program that a test starts would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test ferretdb prove power lint format clean

help: ## Show what there is to make
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/installed ## Install and replay a demo strategy: no server, no network
	$(BIN)/backtest-kit backtest examples/trend.py --symbol BTCUSDT,ETHUSDT,SOLUSDT

test: $(VENV)/developing lint ## Everything: lint, types, layers, tests, coverage
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term:skip-covered
	$(BIN)/coverage report --include='*/backtest_kit/persist/*' --skip-covered --fail-under=95
	$(BIN)/coverage report --include='*/backtest_kit/engine/*' --skip-covered --fail-under=95

ferretdb: $(VENV)/developing ## The tests of the Mongo store on FerretDB, which Go builds
	$(BIN)/python tests/ferretdb.py

prove: $(VENV)/developing ## Everything of which make test draws a sample; takes an hour or more
	$(BIN)/python tests/prove.py

power: $(VENV)/developing ## As root: cut the power of a real file system on a loop device
	$(BIN)/python tests/crash/power.py --file-system ext4
	$(BIN)/python tests/crash/power.py --file-system xfs

lint: $(VENV)/developing ## Formatting, lint, types and layer rules
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/developing ## Format and mend what can be mended
	$(BIN)/ruff check --fix src tests examples benchmarks
	$(BIN)/ruff format src tests examples benchmarks

clean: ## Remove what was installed and written
	rm -rf $(VENV) dump .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/developing: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/installed
