"""Eager torch interpreter of the graph: the oracle, and the executor of calibration and training."""

from gossamer.backends.reference.module import ReferenceModel, export_tensors

__all__ = ["ReferenceModel", "export_tensors"]
