# Two commands do all the set-up on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3

.PHONY: demo demo-small test bench clean

demo: .venv/ready
	.venv/bin/neuron-xtts demo

demo-small: .venv/ready
	.venv/bin/neuron-xtts demo --small

# What does not depend on the version of coqui-tts or transformers is tested once.
INDEPENDENT := test_neuron_double.py test_compiler.py test_store.py test_device.py test_distribution.py

# In two processes; a group of tests that share what takes long to make is one process's.
PYTEST := -m pytest --numprocesses 2 --dist loadgroup

# Threads that spin while they wait take the processor from the processes that tests start side by side.
test: export OMP_WAIT_POLICY = PASSIVE
test: .venv/ready .venv-next/ready .venv-oldest/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python $(PYTEST)
	.venv-next/bin/python $(PYTEST) $(INDEPENDENT:%=--ignore=tests/%)
	.venv-oldest/bin/python $(PYTEST) tests/test_api.py tests/test_fallbacks.py tests/test_parity.py tests/test_stream.py

bench: .venv/ready
	.venv/bin/neuron-xtts bench

# The Neuron stack's versions: torch 2.9.0, coqui-tts 0.27.5, transformers 4.57.6.
.venv/ready: pyproject.toml constraints/neuron.txt scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh .venv

# The newest supported coqui-tts with transformers 5, and the oldest, on the torch of the first environment.
.venv-%/ready: .venv/ready constraints/%.txt
	PYTHON=$(PYTHON) sh scripts/setup.sh .venv-$*

clean:
	rm -rf .venv .venv-next .venv-oldest demo
