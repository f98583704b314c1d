"""From documents to batches: sources, tokenizer, token store, examples, objectives, pipeline. Nothing imports JAX."""
