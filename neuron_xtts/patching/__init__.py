"""Patching: proxies on a model's methods, installed and removed, and the dispatcher that they hand calls to."""
