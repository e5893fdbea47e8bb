"""The portable int8 model."""
