# Every target sets itself up: Python 3.11+, pip and make are all it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -q
# what the live comparison with the PyTorch samplers needs; k-diffusion without its image packages
PEERS  := torch==2.13.0 diffusers==0.42.1 torchsde torchdiffeq
PEERS_ALONE := k-diffusion==0.1.1.post1

.DEFAULT_GOAL := help
.PHONY: help demo test test-peers lint format types bench bench-peers train-digits clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

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

test: lint types  ## lint, types and all tests
	$(BIN)/python -m pytest -q -n 2

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
	$(BIN)/python -m pytest -q -m peers tests/test_peers.py tests/test_benchmarks.py

bench: $(VENV)/dev.stamp  ## run the benchmarks (results in benchmarks/results/)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/compilation.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/search.py --network mixture
	$(BIN)/python benchmarks/search.py --network digits

bench-peers: $(VENV)/peers.stamp  ## time the same model in diffusers, k-diffusion, diffrax
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/draw.py  # the plots of what is in results/

train-digits: $(VENV)/demo.stamp  ## train the bundled network again (minutes on two cores)
	$(BIN)/python benchmarks/train_digits.py

clean:  ## remove the environment and results
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache
