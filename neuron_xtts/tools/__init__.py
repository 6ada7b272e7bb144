"""The command ``neuron-xtts`` and what it runs: demo, judge, benchmarks, doctor. Nothing outside this package imports it."""
