"""The Transformer: `layers` (parts without attention), `attention`, `transformer` (blocks, stacks, the model)."""
