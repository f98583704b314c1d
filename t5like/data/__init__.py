"""From documents to batches: tokenizer, sources, token store, objectives, pipeline. Nothing here imports JAX."""
