# `make demo` and `make test` need only Python 3.11, 3.12 or 3.13 and make; each sets up .venv once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-all test-lowest lint docs clean

$(VENV)/.done: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,perceptual]'
	touch $@

test: $(VENV)/.done lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.done lint docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[serve]' playwright
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ''

# The lowest versions that pyproject.toml allows for $(PYTHON), in a fresh environment.
LOWEST := $(VENV)-lowest
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra gcs --python $(LOWEST)/bin/python \
	  --output-file $(LOWEST)/pins.txt pyproject.toml
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/pins.txt gcp-storage-emulator
	PYTHONPATH=$(CURDIR) $(LOWEST)/bin/python tools/smoke.py

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

demo: $(VENV)/.done
	$(BIN)/python -m tools.demo

docs: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m tools.docs_site

clean:
	rm -rf $(VENV) $(LOWEST) demo build
