# Every target makes its own environment the first time; nothing needs to be installed before.
PYTHON ?= python3
PY := .venv/bin/python
export PROMPT

.PHONY: help setup train eval ladder sample serve bench test check format clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 10

setup: .venv/.installed  ## .venv with pinned versions; every other target makes it when needed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/.developed: .venv/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

train: .venv/.installed  ## train a model: make train [DATA= PRESET= RUN= ARGS=]
	$(PY) -m training train $(PRESET) $(if $(DATA),--data '$(DATA)') $(if $(RUN),--run '$(RUN)') $(ARGS)

eval: .venv/.installed  ## score a run: make eval [RUN= DATA= ARGS=]
	$(PY) -m training eval $(RUN) $(if $(DATA),--data '$(DATA)') $(ARGS)

ladder: .venv/.installed  ## every model on one corpus: table and plot: make ladder [DATA= ARGS=]
	$(PY) -m training ladder $(if $(DATA),--data '$(DATA)') $(ARGS)

sample: .venv/.installed  ## text from a run: make sample [RUN= PROMPT= TEMPERATURE= ARGS=]
	@$(PY) -m serving sample $(RUN) $(if $(PROMPT),--prompt "$$PROMPT") $(if $(TEMPERATURE),--temperature $(TEMPERATURE)) $(ARGS)

serve: .venv/.installed  ## a run over HTTP: make serve [RUN= PORT= ARGS=]
	$(PY) -m serving serve $(RUN) $(if $(PORT),--port $(PORT)) $(ARGS)

bench: .venv/.developed  ## side by side with others: serving, or with DATA=input.txt training: make bench [DATA= ARGS=]
	$(PY) -m benchmarks.$(if $(DATA),train --data '$(DATA)',serve) $(ARGS)

test: .venv/.developed  ## all tests but the longest: make test [ARGS=]
	$(PY) -m pytest $(ARGS)

check: .venv/.developed  ## formatter, linter, strict types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: .venv/.developed  ## mend what formatter and linter can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:  ## remove the environment and caches, never a run
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
