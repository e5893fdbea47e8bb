"""Benchmarks: what is measured."""
