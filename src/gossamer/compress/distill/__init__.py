"""Training: a student learns from its teacher, a pruned model recovers."""
