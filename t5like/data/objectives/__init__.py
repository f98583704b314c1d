"""Pretraining objectives: from windows of token ids to batches."""
