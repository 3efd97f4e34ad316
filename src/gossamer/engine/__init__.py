"""The serving engine: scheduling, pages, sampling policy. Pure Python, no device, no torch."""
