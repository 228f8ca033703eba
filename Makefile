# Every target sets itself up: Python 3.11+, pip and make are all it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -q
# what the live comparison with the PyTorch samplers needs; k-diffusion without its image packages
PEERS  := torch==2.13.0 diffusers==0.42.1 torchsde torchdiffeq
# the extras torch and diffusers, in an environment of their own; for PyTorch's smaller builds, those
# without a GPU: make test-interop INDEX=https://download.pytorch.org/whl/cpu
INTEROP := .venv-interop
INDEX   ?=
PEERS_ALONE := k-diffusion==0.1.1.post1

# the site's builder, apart from what it documents
DOCS := .venv-docs

# what builds and checks a release, and where its wheel is tried; other Pythons than the one above:
# make release FRESH="python3.11 python3.12 python3.13"
RELEASE := .venv-release
FRESH   ?= $(PYTHON)

# the leg with 64-bit arrays: modules that touch every part but the gradient searches
X64    := test_tableau.py test_sampler.py test_schedules.py test_guidance.py test_calls.py \
          test_few_step.py test_starts.py test_targets.py test_phase_space.py \
          test_bridges.py test_brownian.py solvers/test_clean_end.py solvers/test_large_rho.py \
          search/test_compare.py guidance/test_combine.py guidance/test_on_data.py guidance/test_rules.py \
          guidance/test_tfg.py guidance/test_as_arguments.py guidance/test_mesh.py steering/test_replay.py \
          inverse/test_loops.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-pages test-x64 test-peers test-interop mutations docs notebooks release lint format types bench bench-peers train-digits clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/demo.stamp: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -e '.[dev]'
	@touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp  ## sample the bundled network, compare solvers, search (results in out/)
	$(BIN)/diffsamp demo

test: lint types  ## lint, types and the tests, in ten minutes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: test test-interop  ## and the long matrices, and those with PyTorch
	$(BIN)/python -m pytest -q -n 2 -m 'long and not peers and not interop'

test-pages: $(VENV)/dev.stamp  ## the notebooks, the snippets of docs/, and the demo
	DIFFSAMP_TESTS_OPTIMISED=1 $(BIN)/python -m pytest -q -n 2 -m 'long and not peers and not interop' tests/test_notebooks.py tests/test_readme.py tests/test_cli.py

test-x64: $(VENV)/dev.stamp  ## tests of most modules with 64-bit arrays
	DIFFSAMP_TESTS_OPTIMISED=1 JAX_ENABLE_X64=1 $(BIN)/python -m pytest -q -n 2 $(X64:%=tests/%)

mutations: $(VENV)/dev.stamp  ## which faults the tests catch (table in benchmarks/results/mutations.md)
	$(BIN)/python benchmarks/mutations.py

lint: $(VENV)/dev.stamp  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp  ## mypy
	$(BIN)/mypy

format: $(VENV)/dev.stamp  ## rewrite with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/peers.stamp: $(VENV)/dev.stamp
	$(PIP) install $(PEERS)
	$(PIP) install --no-deps $(PEERS_ALONE)
	@touch $@

test-peers: $(VENV)/peers.stamp  ## compare with diffusers and k-diffusion, installed for it
	$(BIN)/python -m pytest -q -m peers tests/test_peers.py tests/test_diffusers_parity.py tests/test_benchmarks.py tests/interop

$(INTEROP)/stamp: pyproject.toml
	@test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip --disable-pip-version-check -q install $(INDEX:%=--extra-index-url %) \
	  -e '.[test,torch,diffusers]' 'keras>=3.10'
	@touch $@

test-interop: $(INTEROP)/stamp  ## PyTorch, diffusers and Keras networks, installed for it
	DIFFSAMP_TESTS_OPTIMISED=1 $(INTEROP)/bin/python -m pytest -q -n 2 -m interop tests/networks

$(DOCS)/stamp: pyproject.toml
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip --disable-pip-version-check -q install -e '.[docs]'
	@touch $@

docs: $(DOCS)/stamp  ## the site, in build/site, and whether its links lead somewhere
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	$(DOCS)/bin/python docs/site/check.py build/site

notebooks: $(VENV)/dev.stamp  ## run them, with their pictures, for the site (in build/notebooks)
	rm -rf build/notebooks && mkdir -p build/notebooks && cp notebooks/*.ipynb build/notebooks
	$(BIN)/jupyter-execute --kernel_name=python3 --inplace build/notebooks/*.ipynb

$(RELEASE)/stamp: Makefile
	@test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip --disable-pip-version-check -q install 'build>=1.2' 'twine>=6' cffconvert==2.0.0
	@touch $@

release: $(RELEASE)/stamp  ## sdist and wheel in dist/, checked, and tried in fresh environments
	$(RELEASE)/bin/cffconvert --validate -i CITATION.cff
	rm -rf dist build/lib build/fresh
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/python .ci/release.py $(TAG:%=--tag %) dist/*.whl
	set -e; for python in $(FRESH); do for extra in "" "[models]"; do \
	  rm -rf build/fresh && mkdir -p build/fresh/empty && $$python -m venv build/fresh/venv; \
	  build/fresh/venv/bin/pip --disable-pip-version-check -q install "$$(ls dist/*.whl)$$extra"; \
	  (cd build/fresh/empty && ../venv/bin/python "$(CURDIR)/.ci/smoke.py" "$(CURDIR)/README.md"); \
	done; done

bench: $(VENV)/dev.stamp  ## run the benchmarks (results in benchmarks/results/)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/compilation.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/choosing.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/search.py --network mixture
	$(BIN)/python benchmarks/search.py --network digits

bench-peers: $(VENV)/peers.stamp  ## time the same model in diffusers, k-diffusion, diffrax
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/draw.py  # the plots of what is in results/

train-digits: $(VENV)/demo.stamp  ## train the bundled network again (minutes on two cores)
	$(BIN)/python benchmarks/train_digits.py

clean:  ## remove the environment and results
	rm -rf $(VENV) $(INTEROP) $(DOCS) $(RELEASE) out build dist *.egg-info .mypy_cache .ruff_cache
