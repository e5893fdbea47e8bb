"""A small GPT in JAX/Flax: int8 quantization-aware training, and one int8 model for every runtime."""

__version__ = "0.1.0"
