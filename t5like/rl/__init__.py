"""Training by rewards and from preferences."""
