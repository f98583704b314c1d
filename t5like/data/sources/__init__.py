"""Documents by index: text, JSON lines, CSV, Parquet, TFDS and Hugging Face data sets."""
