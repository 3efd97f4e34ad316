"""Weights, channels, heads and layers that matter little, taken out."""
