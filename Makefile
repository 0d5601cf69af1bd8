# make demo: data, training, evaluation, figures and a page to look at, in minutes on a CPU.
# make test: minutes: the export, style, unit tests, the notebooks that are quick, one run from end to end, one that is killed.
# make check: everything: make test, then make slow: the other notebooks, every command, kill and bad input, the site, the wheel.
# make docs: the notebooks and an API reference as a site, without network: _docs/html/index.html.
# make faults: the long form of the fault suite: processes killed at random moments, and whether anything was lost.
# make gpu: what one GPU does in ten minutes, as a table; make gpu CHECK=--rehearse: the same code on the CPU.
# make lock: requirements-lock.txt, every version that constraints.txt allows with its hashes; make audit: known vulnerabilities, secrets.
# All build .venv from nothing, with what they need and no more; Python 3.11 or newer and make are all they assume.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# uv leaves modules uncompiled; each is compiled when first imported. Where somebody has switched that off, every process would do it anew.
unexport PYTHONDONTWRITEBYTECODE

# uv does not read pip's configuration; what stands in pip's variables counts for it as well.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_EXTRA_INDEX_URL
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

# Installs adiff with the extras of the target: by uv, the one on the PATH or one put into .venv; by pip, many times slower, where uv cannot.
define install
	@uv=$$(command -v uv || { $(BIN)/python -m pip install --quiet -c constraints.txt uv && echo $(BIN)/uv; }); \
	{ test -n "$$uv" && "$$uv" pip install --quiet --python $(BIN)/python -c constraints.txt -e '.$(extras)'; } || \
	{ echo "uv cannot install this; pip tries, which takes minutes" >&2; \
	  $(BIN)/python -m pip install --quiet -c constraints.txt -e '.$(extras)'; }
	@$(BIN)/python -c 'import adiff.runs.evaluate, adiff.runs.report'  # compiles what every command imports
	@touch $@
endef

.PHONY: demo test slow check docs export faults gpu lock audit clean

demo: .venv/for_demo
	$(BIN)/adiff demo --out runs/demo

test: .venv/for_test
	$(PYTEST) -m "not slow"

slow: .venv/installed
	$(PYTEST) -m slow

check: test slow

docs: .venv/installed
	$(BIN)/python nbs/_site/build.py

export: .venv/for_test
	$(BIN)/nbdev-export

faults: .venv/installed
	ADIFF_FAULTS=long $(BIN)/python -m pytest -s tests/test_faults.py

gpu: .venv/for_demo
	$(BIN)/python tests/gpu/check.py --out runs/gpu $(CHECK)

lock: .venv/for_security
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --no-config --universal --generate-hashes --no-annotate --python-version 3.11 \
	  -c constraints.txt --extra dev --extra lab setup.py -o requirements-lock.txt

audit: .venv/for_security
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --disable-plugin HexHighEntropyString --disable-plugin Base64HighEntropyString
	$(BIN)/pip-audit --disable-pip --no-deps -r requirements-lock.txt

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "adiff needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv

REQUIREMENTS := setup.py settings.ini pyproject.toml constraints.txt

.venv/for_demo: $(REQUIREMENTS) | .venv/pyvenv.cfg
	$(install)

.venv/for_test: extras := [test]
.venv/for_test: $(REQUIREMENTS) | .venv/pyvenv.cfg
	$(install)

.venv/installed: extras := [dev,lab,app]
.venv/installed: $(REQUIREMENTS) | .venv/pyvenv.cfg
	$(install)

.venv/for_security: extras := [dev,lab,security]
.venv/for_security: $(REQUIREMENTS) | .venv/pyvenv.cfg
	$(install)

clean:
	rm -rf .venv runs reproduced _docs
