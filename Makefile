# Everything runs in its own environment, .venv; nothing else on the machine is touched.
#   make demo       install, sync the demo clip, say where the result lies
#   make test       install, check style and types, run the tests
# A smaller download on Linux (torch without CUDA):
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
WORKERS ?= 2
PIP_FLAGS ?=
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: demo test format checksums clean

demo: $(VENV)/bin/python
	$(PIP) .
	$(VENV)/bin/lipstream demo -o $(OUT)

test: $(VENV)/bin/python
	$(PIP) -e '.[dev,synth]'
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/ruff format --check src tests
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lipstream needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

format: $(VENV)/bin/python
	$(VENV)/bin/ruff check --fix src tests
	$(VENV)/bin/ruff format src tests

# After new weights: what `lipstream doctor` and a test compare the files with.
checksums:
	cd src/lipstream/assets/pocket && sha256sum *.safetensors > SHA256SUMS

clean:
	rm -rf $(VENV) $(OUT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
