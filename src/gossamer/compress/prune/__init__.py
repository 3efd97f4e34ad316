"""Pruning: single weights become zero (`magnitude`, `wanda`, `sparsegpt`), or whole heads, channels, columns
and layers go (`structured`). Each of the four is a step."""
