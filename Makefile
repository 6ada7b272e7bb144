# Two commands do all the set-up on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3

.PHONY: help demo demo-small quick test lint fix docs bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready ## speak with plain coqui-tts and patched, a miniature and full size, and compare
	.venv/bin/neuron-xtts demo

demo-small: .venv/ready ## the miniature alone, for a quick look
	.venv/bin/neuron-xtts demo --small

# What depends on the versions of coqui-tts and transformers is tested on the newest as well, and what patches what is
# theirs on the oldest; the rest is the same everywhere and tested once.
NEWEST := tests/parity $(addprefix tests/unit/test_, codes.py decoding.py graphs.py rows.py) \
	$(addprefix tests/neuron/test_, lowering.py neuron.py) $(addprefix tests/tools/test_, cli.py examples.py)
OLDEST := $(addprefix tests/parity/test_, api.py fallbacks.py parity.py stream.py)

PYTEST := -m pytest --numprocesses 2

# Threads that spin while they wait take the processor from the processes that tests start side by side.
quick test: export OMP_WAIT_POLICY = PASSIVE

quick: lint ## before a commit: lint, types, and the tests that are quick, on one version of coqui-tts
	.venv/bin/python $(PYTEST) -m "not slow"

test: lint .venv-next/ready .venv-oldest/ready ## everything: lint, types, and all tests, on three versions of coqui-tts
	.venv/bin/python $(PYTEST)
	.venv-next/bin/python $(PYTEST) $(NEWEST)
	.venv-oldest/bin/python $(PYTEST) $(OLDEST)

lint: .venv/ready ## lint, format, types and the direction of imports, changing nothing
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

fix: .venv/ready ## format, and mend what ruff can mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/ready ## build the site of the documentation into site/, refusing links that lead nowhere
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
	@echo site/index.html

bench: .venv/ready ## measure sentences, patched against unpatched
	.venv/bin/neuron-xtts bench

# The Neuron stack's versions: torch 2.9.0, coqui-tts 0.27.5, transformers 4.57.6.
.venv/ready: pyproject.toml constraints/neuron.txt scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh .venv

# The newest supported coqui-tts with transformers 5, and the oldest, on the torch of the first environment.
.venv-%/ready: .venv/ready constraints/%.txt
	PYTHON=$(PYTHON) sh scripts/setup.sh .venv-$*

clean: ## remove what these commands made
	rm -rf .venv .venv-next .venv-oldest demo site
