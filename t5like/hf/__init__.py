"""Hugging Face model directories: `weights` and tables (`families`) of names, tokenizer files, import and export."""
