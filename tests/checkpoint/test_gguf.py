"""GGUF files as models: the storyteller, K-quants on the kernels, and what the load says of them."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gossamer import LLM, SamplingParams
from gossamer.checkpoint.gguf import GGUFCheckpoint
from gossamer.checkpoint.gguf_blocks import BLOCKS, BY_NAME
from gossamer.checkpoint.gguf_directory import POINTER
from gossamer.checkpoint.gguf_file import GGUFFile
from gossamer.checkpoint.gguf_writer import LazyBlocks, write_gguf_file
from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.checkpoint.weights import evaluate, evaluate_codes
from gossamer.config import EngineConfig
from gossamer.errors import CheckpointError, ConfigError, UnsupportedModelError
from gossamer.runtime.start import load_graph

STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
    "red ball. She wanted to play with it, but it was too high."
)
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [f"<{i}>" for i in range(96)],
    "tokenizer.ggml.merges": [],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K" / "stories260Ktok512.gguf"


def records(kind: str, rows: int, k: int, seed: int) -> np.ndarray:
    """Random blocks of values around 0, of a size that keeps activations finite."""
    rng = np.random.default_rng(seed)
    block = BY_NAME[kind][1]
    if kind == "F32":
        return rng.standard_normal((rows, k)).astype(np.float32) * np.float32(0.1) + (rows == 1)
    made = rng.integers(0, 256, (rows, k // block.size * block.bytes), np.uint8).view(block.record)
    made["d"] = rng.uniform(1e-4, 2e-4, made.shape)
    if "m" in made.dtype.names:  # the middle of the codes is near 0
        made["m"] = made["d"] if kind.endswith("K") else made["d"] * -8
    if kind == "Q6_K":
        made["scales"] = rng.integers(1, 30, made["scales"].shape)
    return made


def mixed_file(path: Path, *kinds: str) -> Path:
    """A random llama whose matrices take the kinds in turn."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (96, 256), "output_norm.weight": (256,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}.weight": (256,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.attn_{x}.weight": (n, 256) for x, n in (("q", 256), ("k", 128), ("v", 128))}
        shapes |= {f"blk.{i}.attn_output.weight": (256, 256), f"blk.{i}.ffn_down.weight": (256, 512)}
        shapes |= {f"blk.{i}.ffn_{x}.weight": (512, 256) for x in ("gate", "up")}
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        kind = "F32" if len(shape) == 1 else kinds[i % len(kinds)]
        rows = shape[0] if len(shape) > 1 else 1
        tensors[name] = LazyBlocks(kind, shape, partial(iter, [records(kind, rows, shape[-1], i)]))
    write_gguf_file(path, LLAMA, tensors)
    return path


def test_the_storyteller_tells_its_story(stories: Path) -> None:
    (told,) = LLM(str(stories), dtype="float32").generate(
        ["Once upon a time"], SamplingParams(temperature=0, max_tokens=60)
    )
    assert told.outputs[0].text.startswith(STORY)


def test_its_weights_are_those_of_the_safetensors(stories: Path) -> None:
    made, own = GGUFCheckpoint(stories), Checkpoint(stories.parent)
    assert set(own.names()) <= set(made.names())
    for name in own.names():
        assert np.array_equal(made.read(name), own.read(name)), name
        assert np.array_equal(made.read_rows(name, 3, 7), own.read_rows(name, 3, 7)), name
    assert np.array_equal(made.read("lm_head.weight"), own.read("model.embed_tokens.weight"))  # tied there
    text = "Once upon a time, Lily's ball & a ☃"
    tokenizers = [Tokenizer.load(d) for d in (resolve_model(str(stories)), stories.parent)]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)


def test_a_file_and_the_directory_around_it_are_one_model(stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(stories.read_bytes())
    made = resolve_model(str(folder))
    assert resolve_model(str(folder / "a.gguf")) == made
    assert json.loads((made / POINTER).read_text()) == {"file": str(folder / "a.gguf")}
    assert resolve_model(str(stories)) == made  # the same content, found where it was named last
    assert json.loads((made / POINTER).read_text()) == {"file": str(stories.resolve())}
    (folder / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        resolve_model(str(folder))
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(str(stories), "main")


def test_a_file_that_went_away_is_missed(tmp_path: Path) -> None:
    path = mixed_file(tmp_path / "m.gguf", "Q8_0")
    directory = resolve_model(str(path))
    path.unlink()
    with pytest.raises(CheckpointError, match="not there; pass the GGUF file itself"):
        load_graph(EngineConfig(model=str(directory)))


@pytest.mark.parametrize("kind", [b.name for b in BLOCKS.values() if b.size > 1])
def test_every_block_type_is_served_by_its_integers(kind: str, tmp_path: Path) -> None:
    graph, _, source = load_graph(EngineConfig(model=str(mixed_file(tmp_path / "m.gguf", kind))))
    raw = GGUFFile(tmp_path / "m.gguf").tensors
    for weight in graph.weights.values():
        if len(weight.shape) == 2:
            assert (weight.format, weight.group) == raw["token_embd.weight"].block.served
            floats, codes = evaluate(weight.expr, source, 5, 60), evaluate_codes(weight.expr, source, 5, 60)
            off = np.linalg.norm(codes.floats() - floats) / np.linalg.norm(floats)
            assert off == 0 if BY_NAME[kind][1].exact else off < 0.005


def test_mixed_k_quants_run_on_the_kernels_and_the_load_says_what_was_rounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = mixed_file(tmp_path / "m.gguf", "Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_1")
    texts = []
    with caplog.at_level(logging.WARNING):
        llm = LLM(str(path), kv_cache_dtype="float32")
    said = [r.message for r in caplog.records]
    assert len(said) == 3 and all("relative error 0." in line for line in said)
    assert any("Q4_K, served as int8 in groups of 32" in line for line in said)
    assert any("int8 in groups of 16 with scales rounded to fp16" in line for line in said)
    for model in (llm, LLM(str(path), backend="reference", dtype="float32")):
        (out,) = model.generate([[5, 9, 31]], SamplingParams(temperature=0, max_tokens=6))
        texts.append(out.outputs[0].token_ids)
    assert texts[0] == texts[1]


def test_parts_and_strangers_are_named(tmp_path: Path) -> None:
    data = {"F": LazyBlocks("F32", (4,), partial(iter, [np.zeros(4, np.float32)]))}
    for change, message in (
        ({"general.architecture": "rwkv"}, "'rwkv'; of GGUF there are llama"),
        ({"split.count": 3}, "one of 3 parts.*--merge"),
    ):
        write_gguf_file(tmp_path / "m.gguf", LLAMA | change, data)
        with pytest.raises(UnsupportedModelError, match=message):
            resolve_model(str(tmp_path / "m.gguf"))
    write_gguf_file(tmp_path / "m.gguf", LLAMA, data)
    with pytest.raises(UnsupportedModelError, match=r"'F' \(1 of 1 tensors\)"):
        GGUFCheckpoint(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="no matrix token_embd"):
        resolve_model(str(tmp_path / "m.gguf"))
