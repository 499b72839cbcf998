# Everything runs in .venv, which the first target makes: nothing but Python >= 3.10 is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow test-all lint bench organism clean

demo: $(INSTALLED)      ## the main job on the bundled model, in under four minutes
	$(BIN)/safeopt demo

test: $(INSTALLED)      ## every test but the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED) ## the slow ones only
	$(BIN)/python -m pytest -m slow

test-all: $(INSTALLED)  ## both
	$(BIN)/python -m pytest

lint: $(INSTALLED)      ## the linters that CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy

organism: $(INSTALLED)  ## makes the bundled model pair again (about 15 minutes)
	$(BIN)/python -m safeopt.organism.build

clean:
	rm -rf .venv build dist *.egg-info

# torch comes first and pinned: asked for by another package, pip would take its newest build with several GB of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $(INSTALLED)
