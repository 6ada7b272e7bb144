"""The version, by itself so that packaging can read it without importing torch."""

__version__ = "0.1.0"
"""The version of this library, as `X.Y.Z`."""
