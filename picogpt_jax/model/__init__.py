"""The model: what is computed."""
