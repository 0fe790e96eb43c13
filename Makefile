# Needs Python 3.11 or newer and make. Everything else is installed into .venv.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin
CONSTRAINTS := constraints.txt constraints-torch.txt
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install $(addprefix --constraint ,$(CONSTRAINTS))
ARGS ?=

.PHONY: help train test lint clean

help:
	@echo "make train   train the quickstart recipe (ARGS='trainer.steps=400' for overrides)"
	@echo "make test    run the test suite, a process for each core (ARGS='-k layout' for pytest's options)"
	@echo "make lint    ruff, pyright and the import contract"
	@echo "make clean   remove .venv and what tools left behind; outputs/ stays"

train: .venv/core
	$(BIN)/meshloom train recipe=quickstart $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Meshloom needs Python 3.11 or newer; set PYTHON=<path of one>" >&2; exit 1; }
	@echo "making the environment .venv"
	$(PYTHON) -m venv .venv

# Marks of what is installed; a change of the requirements installs again.
.venv/core: .venv/bin/python setup.py $(CONSTRAINTS)
	@echo "installing Meshloom and PyTorch into .venv, once; most of it is one download"
	$(INSTALL) --editable .
	@touch $@

# DeepSpeed is there for its tests. Without its kernels it installs in seconds; where it can't, those tests say that they skip.
.venv/dev: .venv/bin/python setup.py $(CONSTRAINTS)
	@echo "installing Meshloom and the tools of its tests into .venv, once"
	$(INSTALL) --editable '.[dev]'
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --editable '.[deepspeed]' || echo "DeepSpeed is not installed: its tests skip" >&2
	@touch $@ .venv/core

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
