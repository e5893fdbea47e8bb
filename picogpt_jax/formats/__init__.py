"""Formats: what is read from others and written for them."""
