"""Kernels: how a processor likes best what `picogpt_jax.model.gpt` computes."""
