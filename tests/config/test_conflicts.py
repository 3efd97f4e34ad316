"""Combinations that cannot be: every reason, and the nearest that can, which no smaller change reaches."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.config import (
    ContinuousBatching,
    DynamicBatching,
    DynamicShapes,
    EngineConfig,
    FlashAttention,
    HardwareKernels,
    MixedPrecision,
    Offloading,
    PagedAttention,
    PrefixCache,
    Quantization,
    SpeculativeDecoding,
    StaticBatching,
)
from gossamer.config.conflicts import adapt, broken
from gossamer.config.memory_reuse import MemoryReuse
from gossamer.config.rules import RULES, Choices
from gossamer.errors import ConfigError, ConflictError
from gossamer.llm import engine_config
from gossamer.techniques import CARDS

EAGLE = SpeculativeDecoding(method="eagle")
SWAP = ContinuousBatching(preempt_by="swap")
STATIC = {"continuous_batching": None, "static_batching": StaticBatching()}


def refused(**choices: Any) -> ConflictError:
    with pytest.raises(ConflictError) as caught:
        EngineConfig(model="m", **choices)
    return caught.value


@pytest.mark.parametrize(
    ("choices", "reason", "ways"),
    [
        (
            {"quantization": Quantization(format="int4"), "mixed_precision": MixedPrecision()},
            "quantization int4 and mixed precision bf16 both say",
            "without --dtype, or without --quantization",
        ),
        ({"paged_attention": None}, "shares pages", "with --no-enable-prefix-caching"),
        ({"continuous_batching": None}, "both off", "with continuous_batching=ContinuousBatching(), or with "
         "--static-batching ragged"),
        ({"static_batching": StaticBatching()}, "both on", "with continuous_batching=None, or without "
         "--static-batching"),
        ({"continuous_batching": SWAP}, "slower tier", "with --swap-bytes 1GiB"),
        (
            {"continuous_batching": SWAP, "paged_attention": None, "prefix_cache": None},
            "contiguous KV has none",
            "with --preempt-by recompute, or without --no-paged-attention and with --swap-bytes 1GiB",
        ),
        (STATIC | {"speculative_decoding": EAGLE}, "without speculation", "without --static-batching, or "
         "without --speculative-config"),
        (
            STATIC | {"dynamic_batching": DynamicBatching(itl_goal_ms=40, max_wait_ms=5)},
            "a goal of 40 ms between tokens needs continuous batching",
            "without --itl-goal-ms, or without --static-batching",
        ),
        ({"max_num_seqs": 600}, "512 is below max_num_seqs 600", "with --max-num-batched-tokens 600"),
        ({"max_num_batched_tokens": 8}, "8 is below max_num_seqs 32", "with --max-num-seqs 8"),
        ({"dummy_sparsity": "2:4"}, "load_format is auto", "with --load-format dummy"),
        (
            {"backend": "reference", "speculative_decoding": replace(EAGLE, num_speculative_tokens=3)},
            "eagle is a second",
            "with --backend cpu, or with --speculative-config "
            '\'{"method": "ngram", "num_speculative_tokens": 3}\', or without --speculative-config',
        ),
        (
            {"backend": "reference", "paged_attention": PagedAttention(swap_bytes=9, swap_directory="/d")},
            "swaps no pages",
            "with --backend cpu, or without --swap-bytes and without --swap-directory",
        ),
        (
            {"backend": "reference", "hardware_kernels": HardwareKernels(isa="avx2")},
            "avx2 chooses native kernels",
            "with --backend cpu, or without --isa (and $GOSSAMER_ISA)",
        ),
        ({"backend": "reference", "flash_attention": None}, "no FlashAttention",
         "with --backend cpu, or without --no-flash-attention"),
        ({"backend": "reference", "dynamic_shapes": None}, "pads no steps",
         "with --backend cpu, or without --no-dynamic-shapes"),
        ({"quantization": Quantization(format="fp8")}, "no kernels for weights in fp8",
         "with --quantization int8"),
        ({"kv_dtype": "fp8"}, "no kernels for keys and values in fp8",
         "with --kv-cache-dtype int8"),
        ({"offloading": Offloading()}, "those of the cpu backend lie there already", "with --backend cuda"),
        (
            {"backend": "cuda", "offloading": Offloading(device_bytes=3 << 30), "flash_attention": None},
            "no other attention than FlashAttention",
            "without --no-flash-attention",
        ),
        ({"backend": "reference", "memory_reuse": None}, "no arena", "with --backend cpu, or without "
         "--no-memory-reuse"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_the_reason_and_what_to_type_instead(choices: dict[str, Any], reason: str, ways: str) -> None:
    error = refused(**choices)
    assert len(error.reasons) == 1 and reason in error.reasons[0]
    assert str(error) == f"{error.reasons[0]}. Nearest that can be: {ways}"


def test_every_reason_is_said_and_one_change_may_mend_several() -> None:
    error = refused(
        backend="reference", memory_reuse=None, hardware_kernels=HardwareKernels(isa="scalar"),
        paged_attention=PagedAttention(swap_bytes=1 << 20), max_num_seqs=999,
    )  # fmt: skip
    assert len(error.reasons) == 4 and all(reason in str(error) for reason in error.reasons)
    assert error.nearest == {"backend": "cpu", "max_num_batched_tokens": 999}
    assert error.ways == (("with --max-num-batched-tokens 999", "with --backend cpu"),)


def test_what_the_user_set_is_kept_where_a_default_can_give_way() -> None:
    assert refused(paged_attention=None).nearest == {"prefix_cache": None}
    assert refused(continuous_batching=SWAP).nearest["paged_attention"] == PagedAttention(swap_bytes=1 << 30)
    found = refused(continuous_batching=SWAP, backend="reference")  # a tier would not do there
    assert {frozenset(way) for way in found.ways} == {frozenset({"with --preempt-by recompute"})}


def test_every_interface_refuses_alike() -> None:
    with pytest.raises(ConflictError, match="without --dtype, or without --quantization"):
        engine_config("/nowhere", dtype="bfloat16", quantization="int8")
    with pytest.raises(ConflictError, match="--swap-bytes belongs to PagedAttention"):
        engine_config("gossamer/pocket", swap_bytes=1 << 20, paged_attention=None)
    with pytest.raises(ConflictError, match="--prefill-chunk and --preempt-by belong to continuous"):
        engine_config("gossamer/pocket", prefill_chunk=8, preempt_by="auto", static_batching=StaticBatching())
    with pytest.raises(ConflictError, match="without --static-batching"):
        engine_config("gossamer/pocket", itl_goal_ms=9, static_batching=StaticBatching())
    plain = EngineConfig(model="m")
    with pytest.raises(ConflictError, match="prefix cache"):
        replace(plain, paged_attention=None)


def test_one_batching_takes_the_other_s_place() -> None:
    found = engine_config("gossamer/pocket", static_batching=StaticBatching())
    assert found.continuous_batching is None


def test_adapt_changes_what_must_change_too() -> None:
    plain = EngineConfig(model="m")
    assert adapt(plain, memory_reuse=None) == replace(plain, memory_reuse=None)
    assert adapt(plain, paged_attention=None) == replace(plain, paged_attention=None, prefix_cache=None)
    static = adapt(plain, static_batching=StaticBatching(padded=True))
    assert static.continuous_batching is None
    assert adapt(static, static_batching=None) == plain
    assert adapt(plain, continuous_batching=None).static_batching == StaticBatching()
    assert adapt(replace(plain, speculative_decoding=EAGLE), backend="reference").speculative_decoding == (
        SpeculativeDecoding(method="ngram")
    )
    with pytest.raises(ConflictError, match="prefix cache shares pages") as caught:
        adapt(plain, paged_attention=None, prefix_cache=PrefixCache())
    assert caught.value.ways == () and "Nearest" not in str(caught.value)


def test_a_refusal_goes_from_process_to_process() -> None:
    error = refused(paged_attention=None)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ConflictError) and str(again) == str(error)
    assert (again.reasons, again.ways, again.nearest) == (error.reasons, error.ways, error.nearest)


def test_values_are_checked_before_combinations() -> None:
    with pytest.raises(ConfigError, match="prefix_cache is False"):
        EngineConfig(model="m", paged_attention=None, prefix_cache=False)  # type: ignore[arg-type]


def test_rules_are_named_and_speak_of_techniques_there_are() -> None:
    names = {each.name for each in CARDS}
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule.techniques) <= names, rule.name
        assert rule.says and rule.kind in ("needs", "excludes")
        assert rule.holds(Choices(EngineConfig(model="m"), {})), rule.name


# What each choice may be.
DOMAIN: dict[str, list[Any]] = {
    "backend": ["cpu", "cuda", "reference"],
    "offloading": [None, Offloading()],
    "load_format": ["auto", "dummy"],
    "dummy_sparsity": [None, "0.5"],
    "quantization": [None, Quantization(format="int4")],
    "mixed_precision": [None, MixedPrecision()],
    "paged_attention": [None, PagedAttention(), PagedAttention(page_size=32, swap_bytes=1 << 20)],
    "prefix_cache": [None, PrefixCache()],
    "memory_reuse": [None, MemoryReuse()],
    "flash_attention": [None, FlashAttention()],
    "dynamic_shapes": [None, DynamicShapes()],
    "hardware_kernels": [None, HardwareKernels(), HardwareKernels(isa="scalar")],
    "continuous_batching": [None, ContinuousBatching(), SWAP],
    "static_batching": [None, StaticBatching()],
    "speculative_decoding": [None, SpeculativeDecoding(method="ngram"), EAGLE],
    "dynamic_batching": [None, DynamicBatching(itl_goal_ms=9), DynamicBatching(max_wait_ms=9)],
    "max_num_seqs": [4, 32, 700],
    "max_num_batched_tokens": [3, 512],
}
CHOICES = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in DOMAIN.items()})
PAIR = ("continuous_batching", "static_batching")


def changed(choices: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The choices that differ; the two kinds of batching are one."""
    names = {name for name in choices if choices[name] != other[name]}
    return {"batching" if name in PAIR else name for name in names}


def builds(choices: dict[str, Any]) -> bool:
    try:
        EngineConfig(model="m", **choices)
    except ConflictError:
        return False
    return True


@settings(max_examples=100, deadline=None)
@given(CHOICES)
def test_the_nearest_builds_and_none_of_fewer_changes_does(choices: dict[str, Any]) -> None:
    try:
        EngineConfig(model="m", **choices)
        return
    except ConflictError as error:
        found = error
    assert found.reasons and found.ways and found.nearest
    mended = choices | found.nearest
    assert builds(mended)
    size = len(changed(choices, mended))
    assert size == len({"batching" if name in PAIR else name for name in found.nearest})
    # No fewer changes (one or two) to any value of the domain, or to one that the solver offered, would do.
    values = {name: list(known) for name, known in DOMAIN.items()}
    for name, value in found.nearest.items():
        values[name].append(value)
    values["max_num_seqs"].append(choices["max_num_batched_tokens"])
    values["max_num_batched_tokens"].append(choices["max_num_seqs"])
    pair = [(own, other) for own in values[PAIR[0]] for other in values[PAIR[1]]]
    axes: dict[str, list[dict[str, Any]]] = {
        name: [{name: value} for value in known] for name, known in values.items() if name not in PAIR
    } | {"batching": [dict(zip(PAIR, both)) for both in pair]}
    base = EngineConfig(model="m")
    for fewer in range(1, min(size, 3)):
        for names in combinations(axes, fewer):
            for parts in product(*(axes[name] for name in names)):
                tried = dict(choices)
                for part in parts:
                    tried |= part
                assert broken(Choices(base, tried)), (choices, parts)
