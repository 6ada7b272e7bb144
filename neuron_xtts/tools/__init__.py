"""The command ``neuron-xtts`` and what it runs: demo, benchmarks, doctor. Nothing outside this package imports it."""
