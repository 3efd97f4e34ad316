"""Measuring what really happens: workloads, steps, memory, and fractions of limits probed in the same run."""
