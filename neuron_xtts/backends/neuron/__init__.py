"""The Neuron backend: graphs are lowered, compiled, stored, verified, and run on NeuronCores."""
