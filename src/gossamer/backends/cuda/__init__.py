"""The same graph on NVIDIA GPUs: torch holds the memory, Triton kernels and cuBLAS do the work."""
