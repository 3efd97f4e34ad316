"""Everything an engine is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from gossamer.config.conflicts import check
from gossamer.config.continuous_batching import ContinuousBatching
from gossamer.config.dynamic_batching import DynamicBatching
from gossamer.config.dynamic_shapes import DynamicShapes
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
from gossamer.config.sparse_weights import SparseWeights, parse_sparsity
from gossamer.config.speculative_decoding import SpeculativeDecoding
from gossamer.config.static_batching import StaticBatching
from gossamer.config.weight_formats import WeightFormats, weight_formats
from gossamer.errors import ConfigError

BackendName = Literal["cpu", "cuda", "reference"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
KVType = Literal["f32", "f16", "bf16", "int8", "int4", "fp8"]
_TECHNIQUES: dict[str, type] = {
    "quantization": Quantization, "mixed_precision": MixedPrecision, "operator_fusion": OperatorFusion,
    "layer_fusion": LayerFusion, "paged_attention": PagedAttention, "prefix_cache": PrefixCache,
    "memory_reuse": MemoryReuse, "hardware_kernels": HardwareKernels, "parallel_computing": ParallelComputing,
    "continuous_batching": ContinuousBatching, "static_batching": StaticBatching,
    "speculative_decoding": SpeculativeDecoding, "dynamic_batching": DynamicBatching,
    "sparse_weights": SparseWeights, "flash_attention": FlashAttention, "dynamic_shapes": DynamicShapes,
    "offloading": Offloading,
}  # fmt: skip
_MOST = {"max_num_seqs": 1 << 16, "max_num_batched_tokens": 1 << 20}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One model on one machine. Limits are in tokens, sequences and bytes."""

    model: str
    """A directory, a hub id, or gossamer/pocket."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    load_format: LoadFormat = "auto"
    """"dummy" builds deterministic random weights from config.json alone."""
    dummy_sparsity: str | None = None
    """Share of zeros in the blocks' matrices of dummy weights, "0.5", or a pattern, "2:4"."""
    ignore_config_fields: tuple[str, ...] = ()
    """Fields of config.json to accept although no family here understands them."""
    weight_cache: bool = True
    """Whether weights in the native layout are kept on disk for the next start (64 MiB and up)."""
    weight_cache_limit: int | None = None
    """Most bytes that the whole cache may take on disk; the least recently used goes first."""
    backend: BackendName = "cpu"
    """"cpu" (native kernels), "cuda" (NVIDIA GPUs) or "reference" (eager torch, the oracle)."""

    quantization: Quantization | None = None
    mixed_precision: MixedPrecision | None = None
    weight_formats: WeightFormats = ()
    """(pattern, format) pairs over the names of weights and nodes; they win over the two above."""
    sparse_weights: SparseWeights | None = field(default_factory=SparseWeights)
    operator_fusion: OperatorFusion | None = field(default_factory=OperatorFusion)
    layer_fusion: LayerFusion | None = field(default_factory=LayerFusion)
    paged_attention: PagedAttention | None = field(default_factory=PagedAttention)
    prefix_cache: PrefixCache | None = field(default_factory=PrefixCache)
    offloading: Offloading | None = None
    memory_reuse: MemoryReuse | None = field(default_factory=MemoryReuse)
    flash_attention: FlashAttention | None = field(default_factory=FlashAttention)
    dynamic_shapes: DynamicShapes | None = field(default_factory=DynamicShapes)
    hardware_kernels: HardwareKernels | None = field(default_factory=HardwareKernels)
    parallel_computing: ParallelComputing | None = field(default_factory=ParallelComputing)
    continuous_batching: ContinuousBatching | None = field(default_factory=ContinuousBatching)
    static_batching: StaticBatching | None = None
    speculative_decoding: SpeculativeDecoding | None = None
    dynamic_batching: DynamicBatching | None = None
    """Adapts what is on; without it a step holds what the two limits below allow."""

    kv_dtype: KVType = "bf16"
    """What keys and values are stored in; int8, int4 and fp8 with one scale per token and head. The reference
    backend holds the same values in f32."""
    max_model_len: int | None = None
    """Longest sequence, prompt and output together; None: the model's own, cut to what memory holds."""
    max_num_seqs: int = 32
    """Most sequences running at once."""
    max_num_batched_tokens: int = 512
    """Most tokens in one step."""
    kv_bytes: int | None = None
    """Size of the KV pool; None: max_num_seqs sequences of max_model_len, at most an eighth of memory (but
    one sequence of a max_model_len that was asked for)."""
    memory_budget: int | None = None
    """Most bytes that the process may take: weights, KV, arena and workspace, and beside them interpreter,
    libraries, tokenizer and the engine's objects; never more than the machine and its control group have
    free, which is what None means."""

    def __post_init__(self) -> None:
        for name, technique in _TECHNIQUES.items():
            given = getattr(self, name)
            if given is not None and not isinstance(given, technique):
                raise ConfigError(
                    f"{name} is {given!r}; gossamer.config.{technique.__name__}(...) turns it on, None off"
                )
        for name, value, allowed in (
            ("backend", self.backend, get_args(BackendName)),
            ("load format", self.load_format, get_args(LoadFormat)),
            ("KV dtype", self.kv_dtype, get_args(KVType)),
        ):
            if name == "KV dtype" and value.startswith("fp8_"):
                raise ConfigError(
                    f"KV dtype {value!r} does not exist here; fp8 (E4M3, on GPUs) and int8 are nearest to it"
                )
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is unknown; choose {', '.join(allowed)}")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_bytes",
            "memory_budget",
            "weight_cache_limit",
        ):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} {number} must be at least 1")
            if number is not None and number > _MOST.get(name, number):
                raise ConfigError(f"{name} {number} must be at most {_MOST[name]}")
        weight_formats(self.weight_formats)
        if self.dummy_sparsity is not None:
            parse_sparsity(self.dummy_sparsity)
        check(self)
