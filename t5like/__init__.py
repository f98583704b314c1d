"""t5like: T5-like language models in JAX. Importing the package imports nothing else, so it costs nothing."""

__version__ = "0.1.0"
