# Everything runs in .venv, which the first target makes: nothing but Python >= 3.10 is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo build test test-slow test-all lint bench organism clean

demo: $(INSTALLED)      ## the main job on the bundled model, in about three minutes on two cores
	-$(BIN)/python setup.py build_ext --inplace  # it goes on in plain torch where this fails
	$(BIN)/safeopt demo

build: $(INSTALLED)     ## the compiled libraries of csrc/, in place; SAFEOPT_NO_EXT=1 does without
	$(BIN)/python setup.py build_ext --inplace

test: build             ## every test but the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-slow: build        ## the slow ones only
	$(BIN)/python -m pytest -m slow

test-all: build         ## both
	$(BIN)/python -m pytest

lint: $(INSTALLED)      ## the linters that CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/* tests/csrc/*)
	$(BIN)/typos
	$(BIN)/mypy

# For one GPU: make bench DEVICE=cuda. Other options: make bench BENCH="--weights 1e6,1e7 --rounds 9".
DEVICE ?= cpu
DTYPE ?= float32
SPEED := benchmarks/results/speed
bench: build            ## speed and memory of the step, of scoring and of selection (about an hour)
	mkdir -p $(SPEED)
	$(BIN)/python -m pytest benchmarks --device $(DEVICE) --dtype $(DTYPE) $(BENCH) --benchmark-json $(SPEED)/$(DEVICE)-$(DTYPE).json
	$(BIN)/python benchmarks/speed_report.py

organism: $(INSTALLED)  ## makes the bundled model pair again (about 15 minutes)
	$(BIN)/python -m safeopt.organism.build

clean:
	rm -rf .venv build dist *.egg-info safeopt/*.so

# torch comes first and pinned: asked for by another package, pip would take its newest build with several GB of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	SAFEOPT_NO_EXT=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[all]"
	touch $(INSTALLED)
