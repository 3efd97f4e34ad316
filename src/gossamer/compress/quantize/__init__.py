"""Weights in few bits, ahead of serving."""
