"""The Transformer, from its layers to its output heads."""
