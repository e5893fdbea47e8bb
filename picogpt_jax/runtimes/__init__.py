"""Runtimes: what computes an int8 model."""
