"""Graph -> Graph, one file per structural technique; pipeline.py orders them."""
