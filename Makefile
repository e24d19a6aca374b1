# make install | make demo | make test | make faults | make fuzz | make lint
PYTHON ?= python3
export HF_HUB_OFFLINE = 1

install: .venv/installed

.venv/installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	.venv/bin/flallm demo

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test: install
	.venv/bin/python -m pytest

faults: install
	PYTHONPATH=tests .venv/bin/python tests/faults.py

fuzz: install
	.venv/bin/python tests/fuzz.py

.PHONY: install demo faults fuzz lint test
