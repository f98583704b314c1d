"""Checkpoints, the run directory, and initial parameters."""
