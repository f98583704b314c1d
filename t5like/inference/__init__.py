"""Text from a trained model, and log-likelihoods of given texts."""
