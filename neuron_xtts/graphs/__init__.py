"""Graphs: torch modules over tensors of fixed shapes. They know torch alone."""
