"""Supervised examples: from token ids of prompts and answers to packed batches."""
