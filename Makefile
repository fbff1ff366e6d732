VENV ?= .venv
PYTHON = $(VENV)/bin/python
CHECKPOINT ?=
# The Hub's files as the package that they become, where the type checker follows their imports of each other.
PACKAGE = build/types/aimv2_packing

.PHONY: demo test test-common test-torchvision test-matrix style quality bench

demo: $(VENV)/installed
	$(PYTHON) examples/demo.py $(if $(CHECKPOINT),--source $(CHECKPOINT))

# Processes of one thread each, which take tests from each other when their own are done: some last minutes.
test: $(VENV)/installed
	$(PYTHON) tests/transformers_common/download.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --dist worksteal

test-common: $(VENV)/installed
	$(PYTHON) tests/transformers_common/download.py
	$(PYTHON) -m pytest tests/transformers_common

# PyPI's torchvision is built for CUDA: without the description of its operators, its Python transforms run anywhere.
test-torchvision: $(VENV)/installed
	$(PYTHON) -m pip install --quiet --no-deps --target .venv-torchvision torchvision==0.28.0
	: > .venv-torchvision/torchvision/_meta_registrations.py
	PYTHONPATH=.venv-torchvision $(PYTHON) -m pytest tests/images

test-matrix: $(VENV)/installed
	$(PYTHON) -m tox run

style: $(VENV)/installed
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quality: $(VENV)/installed
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	rm -rf $(PACKAGE) && mkdir -p $(PACKAGE)
	$(PYTHON) -c "from pathlib import Path; from conversion import code_files; code_files.copy_code(Path('$(PACKAGE)'))"
	$(PYTHON) -m mypy . $(PACKAGE)/*.py

bench: $(VENV)/installed
	$(PYTHON) benchmarks/throughput.py

$(VENV)/installed: requirements.txt requirements-test.txt requirements-dev.txt
	@python3 -c "import sys; sys.version_info < (3, 11) and sys.exit('python3 is ' + sys.version.split()[0] + ': Python 3.11 to 3.13 is needed.')"
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@
