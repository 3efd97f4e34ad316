"""The byte plan: exact for every configuration, from config.json alone, for models of any size."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gossamer.config import (
    EngineConfig,
    HardwareKernels,
    MixedPrecision,
    ParallelComputing,
    Quantization,
    SparseWeights,
    SpeculativeDecoding,
)
from gossamer.errors import CheckpointError, MemoryBudgetError, UnsupportedModelError
from gossamer.memory import anonymous_bytes
from gossamer.planner.memory import MemoryPlan, plan_memory
from gossamer.planner.model import open_planned
from gossamer.runtime.start import start
from tests.graph.small import llama_config

GIB = 1 << 30
PLENTY = 1 << 42
INT8 = Quantization(format="int8")
# As in meta-llama's config.json.
LLAMA_2_7B = llama_config(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip
LLAMA_3_70B = llama_config(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip
LLAMA_3_1B = llama_config(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True,
)  # fmt: skip


def described(place: Path, fields: dict[str, Any]) -> str:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(fields))
    return str(place)


def planned(config: EngineConfig, budget: int = PLENTY) -> MemoryPlan:
    return plan_memory(open_planned(config), config, budget, kind="library")


def dummy(model: str, **options: Any) -> EngineConfig:
    given = {"max_model_len": 48, "max_num_seqs": 3, "max_num_batched_tokens": 32, "kv_bytes": 1 << 20}
    return EngineConfig(model=model, load_format="dummy", **(given | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixed_precision": MixedPrecision(dtype="bf16"), "kv_dtype": "f32"},
        {"quantization": INT8, "kv_dtype": "int8"},
        {"quantization": Quantization(format="nf4"), "kv_dtype": "int4"},
        {"quantization": INT8, "weight_formats": (("head", "bf16"), ("*.down_proj", "f16"))},
        {"operator_fusion": None, "layer_fusion": None, "memory_reuse": None, "quantization": INT8},
        {"paged_attention": None, "prefix_cache": None},
        {"hardware_kernels": None, "parallel_computing": ParallelComputing(threads=3)},
        {"hardware_kernels": HardwareKernels(isa="scalar"), "parallel_computing": None},
        {"dummy_sparsity": "0.5", "sparse_weights": SparseWeights(count=True), "quantization": INT8},
        {"speculative_decoding": SpeculativeDecoding(method="ngram"), "max_num_seqs": 7},
        {"speculative_decoding": SpeculativeDecoding(method="eagle"), "quantization": INT8},
        {"speculative_decoding": SpeculativeDecoding(method="draft_model", model="here", quantization=INT8)},
    ],
    ids=str,
)
def test_the_plan_is_what_is_allocated(options: dict[str, Any], tmp_path: Path) -> None:
    config = dummy(described(tmp_path / "model", llama_config()), **options)
    speculative = config.speculative_decoding
    if speculative is not None and speculative.method == "draft_model":
        draft = described(tmp_path / "draft", llama_config(num_hidden_layers=1))
        config = replace(config, speculative_decoding=replace(speculative, model=draft))
    plan = planned(config)
    started = start(config)
    assert plan.engine == started.memory
    assert plan.max_model_len == started.max_model_len
    assert (plan.engine.draft > 0) == (speculative is not None and speculative.method != "ngram")


def test_the_embedded_model_with_its_head_and_its_student() -> None:
    for speculative in (
        SpeculativeDecoding(method="eagle"),
        SpeculativeDecoding(method="draft_model", model="gossamer/pocket-half", quantization=INT8),
    ):
        config = EngineConfig(
            model="gossamer/pocket", speculative_decoding=speculative, max_model_len=64, max_num_seqs=2
        )
        model = open_planned(config)
        assert model.complete
        assert plan_memory(model, config, kind="library").engine == start(config).memory


def test_a_gguf_file_is_planned_as_it_is_stored(shared: Path) -> None:
    file = shared / "models" / "stories260K" / "stories260Ktok512.gguf"
    config = EngineConfig(model=str(file), max_model_len=64, max_num_seqs=2)
    model = open_planned(config)
    assert model.complete
    assert plan_memory(model, config, kind="library").engine == start(config).memory


@pytest.mark.slow
def test_checkpoints_are_planned_as_they_are_stored(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from gossamer.compress.quantize import rtn
    from gossamer.config.compression import RTN
    from tests.compress.quantize.small import make_job, make_model

    floats = make_model(tmp_path / "model", "llama")
    job = make_job(floats, tmp_path)
    rtn.run(RTN(format="int4-g32"), job)
    taken = []
    for model in (floats, job.out):
        config = replace(dummy(str(model)), load_format="auto")
        plan = planned(config)
        assert open_planned(config).complete
        assert plan.engine == start(config).memory
        taken.append(plan.engine.weights)
    assert taken[1] < 0.5 * taken[0]


def test_seven_billion_weights(tmp_path: Path) -> None:
    """The handbook: 14 GB, and 4 to 6 GB at 4 bits."""
    model = described(tmp_path, LLAMA_2_7B)
    one = dummy(model, max_model_len=2048, max_num_seqs=1, kv_bytes=None)
    half = planned(replace(one, mixed_precision=MixedPrecision(dtype="bf16")))
    assert 13.4e9 < half.engine.weights < 14e9
    assert half.engine.kv == 2048 * 32 * 2 * 4096 * 2
    for format, group, weights in (
        ("int4", 128, 3.48), ("int4", 64, 3.58), ("int4", 32, 3.79), ("uint4", 128, 3.53), ("nf4", 64, 3.58),
    ):  # fmt: skip
        plan = planned(replace(one, quantization=Quantization.parse(f"{format}-g{group}")))
        assert plan.engine.weights / 1e9 == pytest.approx(weights, abs=0.01)
        assert 4e9 < plan.total < 6e9  # with keys and values of 2048 tokens


def test_seventy_billion_weights_do_not_fit_24_gb(tmp_path: Path) -> None:
    held, reserved = anonymous_bytes(), psutil.Process().memory_info().vms
    model = described(tmp_path, LLAMA_3_70B)
    one = dummy(model, max_model_len=2048, max_num_seqs=1, kv_bytes=None)
    int4 = planned(replace(one, quantization=Quantization(format="int4")))
    assert 35.5e9 < int4.engine.weights < 38e9
    with pytest.raises(
        MemoryBudgetError, match=r"9\.\d\d GiB more than there are; take a smaller"
    ) as refusal:
        planned(replace(one, quantization=Quantization(format="int4")), 24 * GIB)
    assert "nothing fits: 33.9" in str(refusal.value)
    assert planned(replace(one, mixed_precision=MixedPrecision(dtype="bf16"))).engine.weights > 140e9
    # Neither memory nor addresses are taken for it.
    assert anonymous_bytes() - held < 64 << 20
    assert psutil.Process().memory_info().vms - reserved < GIB


def test_a_search_may_ask_for_hundreds(tmp_path: Path) -> None:
    config = dummy(described(tmp_path, LLAMA_3_1B), quantization=INT8, max_model_len=1024, kv_bytes=None)
    model = open_planned(config)
    start_cpu, plans = time.process_time(), 0
    for kv_dtype in ("bf16", "int8"):
        for seqs in (1, 8, 32):
            for tokens in (64, 256, 1024):
                plan_memory(
                    model,
                    replace(config, kv_dtype=kv_dtype, max_num_seqs=seqs, max_num_batched_tokens=tokens),
                    PLENTY,
                    kind="library",
                )
                plans += 1
    assert (time.process_time() - start_cpu) / plans < 0.1


def test_budgets(tmp_path: Path) -> None:
    config = dummy(described(tmp_path / "model", llama_config()))
    least = planned(config).total
    assert planned(config, least).total == least
    with pytest.raises(MemoryBudgetError, match="process"):
        planned(config, least - 1)
    with pytest.raises(MemoryBudgetError):
        plan_memory(open_planned(config), replace(config, memory_budget=least - 1), kind="library")
    server = plan_memory(open_planned(config), config, PLENTY)
    assert server.process > planned(config).process


def test_of_a_hub_id_config_json_alone_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    fetched = []
    described(tmp_path / "plain", llama_config())
    described(tmp_path / "odd", llama_config(quantization_config={"quant_method": "hqq"}))

    def download(model: str, name: str, revision: str | None = None) -> str:
        fetched.append(name)
        if name != "config.json":
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / model.split("/")[1] / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = replace(dummy("someone/plain"), load_format="auto")
    model = open_planned(config)
    assert not model.complete and model.directory == tmp_path / "plain"
    plan = plan_memory(model, config, PLENTY, kind="library")
    assert plan.engine == planned(dummy(str(tmp_path / "plain"))).engine
    # A tokenizer will come with the weights.
    assert plan.process > planned(dummy(str(tmp_path / "plain"))).process
    assert set(fetched) == {"config.json", "quantize_config.json"}
    with pytest.raises(UnsupportedModelError, match=r"quant_method 'hqq'.*download it"):
        open_planned(replace(config, model="someone/odd"))
    with pytest.raises(CheckpointError):
        open_planned(replace(config, model=str(tmp_path / "nowhere")))


def test_unknown_architectures_say_what_they_lack(tmp_path: Path) -> None:
    for fields, lacks in (
        ({"ssm_state_size": 16}, "ssm_state_size=16 is not understood"),
        ({}, "All its fields are those of a LlamaForCausalLM"),
        ({"hidden_size": None}, "no hidden_size"),
    ):
        model = described(tmp_path, llama_config(architectures=["NewForCausalLM"], **fields))
        with pytest.raises(UnsupportedModelError, match=rf"'NewForCausalLM' is unknown.*{lacks}"):
            open_planned(dummy(model))
