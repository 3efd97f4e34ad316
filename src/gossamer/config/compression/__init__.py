"""The steps that a recipe of `gossamer compress` is made of, one frozen config each.

A step says what is done, never to which model: `gossamer.compress.recipe` reads steps from TOML, and
`gossamer.compress.run` applies them in order.
"""

from __future__ import annotations

from gossamer.config.compression.prune import Magnitude, SparseGPT, Structured, Wanda
from gossamer.config.compression.quantize import AWQ, GPTQ, RTN, KVCalibration, MixedBits, SmoothQuant
from gossamer.config.compression.train import Distil, Recover

__all__ = [
    "AWQ", "GPTQ", "RTN", "Distil", "KVCalibration", "Magnitude", "MixedBits", "Recover", "SmoothQuant",
    "SparseGPT", "StepConfig", "Structured", "Wanda",
]  # fmt: skip

StepConfig = (
    RTN | GPTQ | AWQ | SmoothQuant | MixedBits | KVCalibration | Magnitude | Wanda | SparseGPT | Structured
    | Recover | Distil
)  # fmt: skip
