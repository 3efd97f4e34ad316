"""What a model is worth, measured as it is served: perplexity, divergence, tasks, and the certificate."""
