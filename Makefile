# Two commands matter: `make quickstart` and `make test`. Everything is installed into .venv, at the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Files in their own order: by default those with few tests, which are the long ones, would come last, and one core would wait for the other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder
FILES := sparklab tests examples benchmarks

.PHONY: quickstart test test-fast test-browser lint lab notebooks wheel pins clean
.DEFAULT_GOAL := quickstart

quickstart: .venv/base ## fine-tune the bundled model and show that it helped
	$(BIN)/sparklab quickstart

test: .venv/dev .venv/node .venv/ipykernel-6.31 .venv/liger .venv/trl ## the whole test suite, a file at a time on every core
	$(TESTS)

test-fast: .venv/dev ## the tests that take seconds: no training, no browser
	$(TESTS) -m "not slow and not browser"

test-browser: .venv/dev .venv/node .venv/ipykernel-6.31 ## the panels in JupyterLab and Notebook 7, in Debian's chromium
	$(TESTS) -m browser

lint: .venv/dev ## ruff and mypy
	$(BIN)/ruff check $(FILES)
	$(BIN)/ruff format --check $(FILES)
	$(BIN)/mypy

lab: .venv/dev ## JupyterLab on the first notebook
	$(BIN)/jupyter lab notebooks/01_first_finetune.ipynb

notebooks: .venv/dev ## write every .ipynb anew from its .py, executed
	$(BIN)/python notebooks/build.py

wheel: .venv/dev ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

pins: .venv/dev ## write constraints.txt anew from what is installed
	$(BIN)/python tests/pins.py > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparklab needs Python 3.11 or newer: set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/base: .venv/python pyproject.toml constraints.txt
	@echo "installing into .venv (some minutes, once)"
	$(PIP) --editable .
	@touch $@

.venv/node: .venv/dev tests/panels/package.json
	@mkdir -p $@ && cp tests/panels/package.json $@/
	@if command -v npm >/dev/null; then npm install --prefix $@ --no-package-lock --no-audit --no-fund --silent; \
	else echo "npm is missing: the accessibility tests will skip"; fi
	@touch $@

# The last ipykernel without subshells, beside the latest: a kernel of the browser tests finds it through PYTHONPATH.
.venv/ipykernel-6.31: .venv/dev
	@rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ ipykernel==6.31.0
	@touch $@

# Liger's kernels and the interpreter that runs them on a CPU, for one test, in a folder of their own: Triton unpacks to 1 GB.
.venv/liger: .venv/dev
	@rm -rf $@
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.9.0 liger-kernel==0.8.5 \
	|| { rm -rf $@; mkdir $@; echo "no wheel of Triton for this machine: the test of Liger's kernels will skip"; }
	@touch $@

# TRL, for the test of the benchmark beside it; torch, transformers and PEFT stay ours.
.venv/trl: .venv/dev
	@rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ trl==1.16.0
	@touch $@

.venv/dev: .venv/base
	$(PIP) --editable '.[dev]'
	@touch $@
