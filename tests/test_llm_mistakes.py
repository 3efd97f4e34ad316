"""The Python interface given what it cannot use: an error of ours, and the next call works."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer import LLM, SamplingParams
from gossamer.config import DynamicBatching, PrefixCache, StaticBatching
from gossamer.errors import ConfigError, ContextLengthError, RequestError
from gossamer.llm import engine_config

FEW = SamplingParams(temperature=0, max_tokens=3)


@pytest.fixture(scope="module")
def llm(shared: Path) -> LLM:
    return LLM(shared / "models" / "stories260K", threads=1, max_num_seqs=8)


@pytest.mark.parametrize(
    "prompts",
    [5, None, b"abc", {"prompt": "a"}, "", [[]], [None], ["a", None], [1, "a"], [[1, "a"]], [[1.5]], [b"a"],
     [{"prompt": "a"}], [True], [512], [-1], [2**63], ["a", ""], "\ud800"],
    ids=ascii,
)  # fmt: skip
def test_prompts_of_wrong_types_are_refused_and_the_next_runs(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompts, FEW, use_tqdm=False)
    assert not llm.engine.has_work()
    assert llm.generate("Once upon a time", FEW, use_tqdm=False)[0].outputs[0].text == ", there was"


def test_an_overlong_prompt_among_good_ones_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="512"):
        llm.generate([[1], [1] * 10**5], FEW, use_tqdm=False)
    assert not llm.engine.has_work()


@pytest.mark.parametrize("params", [5, "x", [None], [FEW, FEW], [], {"temperature": 0}], ids=str)
def test_parameters_of_wrong_types_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match=r"sampling.param"):
        llm.generate("a", params, use_tqdm=False)


@pytest.mark.parametrize("prompts", [np.array([1, 2]), [np.array([1, 2])], iter([[1, 2]])], ids=type)
def test_numpy_arrays_are_prompts(llm: LLM, prompts: Any) -> None:
    assert llm.generate(prompts, FEW, use_tqdm=False)[0].prompt_ids == (1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", 5), ("model", None), ("threads", "2"), ("threads", 1.5), ("threads", True), ("isa", 5),
     ("max_model_len", "x"), ("kv_bytes", 1e9), ("memory_budget", "1G"), ("dtype", []), ("dtype", None),
     ("quantization", 4), ("page_size", "16"), ("kv_cache_dtype", {}), ("prefill_chunk", 0.5),
     ("max_num_seqs", None)],
)  # fmt: skip
def test_options_of_wrong_types_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        engine_config(**({"model": "anything"} | {name: value}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_prefix_cache": False}, "did you mean 'enable_prefix_caching'"),
        ({"tensor_parallel_size": 2}, "no option 'tensor_parallel_size'; help"),
        ({"swap_bytes": "1GiB"}, "'1GiB'; a whole number of bytes"),
        (
            {"prefix_cache": False},
            r"prefix_cache is False; gossamer.config.PrefixCache\(...\) turns it on, None off",
        ),
        ({"static_batching": "ragged"}, "static_batching is 'ragged'"),
        ({"dynamic_batching": 20}, "dynamic_batching is 20"),
        ({"itl_goal_ms": "20"}, "itl_goal_ms '20' must be a number of milliseconds"),
        ({"itl_goal_ms": 5, "dynamic_batching": DynamicBatching(max_wait_ms=1)}, "there or alone"),
        ({"enable_prefix_caching": False, "prefix_cache": PrefixCache()}, "leave one out"),
        ({"static_batching": StaticBatching(), "preempt_by": "swap"}, "--preempt-by belongs to continuous"),
    ],
    ids=str,
)
def test_options_that_cannot_be_say_what_would_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine_config("gossamer/pocket", **options)


def test_the_flags_of_techniques_are_options() -> None:
    config = engine_config(
        "gossamer/pocket", enable_prefix_caching=False, itl_goal_ms=20, max_wait_ms=5, swap_bytes=1 << 20
    )
    assert config.prefix_cache is None and config.max_num_seqs == 256
    assert config.dynamic_batching == DynamicBatching(itl_goal_ms=20, max_wait_ms=5)
    assert config.paged_attention is not None and config.paged_attention.swap_bytes == 1 << 20


def test_threads_that_share_a_model_take_turns(llm: LLM) -> None:
    def tell(first: int) -> list[int]:
        return llm.generate([[first, 300]], FEW, use_tqdm=False)[0].outputs[0].token_ids

    alone = [tell(i) for i in range(3, 11)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(tell, range(3, 11))) == alone
