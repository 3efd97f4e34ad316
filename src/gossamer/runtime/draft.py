"""The draft of speculative decoding: its graph, its share of the memory, and whether it speaks as the model
does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gossamer.backends.cpu.formats import kv_page_bytes
from gossamer.checkpoint.heads import find_head, load_head
from gossamer.checkpoint.tokenizer import Tokenizer, has_tokenizer
from gossamer.checkpoint.weights import DummySource, WeightSource
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError
from gossamer.graph.families.eagle import build_eagle
from gossamer.graph.ir import Graph
from gossamer.runtime.sizing import KVPlan

__all__ = ["check_draft", "draft_config", "draft_pages", "has_head", "head_of"]


def draft_config(config: EngineConfig, kv: KVPlan) -> EngineConfig | None:
    """What the draft is loaded by; None where the method has no model of its own.

    It is the model's own configuration but for the name and, where that is said, the format of weights.
    """
    speculative = config.speculative_decoding
    if speculative is None or speculative.method == "ngram":
        return None
    own = replace(
        config,
        model=speculative.model or config.model,
        revision=None,
        max_model_len=kv.max_model_len,
        speculative_decoding=None,
        weight_formats=(),
        # What the checkpoint declares alone: that it was asked of the model says nothing of the draft.
        sparse_weights=None if config.sparse_weights is None else replace(config.sparse_weights, count=False),
    )
    if speculative.quantization is None:
        return own
    return replace(own, quantization=speculative.quantization, mixed_precision=None)


def has_head(config: EngineConfig) -> bool:
    """Whether the draft is a trained head, which takes the model's hidden states."""
    return config.speculative_decoding is not None and config.speculative_decoding.method == "eagle"


def head_of(
    config: EngineConfig, target: Graph, directory: Path, source: WeightSource
) -> tuple[Graph, WeightSource]:
    """The head's graph before any pass and where its weights come from. target, directory, source: the
    model's, before any pass. Raises ConfigError where there is no head, CheckpointError for another's."""
    if config.load_format == "dummy":
        head = build_eagle(target)
        return head, DummySource(head)
    assert config.speculative_decoding is not None
    return load_head(find_head(config.speculative_decoding.model, directory), target, source)


def draft_pages(graph: Graph, config: EngineConfig, kv: KVPlan, budget: int) -> int:
    """Pages of each of the draft's KV groups: as many as the model has where an eighth of the budget (or
    kv_bytes) holds them, one longest sequence at least."""
    limit = config.kv_bytes if config.kv_bytes is not None else budget // 8
    fits = limit // kv_page_bytes(graph, kv.page_size, config.kv_dtype)
    return min(kv.pages, max(fits, -(-kv.max_model_len // kv.page_size)))


def check_draft(config: EngineConfig, target: Graph, draft: Graph, kv: KVPlan, *directories: Path) -> None:
    """Raises ConfigError where the draft's tokens mean something else or its context is too short.

    directories: of the model and of the draft.
    """
    speculative = config.speculative_decoding
    assert speculative is not None
    names = f"the draft model {speculative.model} and the model {config.model}"
    if draft.vocab != target.vocab:
        raise ConfigError(
            f"{names} have vocabularies of {draft.vocab} and {target.vocab} tokens; take a draft of the same "
            "tokenizer, or the method ngram"
        )
    if draft.reach < kv.max_model_len:
        raise ConfigError(
            f"the draft model {speculative.model} serves {draft.reach} positions, fewer than the "
            f"{kv.max_model_len} of max_model_len; give --max-model-len {draft.reach}, or another draft"
        )
    if difference := _difference(*directories):
        raise ConfigError(
            f"{names} have different tokenizers: {difference}; take a draft of the same tokenizer, or the "
            "method ngram"
        )


def _difference(target: Path, draft: Path) -> str:
    """What differs between two directories' tokenizers; "" where nothing does or either has none."""
    if not (has_tokenizer(draft) and has_tokenizer(target)):
        return ""  # prompts are token ids then, and the sizes of the vocabularies agree
    files = [directory / "tokenizer.json" for directory in (draft, target)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return ""
    one, other = Tokenizer.load(draft), Tokenizer.load(target)
    if one.vocab_size != other.vocab_size:
        return f"{one.vocab_size} and {other.vocab_size} entries"
    for token in range(one.vocab_size):
        first, second = one.token_bytes(token), other.token_bytes(token)
        if first != second:
            return f"token {token} is {first!r} in the one, {second!r} in the other"
    if one.special_ids != other.special_ids:
        token = min(one.special_ids ^ other.special_ids)
        return f"token {token} ({one.token_bytes(token)!r}) is special in one of them alone"
    return ""
