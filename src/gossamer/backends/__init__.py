"""How a graph is computed."""
