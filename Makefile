# make demo: data, training, evaluation, figures and a page to look at, in minutes on a CPU.
# make test: every notebook, and the tests that span them (one checks that notebooks and package agree).
# make docs: the notebooks and an API reference as a site, without network: _docs/html/index.html.
# make faults: the long form of the fault suite: processes killed at random moments, and whether anything was lost.
# make lock: requirements-lock.txt, every version that constraints.txt allows with its hashes; make audit: known vulnerabilities, secrets.
# All build .venv from nothing; Python 3.11 or newer and make are all they assume.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs export faults lock audit clean

demo: .venv/installed
	$(BIN)/adiff demo --out runs/demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: .venv/installed
	$(BIN)/python nbs/_site/build.py

export: .venv/installed
	$(BIN)/nbdev-export

faults: .venv/installed
	ADIFF_FAULTS=long $(BIN)/python -m pytest -s tests/test_faults.py

lock: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[security]'
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --no-config --universal --generate-hashes --no-annotate --python-version 3.11 \
	  -c constraints.txt --extra dev --extra lab setup.py -o requirements-lock.txt

audit: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[security]'
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --disable-plugin HexHighEntropyString --disable-plugin Base64HighEntropyString
	$(BIN)/pip-audit --disable-pip --no-deps -r requirements-lock.txt

.venv/installed: setup.py settings.ini pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "adiff needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,lab]'
	@touch $@

clean:
	rm -rf .venv runs reproduced _docs
