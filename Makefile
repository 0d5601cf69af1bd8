# make demo: data, training, evaluation, figures and a page to look at, in minutes on a CPU.
# make test: every notebook, and the tests that span them (one checks that notebooks and package agree).
# make docs: the notebooks and an API reference as a site, without network: _docs/html/index.html.
# All build .venv from nothing; Python 3.11 or newer and make are all they assume.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs export clean

demo: .venv/installed
	$(BIN)/adiff demo --out runs/demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	$(BIN)/python -m pytest

docs: .venv/installed
	$(BIN)/python nbs/_site/build.py

export: .venv/installed
	$(BIN)/nbdev-export

.venv/installed: setup.py settings.ini pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "adiff needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	@touch $@

clean:
	rm -rf .venv runs reproduced _docs
