"""Gossamer beside what users would pick instead, on the same shapes, prompts and threads. See README.md."""
