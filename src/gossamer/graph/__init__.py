"""What is computed: the graph, its ops and the model families that build it."""
