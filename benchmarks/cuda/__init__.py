"""The figures that the cuda backend is held to, against limits and peers of the same machine and run."""
