# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More words for pytest: make test PYTEST="-x --strict-skips"
PYTEST ?=
# Cells of `make test-matrix`: CELLS="3.10-lowest 3.13-newest"; without, all eight.
CELLS ?= $(foreach r,lowest newest,$(foreach p,3.10 3.11 3.12 3.13,$(p)-$(r)))
JOBS ?= 2

# A Python that has torch for this machine's GPU, with transformers, open_clip and PEFT; installs nothing.
GPU_PYTHON ?= $(PYTHON)

.PHONY: demo test test-slow test-matrix test-gpu lint fuzz docs dist bench bench-quick bench-gpu clean

demo: $(VENV)/.installed
	@echo "The demo trains for about two minutes on two cores; it shows each step."
	$(BIN)/clipgraft demo --out demo

test: $(VENV)/.installed-test lint
	@echo "The tests: about 10 minutes on two cores."
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -q -m "not slow" $(PYTEST)

test-slow: $(VENV)/.installed-test
	$(BIN)/pytest -q -m slow $(PYTEST)

# Each cell is an environment of its own (up to 8 GB, deleted after it) and a whole suite: 8 to 15 minutes each on two
# cores. Pythons of pyenv are found wherever they are. Cells that ran before stay in the table; one that fails does not
# stop the others. Results: benchmarks/results/matrix.md.
test-matrix: $(VENV)/.installed-matrix
	@echo "Cells: $(CELLS). Each downloads up to 3 GB and runs the suite: about 15 minutes a cell on two cores."
	PATH="$$PWD/$(BIN):$$PATH$$(for d in $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin; do printf ':%s' $$d; done)" \
	JOBS=$(JOBS) UV_CACHE_DIR=$${UV_CACHE_DIR:-$$PWD/.nox/uv-cache} \
	$(BIN)/nox -s $(foreach c,$(CELLS),"matrix-$(firstword $(subst -, ,$c))($(lastword $(subst -, ,$c)))"); \
	rc=$$?; rm -rf .nox; $(BIN)/nox -s matrix_table; exit $$rc

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py

fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m fuzz

# A copy in the same layout, so that links between pages are right on GitHub and on the site.
DOCS := $(wildcard *.md) changelog.d/README.md docs examples benchmarks/results src/clipgraft/assets/emoji/art/LICENSES.md tests/allowed_skips.txt

# The site in build/site: README.md, docs/, results of benchmarks, and the reference of Python from docstrings. A broken
# link or an unknown name fails. Needs no torch.
docs: $(VENV)/.installed-docs
	rm -rf build/docs build/site && mkdir -p build/docs
	tar -cf - $(DOCS) | tar -xf - -C build/docs
	$(BIN)/zensical build --strict --clean
	@echo "Open build/site/index.html, or serve it: $(PYTHON) -m http.server --directory build/site"

# Wheel and sdist in dist/; the wheel is built from the sdist, as others will build it.
dist: $(VENV)/.installed-test
	$(BIN)/python -m build --no-isolation

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks --quick

# On a machine with a CUDA GPU. A machine without a network works, too: these install nothing.
test-gpu:
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -q tests/cuda $(PYTEST)

bench-gpu:
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.gpu

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(VENV)
	@scripts/install.sh $(VENV) .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed
	@scripts/install.sh $(VENV) '.[test]'
	@touch $@

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.installed
	@scripts/install.sh $(VENV) '.[bench]'
	@touch $@

# Only nox and uv: each cell has an environment of its own.
$(VENV)/.installed-matrix: noxfile.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check 'nox[uv]>=2024.10'
	@touch $@

# Without clipgraft itself, whose source is parsed and not imported; the list is that of the extra [docs].
$(VENV)/.installed-docs: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check 'zensical>=0.0.73' 'mkdocstrings[python]>=1.0' 'griffe-pydantic>=1.1' \
		'ruff>=0.9'
	@touch $@

clean:
	rm -rf $(VENV) .nox .cache build demo logs
