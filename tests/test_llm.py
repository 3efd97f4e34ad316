"""The Python interface, and the story that a real model tells on both backends in every format."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from gossamer import LLM, SamplingParams, _native
from gossamer.engine.request import RequestOutput
from gossamer.errors import ConfigError, RequestError, TokenizerError

PROMPT = "Once upon a time"
STORY = ", there was a little girl named Lily. She loved to play outside in the"
GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=1)


def load(shared: Path, **options: Any) -> LLM:
    return LLM(str(shared / "models" / "stories260K"), max_model_len=128, **options)


@pytest.fixture(scope="module")
def llm(shared: Path) -> LLM:
    return load(shared, max_num_seqs=8)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [o.outputs[0].text for o in outputs]


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"dtype": "float32"}, "f32"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float16"}, "f16"),
        ({"quantization": "int8"}, "int8"),
        ({"quantization": "int4-g32"}, "int4"),
        ({"quantization": "int4"}, "int4"),
        ({"quantization": "int8-g16"}, "int8"),
        ({"quantization": "uint4-g32"}, "uint4"),
        ({"quantization": "nf4-g32"}, "nf4"),
    ],
    ids=lambda o: "-".join(o.values()) if isinstance(o, dict) else o,
)
def test_the_story_in_every_format(shared: Path, options: dict[str, Any], stored: str) -> None:
    """Word for word the same on both, and told by the kernels that were promised."""
    told = {}
    for backend in ("cpu", "reference"):
        llm = load(shared, backend=backend, max_num_seqs=1, kv_cache_dtype="float32", **options)
        told[backend] = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0]
        if backend == "cpu":
            llm_receipt = llm.receipt()
            lines = {line.kernel: line for line in llm_receipt}
    # Rounded this coarsely, the little model finds another game.
    opening = STORY.replace("outside", "with her toys") if stored in ("uint4", "nf4") else STORY
    assert told["cpu"].text.startswith(opening.removesuffix(" in the"))
    assert told["cpu"].token_ids == told["reference"].token_ids
    pairs = zip(told["cpu"].logprobs or (), told["reference"].logprobs or (), strict=True)
    # Not each: where a last bit rounds one activation the other way, all that follows is a little off.
    assert median(abs(ours.logprob - theirs.logprob) for ours, theirs in pairs) < 5e-3
    isa = _native.best_isa()
    linear = [line for kernel, line in lines.items() if "linear" in kernel and line.calls]
    fused = ("merged_linear", "linear_add", "gated_linear", "linear")
    assert {(line.isa, line.kernel) for line in linear} == {(isa, f"{op}_{stored}") for op in fused}
    assert all(line.calls == 40 and line.weight_bytes > 0 for line in linear)
    assert all(line.gb_s == pytest.approx(line.weight_bytes * 40e-9 / line.seconds) for line in linear)
    assert lines[f"embed_{stored}"].gb_s is None  # it reads some rows alone
    assert sum(line.share for line in llm_receipt) == pytest.approx(1)
    assert ("prepare" in lines) == (stored not in ("f32", "f16"))


def test_prompts_of_every_kind_come_back_in_order(llm: LLM) -> None:
    ids = list(llm.engine.encode(PROMPT))
    params = SamplingParams(temperature=0, max_tokens=12)
    (alone,) = texts(llm.generate(PROMPT, params, use_tqdm=False))
    assert STORY.startswith(alone)
    outputs = llm.generate(["The dog", PROMPT, ids], params, use_tqdm=False)
    assert texts(outputs)[1:] == [alone, alone] and [o.prompt for o in outputs] == ["The dog", PROMPT, None]
    assert texts(llm.generate(ids, params, use_tqdm=False)) == [alone]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert llm.generate([], params, use_tqdm=False) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    several = [
        SamplingParams(temperature=1, seed=5, n=3, max_tokens=6),
        SamplingParams(max_tokens=2, logprobs=1),
    ]
    first, second = llm.generate([PROMPT] * 2, several, use_tqdm=False)
    assert [len(c.token_ids) for c in first.outputs] == [6, 6, 6]
    assert len({c.text for c in first.outputs}) > 1
    assert len(second.outputs[0].logprobs or ()) == 2 and first.outputs[0].logprobs is None
    with pytest.raises(RequestError, match="2 prompts but 1"):
        llm.generate([PROMPT] * 2, several[:1], use_tqdm=False)


def test_a_bad_prompt_of_several_runs_none(llm: LLM) -> None:
    for bad in ("", [], [10**6], PROMPT * 100):
        with pytest.raises(RequestError):
            llm.generate([PROMPT, bad], GREEDY, use_tqdm=False)
        assert not llm.engine.has_work()
    llm.engine.engine.check()


def test_chat(shared: Path, llm: LLM) -> None:
    with pytest.raises(TokenizerError, match="chat template"):
        llm.chat([{"role": "user", "content": PROMPT}])
    with pytest.raises(RequestError, match="empty"):
        llm.chat([])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    talker = load(shared, max_num_seqs=2, chat_template=template)
    one = [{"role": "user", "content": PROMPT}]
    assert STORY.startswith(texts(talker.chat(one, SamplingParams(temperature=0, max_tokens=9)))[0])
    both = talker.chat([one, one], SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    assert len(set(texts(both))) == 1


def test_progress_goes_to_standard_error(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPT, GREEDY)
    captured = capsys.readouterr()
    assert captured.out == ""


def test_the_memory_is_that_of_the_plan(llm: LLM) -> None:
    memory = llm.memory
    assert memory.total == memory.weights + memory.kv + memory.arena + memory.workspace
    assert memory.kv_tokens == 8 * 128 and memory.arena < memory.arena_separate


def test_unknown_options_are_refused(shared: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_length"):
        load(shared, max_model_length=3)


def test_an_instruction_set_that_is_absent_is_an_error(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "isas", lambda: ["scalar", "avx2"])
    with pytest.raises(ConfigError, match="cannot run avx512 kernels; the nearest it can run is avx2"):
        load(shared, isa="avx512")
    monkeypatch.setenv("GOSSAMER_ISA", "avx512")
    with pytest.raises(ConfigError, match="cannot run avx512"):
        load(shared)


def test_what_the_model_s_makers_advise_is_the_default(shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "models" / "stories260K", tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 7}')
    llm = LLM(str(tmp_path), max_model_len=64, max_num_seqs=1)
    told = llm.generate(PROMPT, use_tqdm=False)[0].outputs[0]
    assert len(told.token_ids) == 7 and STORY.startswith(told.text)


@pytest.mark.parametrize(
    "options",
    [{"isa": "scalar"}, {"memory_reuse": None}, {"flash_attention": None}, {"dynamic_shapes": None}],
)
def test_the_reference_refuses_what_it_would_ignore(shared: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="reference"):
        load(shared, backend="reference", **options)


@pytest.mark.parametrize(
    ("formats", "stored"),
    [
        ({"layers.*.mlp.down_proj": "int8", "head": "bf16"}, {"int4", "int8", "bf16"}),
        (
            [("layers.*.attention.*", "f16"), ("layers.0.*", "float32"), ("*_proj", "int8")],
            {"f16", "f32", "int8", "int4"},
        ),
    ],
)
def test_the_story_in_several_formats_at_once(shared: Path, formats: Any, stored: set[str]) -> None:
    told = {}
    for backend in ("cpu", "reference"):
        llm = load(shared, backend=backend, max_num_seqs=1, quantization="int4-g32", weight_formats=formats)
        told[backend] = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        if backend == "cpu":
            kernels = {line.kernel.rpartition("_")[2] for line in llm.receipt() if "linear" in line.kernel}
            assert kernels == stored
    assert told["cpu"][:30] == told["reference"][:30]  # a rounding the other way may show later


@pytest.mark.parametrize(
    "formats", [{"head": 8}, {"head"}, "head=int8", [("head", "int8"), ("head", "bf16")], {"haed": "int8"}]
)
def test_weight_formats_that_cannot_be(shared: Path, formats: Any) -> None:
    with pytest.raises(ConfigError, match="weight"):
        load(shared, weight_formats=formats)
