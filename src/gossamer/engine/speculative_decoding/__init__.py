"""Speculative decoding: tokens guessed cheaply, verified together in one step of the model."""
