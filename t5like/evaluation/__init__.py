"""Held-out loss, scores of generated answers, samples, and lm-evaluation-harness."""
