"""Decoding: rows are admitted to a batch, step together and are released."""
