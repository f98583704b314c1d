"""Supervised examples: from token ids of inputs and targets to packed rows."""
