# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests. Python 3.11+, make and a package index are enough.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints/dev.txt
SAY ?=
export SAY

.PHONY: demo test lint interop clean

demo: .venv/installed
	$(BIN)/quaver demo -o demo-out $${SAY:+--say "$$SAY"}

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/oracle
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

interop: .venv-interop/installed
	.venv-interop/bin/python bench/interop.py

.venv/installed: pyproject.toml constraints/dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quaver needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/oracle: .venv/installed constraints/oracle.txt
	$(PIP) -e '.[dev]' -r constraints/oracle.txt
	$(PIP) --no-deps qwen-tts==0.1.1
	touch $@

# Apart from .venv: the tests need transformers 4, the readers of our formats transformers 5 (and a huggingface_hub to match).
.venv-interop/installed: pyproject.toml constraints/dev.txt constraints/interop.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet --disable-pip-version-check -c constraints/dev.txt torch soundfile soxr click safetensors
	.venv-interop/bin/pip install --quiet --disable-pip-version-check -r constraints/interop.txt \
		torch==$$(sed -n 's/^torch==//p' constraints/dev.txt)
	.venv-interop/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-interop demo-out
