"""From documents to batches: tokenizer, sources, token store, objectives, packing, pipeline. Nothing here imports JAX."""
