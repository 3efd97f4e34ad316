"""The engine's flags, shared by every verb that loads a model. Names follow vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.options import flag
from gossamer.cli.sizes import parse_size
from gossamer.config.operator_fusion import RULES as FUSION_RULES
from gossamer.config.quantization import SPELLINGS
from gossamer.errors import ConfigError, ConflictError

if TYPE_CHECKING:
    from gossamer.config import EngineConfig, Offloading

__all__ = ["EngineFlags"]

_MODEL, _MEMORY, _BATCHING, _MACHINE = "Model", "Memory", "Batching", "Machine"
_SUGGESTIONS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """What the user said about the engine; None means nothing."""

    # fmt: off
    model: Annotated[str | None, typer.Argument(
        metavar="MODEL", envvar="GOSSAMER_MODEL", show_envvar=False, show_default=False,
        help="A directory, a hub id (owner/name), or gossamer/pocket.")] = None
    model_flag: Annotated[str | None, typer.Option(
        "--model", "-m", metavar="MODEL", rich_help_panel=_MODEL, help="The same as MODEL.")] = None
    revision: Annotated[str | None, flag(
        "--revision", panel=_MODEL, metavar="REF", help="Branch, tag or commit of a hub id.")] = None
    dtype: Annotated[str, flag(
        "--dtype", panel=_MODEL, metavar="TYPE",
        help="Weights in auto (as config.json says), float32, bfloat16 or float16.")] = "auto"
    quantization: Annotated[str | None, flag(
        "--quantization", "-q", panel=_MODEL, metavar="FORMAT",
        help=f"Weights in {SPELLINGS}.")] = None
    weight_format: Annotated[list[str] | None, flag(
        "--weight-format", panel=_MODEL, metavar="PATTERN=FORMAT",
        help="Store matrices of these names otherwise: 'layers.*.mlp.down_proj=int8', head=bf16. Repeatable; "
        "the first that matches decides. `gossamer graph MODEL --formats` shows the names.")] = None
    sparse_weights: Annotated[bool | None, flag(
        "--sparse-weights/--no-sparse-weights", panel=_MODEL, show_default=False,
        help="Look for matrices that are mostly zeros, and store and read the other numbers alone (int8 and "
        "bfloat16); or store zeros even where the checkpoint says that it is sparse.")] = None
    load_format: Annotated[str, flag(
        "--load-format", panel=_MODEL, metavar="FORMAT",
        help="auto, safetensors, or dummy: random weights from config.json alone.")] = "auto"
    dummy_sparsity: Annotated[str | None, flag(
        "--dummy-sparsity", panel=_MODEL, metavar="SHARE",
        help="Zeros in the blocks of dummy weights: 0.5, or 2:4.")] = None
    ignore_config_field: Annotated[list[str] | None, flag(
        "--ignore-config-field", panel=_MODEL, metavar="NAME",
        help="Accept a config.json field that is not understood. Repeatable.")] = None
    no_weight_cache: Annotated[bool, flag(
        "--no-weight-cache", panel=_MODEL,
        help="Do not keep packed weights on disk for the next start.")] = False
    weight_cache_limit: Annotated[str | None, flag(
        "--weight-cache-limit", panel=_MODEL, metavar="SIZE",
        help="Most that all packed weights may take on disk; the least recently used go first.")] = None
    max_model_len: Annotated[int | None, flag(
        "--max-model-len", "--ctx-size", "-c", panel=_MEMORY, metavar="TOKENS",
        help="Longest sequence, prompt and output together.")] = None
    kv_cache_dtype: Annotated[str, flag(
        "--kv-cache-dtype", panel=_MEMORY, metavar="TYPE",
        help="Keys and values in bfloat16, float16, float32, int8, int4 or (on GPUs) fp8.")] = "bfloat16"
    kv_bytes: Annotated[str | None, flag(
        "--kv-bytes", panel=_MEMORY, metavar="SIZE", help="Size of the KV pool: 2GiB, 500M.")] = None
    memory_budget: Annotated[str | None, flag(
        "--memory-budget", panel=_MEMORY, metavar="SIZE",
        help="Most memory to take in all; a model that needs more is refused.")] = None
    offload: Annotated[str | None, flag(
        "--offload", panel=_MEMORY, metavar="SIZE",
        help="With --device cuda: layers that do not fit lie in host memory and are streamed in every step; "
        "auto, or the device memory that weights may take.")] = None
    page_size: Annotated[int | None, flag(
        "--page-size", panel=_MEMORY, metavar="TOKENS",
        help="Tokens in a KV page, a multiple of 16; 16 if not given.")] = None
    swap_bytes: Annotated[str | None, flag(
        "--swap-bytes", panel=_MEMORY, metavar="SIZE",
        help="For KV pages of sequences that had to make room: a file; of a GPU's, host memory.")] = None
    swap_directory: Annotated[str | None, flag(
        "--swap-directory", panel=_MEMORY, metavar="DIR",
        help="Where that file lies; in the cache directory if not given.")] = None
    no_paged_attention: Annotated[bool, flag(
        "--no-paged-attention", panel=_MEMORY,
        help="Contiguous KV: every sequence reserves --max-model-len.")] = False
    enable_prefix_caching: Annotated[bool | None, flag(
        "--enable-prefix-caching/--no-enable-prefix-caching", panel=_MEMORY,
        help="Keep pages of earlier prompts, and use them for prompts that begin alike.")] = None
    preempt_by: Annotated[str | None, flag(
        "--preempt-by", panel=_MEMORY, metavar="HOW",
        help="What becomes of the pages of a request that makes room: recompute, swap or auto, the "
        "cheaper.")] = None
    no_memory_reuse: Annotated[bool, flag(
        "--no-memory-reuse", panel=_MEMORY, help="One buffer per intermediate, no shared arena.")] = False
    no_dynamic_shapes: Annotated[bool, flag(
        "--no-dynamic-shapes", panel=_BATCHING,
        help="Pad every step to --max-num-batched-tokens tokens, as if shapes were fixed.")] = False
    no_flash_attention: Annotated[bool, flag(
        "--no-flash-attention", panel=_MACHINE,
        help="Write the scores of attention to memory, which then holds those of a whole step.")] = False
    no_operator_fusion: Annotated[bool, flag(
        "--no-operator-fusion", panel=_MACHINE, help="Run every op by itself.")] = False
    no_fusion_rule: Annotated[list[str] | None, flag(
        "--no-fusion-rule", panel=_MACHINE, metavar="NAME",
        help=f"Leave out one fusion rule: {', '.join(FUSION_RULES)}. Repeatable.")] = None
    no_layer_fusion: Annotated[bool, flag(
        "--no-layer-fusion", panel=_MACHINE,
        help="Run each op over all tokens of a step instead of whole blocks over tiles of them.")] = False
    layer_fusion_rows: Annotated[int | None, flag(
        "--layer-fusion-rows", panel=_MACHINE, metavar="TOKENS",
        help="Tokens that go through a whole block at a time.")] = None
    max_num_seqs: Annotated[int | None, flag(
        "--max-num-seqs", "-np", panel=_BATCHING, metavar="N", help="Most sequences running at once.")] = None
    max_num_batched_tokens: Annotated[int | None, flag(
        "--max-num-batched-tokens", panel=_BATCHING, metavar="N", help="Most tokens in one step.")] = None
    prefill_chunk: Annotated[int | None, flag(
        "--prefill-chunk", panel=_BATCHING, metavar="TOKENS",
        help="Most prompt tokens of one request in one step.")] = None
    static_batching: Annotated[str | None, flag(
        "--static-batching", panel=_BATCHING, metavar="KIND",
        help="ragged or padded: whole batches instead of continuous ones, as a baseline.")] = None
    speculative_config: Annotated[str | None, flag(
        "--speculative-config", panel=_BATCHING, metavar="JSON",
        help="Guess tokens and verify them together: "
        '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}, '
        '{"method": "draft_model", "model": MODEL}, or {"method": "eagle"} with a trained head.')] = None
    itl_goal_ms: Annotated[float | None, flag(
        "--itl-goal-ms", panel=_BATCHING, metavar="MS",
        help="Time between a request's tokens that 95 % of them should not exceed: steps and sequences adapt "
        "to hold it.")] = None
    max_wait_ms: Annotated[float | None, flag(
        "--max-wait-ms", panel=_BATCHING, metavar="MS",
        help="Let newcomers join together: when they fill the free places, or the first has waited so "
        "long.")] = None
    length_buckets: Annotated[bool, flag(
        "--length-buckets", panel=_BATCHING,
        help="Make static batches of prompts of like length.")] = False
    backend: Annotated[str, flag(
        "--backend", "--device", panel=_MACHINE, metavar="NAME",
        help="cpu (native kernels), cuda (an NVIDIA GPU) or reference (eager torch).")] = "cpu"
    isa: Annotated[str | None, flag(
        "--isa", panel=_MACHINE, metavar="NAME", help="Force scalar, avx2 or avx512 kernels.")] = None
    no_autotune: Annotated[bool, flag(
        "--no-autotune", panel=_MACHINE,
        help="Cut layers into tiles by default instead of by measurement at the first start.")] = False
    threads: Annotated[int | None, flag(
        "--threads", "-t", panel=_MACHINE, metavar="N",
        help="Worker threads; one per usable processor if not given.")] = None
    # fmt: on

    def config(self, **suggested: Any) -> EngineConfig:
        """The engine's configuration. suggested: max_model_len, max_num_seqs or max_num_batched_tokens for
        where the user said nothing, or model. Raises GossamerError for values that cannot be."""
        from gossamer.config import SparseWeights
        from gossamer.config.weight_formats import parse_pair
        from gossamer.llm import engine_config

        model = self.model_flag or self.model or suggested.get("model")
        if not model:
            raise ConfigError(
                "no model was given: pass a directory, a hub id (owner/name) or gossamer/pocket"
            )
        options: dict[str, Any] = {
            "kv_bytes": None if self.kv_bytes is None else parse_size(self.kv_bytes),
            "memory_budget": None if self.memory_budget is None else parse_size(self.memory_budget),
            "ignore_config_fields": tuple(self.ignore_config_field or ()),
            "weight_formats": [parse_pair(text) for text in self.weight_format or ()],
            "weight_cache_limit": None
            if self.weight_cache_limit is None
            else parse_size(self.weight_cache_limit),
            "weight_cache": not self.no_weight_cache,
            "dummy_sparsity": self.dummy_sparsity,
        }
        for name in _SUGGESTIONS:
            given = getattr(self, name)
            if given is not None or suggested.get(name) is not None:
                options[name] = suggested[name] if given is None else given
        if self.sparse_weights is not None:
            options["sparse_weights"] = SparseWeights(count=True) if self.sparse_weights else None
        if self.no_paged_attention:
            options["paged_attention"] = None
        for name in ("memory_reuse", "dynamic_shapes", "flash_attention"):
            if getattr(self, f"no_{name}"):
                options[name] = None
        if self.offload is not None:
            options["offloading"] = self._offloading(self.offload)
        options |= self._fusion()
        if self.static_batching is not None:
            options |= self._static()
        elif self.length_buckets:
            raise ConflictError(
                ["--length-buckets shapes static batches, continuous ones have no use for like lengths"],
                [["with --static-batching ragged"], ["without --length-buckets"]],
            )
        return engine_config(
            model,
            revision=self.revision,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            load_format=self.load_format,
            page_size=self.page_size,
            swap_bytes=None if self.swap_bytes is None else parse_size(self.swap_bytes),
            swap_directory=self.swap_directory,
            speculative_config=self.speculative_config,
            prefill_chunk=self.prefill_chunk,
            preempt_by=self.preempt_by,
            enable_prefix_caching=self.enable_prefix_caching,
            itl_goal_ms=self.itl_goal_ms,
            max_wait_ms=self.max_wait_ms,
            isa=self.isa,
            autotune=not self.no_autotune,
            threads=self.threads,
            backend=self.backend,
            **options,
        )

    def _fusion(self) -> dict[str, Any]:
        from gossamer.config import LayerFusion, OperatorFusion
        from gossamer.config.conflicts import belong

        if self.no_operator_fusion:
            rules = {"--no-fusion-rule": self.no_fusion_rule or None}
            belong(rules, "operator fusion", "--no-operator-fusion")
        if self.no_layer_fusion:
            belong({"--layer-fusion-rows": self.layer_fusion_rows}, "layer fusion", "--no-layer-fusion")
        without = tuple(self.no_fusion_rule or ())
        operators = None if self.no_operator_fusion else OperatorFusion(without=without)
        rows = LayerFusion() if self.layer_fusion_rows is None else LayerFusion(rows=self.layer_fusion_rows)
        return {"operator_fusion": operators, "layer_fusion": None if self.no_layer_fusion else rows}

    @staticmethod
    def _offloading(text: str) -> Offloading:
        from gossamer.config import Offloading

        return Offloading(device_bytes=None if text == "auto" else parse_size(text))

    def _static(self) -> dict[str, Any]:
        from gossamer.config import StaticBatching

        if self.static_batching not in ("ragged", "padded"):
            raise ConfigError(f"static batching {self.static_batching!r} is unknown; choose ragged or padded")
        return {
            "continuous_batching": None,
            "static_batching": StaticBatching(
                padded=self.static_batching == "padded", length_buckets=self.length_buckets
            ),
        }
