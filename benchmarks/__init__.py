"""Benchmarks run by hand: native kernels alone (kernels.py), other engines beside this one (peers/)."""
