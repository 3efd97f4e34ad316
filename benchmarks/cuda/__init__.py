"""The figures that the cuda backend is held to, each against a limit or a peer of the same machine and run."""
