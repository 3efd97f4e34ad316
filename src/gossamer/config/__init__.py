"""Frozen, keyword-only configs: one small one per technique, composed by `EngineConfig`.

Presence of a technique's config means on, `None` means off; ablation is `replace(config, x=None)`.
"""

from gossamer.config.continuous_batching import ContinuousBatching
from gossamer.config.dynamic_batching import DynamicBatching
from gossamer.config.dynamic_shapes import DynamicShapes
from gossamer.config.engine import EngineConfig
from gossamer.config.flash_attention import FlashAttention
from gossamer.config.hardware_kernels import HardwareKernels
from gossamer.config.layer_fusion import LayerFusion
from gossamer.config.memory_reuse import MemoryReuse
from gossamer.config.mixed_precision import MixedPrecision
from gossamer.config.offloading import Offloading
from gossamer.config.operator_fusion import OperatorFusion
from gossamer.config.paged_attention import PagedAttention
from gossamer.config.parallel_computing import ParallelComputing
from gossamer.config.prefix_cache import PrefixCache
from gossamer.config.quantization import Quantization
from gossamer.config.sparse_weights import SparseWeights
from gossamer.config.speculative_decoding import SpeculativeDecoding
from gossamer.config.static_batching import StaticBatching

__all__ = [
    "ContinuousBatching",
    "DynamicBatching",
    "DynamicShapes",
    "EngineConfig",
    "FlashAttention",
    "HardwareKernels",
    "LayerFusion",
    "MemoryReuse",
    "MixedPrecision",
    "Offloading",
    "OperatorFusion",
    "PagedAttention",
    "ParallelComputing",
    "PrefixCache",
    "Quantization",
    "SparseWeights",
    "SpeculativeDecoding",
    "StaticBatching",
]
