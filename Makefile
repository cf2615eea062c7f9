# `make demo` runs sweeps on the embedded models, `make test` the whole suite; both create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HASH := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
READY := $(VENV)/.ready-$(HASH)
OLD := .venv-oldest
OLDEST := 5.17.0
OLD_READY := $(OLD)/.ready-$(OLDEST)-$(HASH)

export HF_HUB_OFFLINE = 1
# Every command is a process that imports PyTorch: without compiled files, which some machines ask for, twice as slow.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-oldest lint site notebooks docs results clean

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vtc needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[eval,clip,cluster,docs,notebooks,dev]'
	touch $@

$(OLD_READY):
	rm -rf $(OLD)
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet uv
	grep -v -E '^(transformers|tokenizers|huggingface-hub)==' constraints.txt > $(OLD)/constraints.txt
	$(OLD)/bin/uv pip install --quiet --python $(OLD)/bin/python --constraint $(OLD)/constraints.txt \
		--editable '.[eval,clip,cluster,docs,notebooks,dev]' 'transformers==$(OLDEST)'
	touch $@

demo: $(READY)
	$(BIN)/vtc sweep demo --out results/demo
	@echo
	@echo 'In each folder of results/demo:'
	@echo '  report.html   ranking, curves, tables, samples and settings on one page'
	@echo '  metrics.csv   one line per metric of each method and retention'
	@echo '  figure.png    the figure alone; the other files there are the store of answers'
	@echo
	@echo 'The command is $(BIN)/vtc; after ". $(BIN)/activate" it is vtc. For example:'
	@echo '  $(BIN)/vtc methods'
	@echo '  $(BIN)/vtc sweep --methods random,vtc_cls --retentions 0.5,0.25 --out results/mine'

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

# The oldest supported transformers: everything but the evaluation package, which needs nothing of its version.
test-oldest: $(OLD_READY)
	$(OLD)/bin/python -m pytest -n auto --dist worksteal --ignore=tests/eval --ignore=tests/test_notebooks.py --ignore=tests/test_cli.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Documentation for a browser, into site/: warnings are errors, nothing is fetched.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: $(READY)
	$(BIN)/python -m nbconvert --to notebook --execute --inplace notebooks/*.ipynb

# What is made of the code and of committed scores, in a minute; `make results` measures, for hours.
docs: $(READY)
	$(BIN)/python -m vtc.eval.documents

results: $(READY)
	$(BIN)/vtc sweep --out results/docs
	cp results/docs/metrics.csv docs/results/tiny_image.csv
	cp results/docs/figure.png docs/results/tiny_image.png
	$(BIN)/vtc mini build
	$(BIN)/vtc sweep mini
	$(BIN)/python -m vtc.eval.mini.report results/mini > docs/results/mini_llava.md
	$(BIN)/python -m vtc.eval.claims results/mini > docs/results/mini_claims.md
	$(BIN)/vtc sweep ranking
	$(BIN)/vtc sweep parts
	$(BIN)/python -m vtc.eval.archive results/ranking/* results/parts --out docs/results/scores
	$(BIN)/vtc sweep shallow --out results/shallow
	cp results/shallow/metrics.csv docs/results/shallow.csv
	$(BIN)/python -m vtc.testing > docs/results/contract.md
	$(BIN)/python -m vtc.testing.inside > docs/results/encoder_contract.md
	$(BIN)/python -m vtc.testing.timing > docs/results/ops.md
	$(BIN)/python -m vtc.testing.selecting > docs/results/selections.md
	$(BIN)/python -m vtc.testing.scaling > docs/results/scaling.md
	$(BIN)/python -m vtc.testing.graphs > docs/results/graphs.md
	$(BIN)/python -m vtc.eval.training.atp_report
	$(BIN)/python -m vtc.eval.training.vqtoken_report
	$(BIN)/python -m vtc.eval.training.quecc_report
	$(BIN)/python -m vtc.eval.training.p_mod_report
	$(BIN)/python -m vtc.testing.overhead > docs/results/overhead.md
	$(BIN)/python tests/eval/faults.py
	$(BIN)/python tests/eval/speed.py
	$(BIN)/python tests/eval/engines.py
	$(BIN)/vtc tiny table > docs/results/tiny_models.md
	$(BIN)/vtc encoders --scenes 300 --retentions 0.75,0.5,0.25,0.11,0.05 --out results/encoders
	$(BIN)/python -m vtc.eval.encoders.page results/encoders > docs/results/encoders.md
	cp results/encoders/figure.png docs/results/encoders.png
	$(BIN)/python -m vtc.eval.pictures docs/pictures
	$(BIN)/python tests/eval/report_pictures.py
	$(MAKE) docs

clean:
	rm -rf $(VENV) $(OLD) results site build dist *.egg-info
