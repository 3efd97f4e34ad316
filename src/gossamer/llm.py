"""The Python interface: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from gossamer.backends.base import MemoryReport, ReceiptLine
from gossamer.config import (
    ContinuousBatching,
    DynamicBatching,
    EngineConfig,
    HardwareKernels,
    MixedPrecision,
    PagedAttention,
    ParallelComputing,
    Quantization,
    SpeculativeDecoding,
)
from gossamer.config.conflicts import belong
from gossamer.config.dynamic_batching import GOAL_LIMITS
from gossamer.config.weight_formats import FLOATS, weight_formats
from gossamer.engine.request import Completion, RequestOutput, SamplingParams
from gossamer.errors import ConfigError, RequestError
from gossamer.progress import loading_bar, token_bar
from gossamer.text_engine import TextEngine, TextUpdate

__all__ = ["LLM", "engine_config"]

Prompt = str | Sequence[int]
_KV_DTYPES = {
    "auto": "bf16", "bfloat16": "bf16", "float16": "f16", "fp16": "f16", "float32": "f32", "fp32": "f32",
    "fp8_e4m3": "fp8",
}  # fmt: skip

_TEXTS = {"model", "revision", "dtype", "quantization", "kv_cache_dtype", "isa", "swap_directory"}
_COUNTS = {
    "threads", "page_size", "prefill_chunk", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "kv_bytes", "memory_budget", "weight_cache_limit", "swap_bytes",
}  # fmt: skip
_BYTES = {"kv_bytes", "memory_budget", "weight_cache_limit", "swap_bytes"}
_NEEDED = {
    "model", "dtype", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens",
}  # fmt: skip


def engine_config(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    kv_cache_dtype: str = "bf16",
    isa: str | None = None,
    autotune: bool = True,
    threads: int | None = None,
    page_size: int | None = None,
    swap_bytes: int | None = None,
    swap_directory: str | None = None,
    prefill_chunk: int | None = None,
    preempt_by: str | None = None,
    enable_prefix_caching: bool | None = None,
    speculative_config: str | Mapping[str, Any] | None = None,
    itl_goal_ms: float | None = None,
    max_wait_ms: float | None = None,
    **options: Any,
) -> EngineConfig:
    """An EngineConfig from the names people type.

    dtype: auto (what config.json says the checkpoint is), float32, bfloat16 or float16; quantization:
    int8, int4, uint4 or nf4, or one with its group (int8-g16, int8-g32; int4-g32, int4-g64, int4-g128, and so
    uint4 and nf4); weight_formats: {pattern: format} for matrices that are to be stored otherwise, such as
    {"layers.*.mlp.down_proj": "int8", "head": "bf16"}; kv_cache_dtype: float32, bfloat16, float16, int8 or
    int4; isa: scalar, avx2 or avx512 (None: $GOSSAMER_ISA, else the best there is); autotune: measure how to
    cut layers into tiles at the first start; swap_bytes: size of a file in swap_directory for KV pages of
    sequences that had to make room; speculative_config: {"method": "ngram", "num_speculative_tokens": 4,
    "prompt_lookup_max": 4}, or {"method": "draft_model", "model": ...}, as a mapping or as JSON (see
    SpeculativeDecoding); itl_goal_ms and max_wait_ms: those of DynamicBatching; the rest are fields of
    EngineConfig (whose max_num_seqs and max_num_batched_tokens are 256 and 1024 where there is an
    itl_goal_ms). Raises ConfigError for anything else, and CheckpointError where config.json cannot be read.
    """
    half = None
    model = str(model) if isinstance(model, os.PathLike) else model
    _check_types(
        {"model": model, "dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
        | {"isa": isa, "threads": threads, "page_size": page_size, "prefill_chunk": prefill_chunk}
        | {"preempt_by": preempt_by, "swap_bytes": swap_bytes, "swap_directory": swap_directory}
        | options
    )
    _check_names(options)
    if enable_prefix_caching not in (None, True, False):
        raise ConfigError(f"enable_prefix_caching is {enable_prefix_caching!r}; True or False is right")
    if enable_prefix_caching is False:
        if options.get("prefix_cache") is not None:
            raise ConfigError("prefix_cache turns on what enable_prefix_caching turns off; leave one out")
        options["prefix_cache"] = None
    if itl_goal_ms is not None or max_wait_ms is not None:
        if options.get("dynamic_batching") is not None:
            raise ConfigError("dynamic_batching holds itl_goal_ms and max_wait_ms; give them there or alone")
        options["dynamic_batching"] = DynamicBatching(itl_goal_ms=itl_goal_ms, max_wait_ms=max_wait_ms)
    if options.get("static_batching") is not None:
        given = {"--prefill-chunk": prefill_chunk, "--preempt-by": preempt_by}
        belong(given, "continuous batching", "--static-batching")
        options.setdefault("continuous_batching", None)
    if dtype != "auto" and dtype not in FLOATS:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    if dtype != "auto":
        half = FLOATS[dtype]
    elif quantization is None:
        half = _checkpoint_dtype(model, options.get("revision"))
    if "weight_formats" in options:
        options["weight_formats"] = weight_formats(options["weight_formats"])
    pages: dict[str, Any] = {
        name: value
        for name, value in (
            ("page_size", page_size),
            ("swap_bytes", swap_bytes),
            ("swap_directory", swap_directory),
        )
        if value is not None
    }
    defaults: dict[str, Any] = {
        "quantization": None if quantization is None else Quantization.parse(quantization),
        "mixed_precision": None if half is None else MixedPrecision(dtype=half),  # type: ignore[arg-type]
        "kv_dtype": _KV_DTYPES.get(kv_cache_dtype, kv_cache_dtype),
        "hardware_kernels": HardwareKernels(
            isa=isa or os.environ.get("GOSSAMER_ISA") or None,  # type: ignore[arg-type]
            autotune=autotune,
        ),
        "parallel_computing": ParallelComputing(threads=threads),
        "paged_attention": PagedAttention(**pages),
        "speculative_decoding": None
        if speculative_config is None
        else SpeculativeDecoding.parse(speculative_config),
    }
    if options.get("paged_attention", True) is None:
        defaults["prefix_cache"] = None
        given = {"--" + name.replace("_", "-"): value for name, value in pages.items()}
        given["--enable-prefix-caching"] = enable_prefix_caching or None
        belong(given, "PagedAttention", "--no-paged-attention")
    if options.get("static_batching") is None:
        defaults["continuous_batching"] = ContinuousBatching(
            prefill_chunk=prefill_chunk,
            preempt_by=preempt_by or "auto",  # type: ignore[arg-type]
        )
    dynamic = options.get("dynamic_batching")
    if isinstance(dynamic, DynamicBatching) and dynamic.itl_goal_ms is not None:
        defaults |= GOAL_LIMITS
    return EngineConfig(model=model, **(defaults | options))


def _check_names(options: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(EngineConfig)}
    for name in options.keys() - known:
        parameters = inspect.signature(engine_config).parameters
        near = get_close_matches(name, sorted(known | parameters.keys() - {"options"}), 1)
        raise ConfigError(
            f"there is no option {name!r}; "
            + (f"did you mean {near[0]!r}?" if near else "help(gossamer.llm.engine_config) lists them")
        )


def _check_types(given: Mapping[str, Any]) -> None:
    for name in _TEXTS | _COUNTS:
        value = given.get(name)
        if value is None and (name not in given or name not in _NEEDED):
            continue
        if isinstance(value, bool) or not isinstance(value, str if name in _TEXTS else int):
            raise ConfigError(
                f"{name} is {value!r}; a {'text' if name in _TEXTS else 'whole number'}"
                f"{' of bytes' if name in _BYTES else ''} is right"
            )


def _checkpoint_dtype(model: str, revision: str | None) -> str | None:
    from gossamer.checkpoint.hub import read_config, resolve_model

    config = read_config(resolve_model(model, revision))
    named = config.get("torch_dtype") or config.get("dtype") or "float32"
    return FLOATS.get(str(named).removeprefix("torch."))


class LLM:
    """A model in this process.

    Threads may share it; their calls take turns. Arguments: those of `engine_config`. Raises
    GossamerError for anything a user can mend; memory is checked before any is taken.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        chat_template: str | None = None,
        progress: bool = False,
        **options: Any,
    ):
        config = engine_config(model, **options)
        with loading_bar(progress) as bar:
            self.engine = TextEngine.start(config, chat_template=chat_template, progress=bar)
        self._turn = threading.Lock()

    @property
    def memory(self) -> MemoryReport:
        """Bytes taken at start, by purpose."""
        return self.engine.started.memory

    def receipt(self) -> list[ReceiptLine]:
        """What ran so far: node -> kernel, instruction set, calls, rows, bytes, seconds, share, GB/s."""
        return self.engine.started.receipt()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues prompts (texts or lists of token ids), all together; outputs in the prompts' order.

        sampling_params: one for all or one for each; None: the model's own defaults. cache_salt:
        prompts of another salt share no prefixes with these. use_tqdm: show a progress bar on standard error.
        Raises RequestError for an invalid prompt before anything runs.
        """
        listed = _as_list(prompts)
        return self._run([(p, self.engine.encode(p)) for p in listed], sampling_params, use_tqdm, cache_salt)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or several through the model's chat template."""
        if not messages:
            raise RequestError("the conversation is empty; give at least one message")
        several = not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        ids = [self.engine.encode_chat(c, **template_options) for c in conversations]
        return self._run([(None, i) for i in ids], sampling_params, use_tqdm, cache_salt)

    def _run(
        self,
        prompts: Sequence[tuple[Prompt | None, tuple[int, ...]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        show: bool,
        cache_salt: str,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.engine.default_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence) or not all(
            isinstance(params, SamplingParams) for params in sampling_params
        ):
            raise RequestError("sampling_params is not a SamplingParams, nor a list with one for each prompt")
        if len(sampling_params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(sampling_params)} sampling parameters")
        if not isinstance(cache_salt, str):
            raise RequestError(f"cache_salt is {type(cache_salt).__name__}; a text is right")
        outputs: dict[str, RequestOutput] = {}
        with self._turn:
            try:
                for (prompt, ids), params in zip(prompts, sampling_params, strict=True):
                    request_id = self.engine.new_id()
                    self.engine.submit(request_id, ids, params, cache_salt=cache_salt)
                    completions = [
                        Completion(index=i, logprobs=None if params.logprobs is None else [])
                        for i in range(params.n)
                    ]
                    text = prompt if isinstance(prompt, str) else None
                    outputs[request_id] = RequestOutput(request_id, ids, completions, text)
                with token_bar(show, len(outputs)) as advance:
                    for update in self.engine.run():
                        _add(outputs[update.request_id], update)
                        advance(len(update.tokens), int(outputs[update.request_id].finished))
            except BaseException:
                for request_id in outputs:
                    self.engine.abort(request_id)
                raise
        return list(outputs.values())


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise RequestError(
            f"prompts are {type(prompts).__name__}; give a text, a list of token ids, or a list of such"
        )
    listed = list(prompts)
    if listed and all(isinstance(p, Integral) for p in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _add(output: RequestOutput, update: TextUpdate) -> None:
    completion = output.outputs[update.index]
    completion.text += update.text
    completion.token_ids += update.tokens
    if completion.logprobs is not None and update.logprobs is not None:
        completion.logprobs += update.logprobs
    completion.finish_reason, completion.stop_reason = update.finish_reason, update.stop_reason
    output.times = dict(update.times)
    output.num_cached_tokens = update.cached
    if update.prompt_logprobs is not None:
        output.prompt_logprobs = update.prompt_logprobs
