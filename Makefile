# Each target works alone on a fresh machine with Python 3.11 or newer and make.
#   make test PYTEST="-k cli"     arguments for pytest
#   make demo DEMO="--seed 7"     arguments for cdetr-fast demo
#   make test PYTHON=python3.12   the interpreter that makes the environment
#   make test CDETR_FAST_NATIVE=0 without the C++ and CUDA kernels (1: an error if C++ cannot be built)

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
CONSTRAINTS ?= constraints.txt
PYTEST ?=
DEMO ?=

CPP := $(wildcard csrc/* tests/kernels/emulation/*)
SCHEMA := $(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test coverage test-oldest docs lint format dist clean

help:
	@echo "make demo         draw scenes, detect, print AP, write pictures to output/demo"
	@echo "make test         run the tests"
	@echo "make coverage     run the tests, and print how much of the package they cover"
	@echo "make test-oldest  run the tests on the oldest supported packages, in $(OLDEST)"
	@echo "make docs         build the documentation into build/site"
	@echo "make lint         check style, formatting, wording, imports and types"
	@echo "make format       fix what can be fixed automatically"
	@echo "make dist         build and check the wheel and the sources in dist"
	@echo "make clean        remove the environments and build products"

demo: $(VENV)/.installed-eval $(VENV)/.native
	$(VENV)/bin/cdetr-fast demo $(DEMO)

# Two workers with one thread each: more threads than cores slow all of them down. Each begins with a
# half of the files, so that what a file prepares is mostly prepared once; who is done takes over.
WORKERS := -n 2 --dist worksteal
test: $(VENV)/.installed-test $(VENV)/.native
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(WORKERS) $(PYTEST)

# Apart from `test`: Python 3.11's tracing took 60 s of CPU time instead of 40 for 259 tests.
coverage: $(VENV)/.installed-test $(VENV)/.native
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(WORKERS) --cov --cov-report= $(PYTEST)
	$(VENV)/bin/python tools/coverage_summary.py

# The same in an environment of its own; not part of CI.
test-oldest:
	$(MAKE) test VENV=$(OLDEST) CONSTRAINTS=constraints-oldest.txt

# The variable silences an advertisement.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@echo "build/site/index.html"

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/python tools/words.py
	$(SCHEMA).github-workflows .github/workflows/*.yml
	$(SCHEMA).github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(SCHEMA).citation-file-format CITATION.cff
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# A wheel for any platform, whose sources `cdetr-fast build-native` compiles, and the source distribution; the
# wheel is built from that. In an environment of its own, since twine brings thirty packages.
dist:
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip --disable-pip-version-check install --quiet build twine
	rm -rf dist
	CDETR_FAST_NATIVE=0 $(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV)-dist $(VENV) $(OLDEST) build dist output *.egg-info .coverage .hypothesis
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	rm -f kernels/cdetr_kernels/_native_*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted installation is repeated.
$(VENV)/.installed-%: pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV); the first time that takes some minutes and about 6 GB"
	$(PYTHON) -m venv $(VENV)
	CDETR_FAST_NATIVE=0 $(PIP) install --quiet --progress-bar off --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@

# The C++ and CUDA kernels, as far as there are compilers. Prerequisites are made from left to right
# (.NOTPARALLEL), so the targets above have the environment by then.
$(VENV)/.native: $(wildcard csrc/*) kernels/cdetr_kernels/build.py
	$(VENV)/bin/cdetr-fast build-native
	@touch $@
