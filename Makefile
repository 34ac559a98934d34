# Every target creates the environment when it is missing; nothing needs to be installed first.
PYTHON ?= python3
PY := .venv/bin/python
TINYGPT := .venv/bin/tinygpt
# As they were typed, and for the recipes' shell in its environment: names may hold spaces, quotes and $.
$(foreach name,DATA PORT PRESET PROMPT RUN TEMPERATURE,$(eval override export $(name) := $$(value $(name))))

.PHONY: help setup train eval ladder sample serve bench bench-gpu test check format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 10

setup: .venv/.installed  ## create .venv with pinned versions; other targets do so when needed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/.developed: .venv/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

train: .venv/.installed  ## train a model: make train [DATA= PRESET= RUN= ARGS=]
	$(TINYGPT) train $(if $(PRESET),"$$PRESET") $(if $(DATA),--data "$$DATA") $(if $(RUN),--run "$$RUN") $(ARGS)

eval: .venv/.installed  ## score a run: make eval [RUN= DATA= ARGS=]
	$(TINYGPT) eval $(if $(RUN),"$$RUN") $(if $(DATA),--data "$$DATA") $(ARGS)

ladder: .venv/.installed  ## train every language model on one corpus, print a table and a plot: make ladder [DATA= ARGS=]
	$(TINYGPT) ladder $(if $(DATA),--data "$$DATA") $(ARGS)

sample: .venv/.installed  ## generate text: make sample [RUN= PROMPT= TEMPERATURE= ARGS=]
	@$(TINYGPT) sample $(if $(RUN),"$$RUN") $(if $(PROMPT),--prompt "$$PROMPT") $(if $(TEMPERATURE),--temperature "$$TEMPERATURE") $(ARGS)

serve: .venv/.installed  ## serve a run over HTTP: make serve [RUN= PORT= ARGS=]
	$(TINYGPT) serve $(if $(RUN),"$$RUN") $(ARGS) $(if $(PORT),--port "$$PORT")

bench: .venv/.developed  ## benchmarks of serving, or with DATA=input.txt of training: make bench [DATA= ARGS=]
	$(PY) -m benchmarks.$(if $(DATA),train --data "$$DATA",serve) $(ARGS)

bench-gpu: .venv/.developed  ## check and measure everything on a GPU, in ten minutes: make bench-gpu [DATA=input.txt ARGS=]
	$(PY) -m benchmarks.gpu $(if $(DATA),--data "$$DATA") $(ARGS)

test: .venv/.developed  ## all tests except the long ones: make test [ARGS=]
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/.developed  ## formatter, linter, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: .venv/.developed  ## fix what formatter and linter can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:  ## remove the environment and caches, but no run
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
