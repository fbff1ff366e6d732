VENV ?= .venv
PYTHON = $(VENV)/bin/python
CHECKPOINT ?=

.PHONY: demo test test-matrix style bench

demo: $(VENV)/installed
	$(PYTHON) examples/demo.py $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

test: $(VENV)/installed
	$(PYTHON) -m pytest

test-matrix: $(VENV)/installed
	$(PYTHON) -m tox run

style: $(VENV)/installed
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy .

bench: $(VENV)/installed
	$(PYTHON) benchmarks/throughput.py

$(VENV)/installed: requirements.txt requirements-test.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
