"""Executors: who runs the engine's steps, and with which memory."""
