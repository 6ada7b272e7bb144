"""The command ``neuron-xtts`` and what it runs: demo, judge, bench, doctor. Nothing outside this package imports it."""
