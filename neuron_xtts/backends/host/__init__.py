"""The host backend: graphs run eagerly on the CPU, with operators and weights that it computes fast."""
