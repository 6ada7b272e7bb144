"""Test double of the package ``neuronxcc``: a version and nothing else; see the double of ``torch_neuronx``."""

from importlib.metadata import version

__version__ = version("neuronx-cc")
