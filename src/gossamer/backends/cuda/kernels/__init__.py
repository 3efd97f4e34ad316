"""Triton kernels, each behind a function over torch tensors; they run in Triton's interpreter, too."""
