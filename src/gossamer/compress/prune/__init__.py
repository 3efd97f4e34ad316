"""Pruning: single weights become zero (`unstructured`: magnitude, Wanda, SparseGPT), or whole heads, channels
and layers go (`structured`)."""
