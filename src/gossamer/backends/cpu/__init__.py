"""The native CPU backend: no torch."""
