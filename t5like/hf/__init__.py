"""Hugging Face directories, in and out: weights, tokenizers, model cards. Nothing imports transformers to run."""
