"""Hugging Face model directories: read in as runs, written from runs."""
