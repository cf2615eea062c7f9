# `make demo` runs the default sweep on the embedded model, `make test` the whole suite; both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HASH := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
READY := $(VENV)/.ready-$(HASH)

export HF_HUB_OFFLINE = 1

.PHONY: demo test lint notebooks results clean

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vtc needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[eval,notebooks,dev]'
	touch $@

demo: $(READY)
	$(BIN)/vtc sweep --out results/demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(READY)
	$(BIN)/python -m nbconvert --to notebook --execute --inplace notebooks/*.ipynb

results: $(READY)
	$(BIN)/vtc sweep --out results/docs
	cp results/docs/metrics.csv docs/results/tiny_image.csv
	cp results/docs/figure.png docs/results/tiny_image.png
	$(BIN)/python -m vtc.testing > docs/results/contract.md

clean:
	rm -rf $(VENV) results build dist *.egg-info
