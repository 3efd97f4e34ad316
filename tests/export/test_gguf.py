"""Models of every family written as GGUF and read again: the same graph, the same weights, the same text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="random checkpoints need torch (pip install gossamer[dev])")
transformers = pytest.importorskip(
    "transformers", reason="the oracle is transformers (pip install gossamer[dev])"
)

from gossamer.backends.reference import ReferenceModel  # noqa: E402
from gossamer.checkpoint.codes import Codes  # noqa: E402
from gossamer.checkpoint.gguf import GGUFCheckpoint  # noqa: E402
from gossamer.checkpoint.gguf_directory import gguf_directory  # noqa: E402
from gossamer.checkpoint.gguf_file import GGUFFile, GGUFTensor  # noqa: E402
from gossamer.checkpoint.gguf_tokenizer import bpe_tokenizer  # noqa: E402
from gossamer.checkpoint.gguf_writer import LazyBlocks, write_gguf_file  # noqa: E402
from gossamer.checkpoint.hub import read_config  # noqa: E402
from gossamer.checkpoint.safetensors import Checkpoint  # noqa: E402
from gossamer.checkpoint.weights import check_tensors, evaluate, evaluate_codes  # noqa: E402
from gossamer.config import EngineConfig  # noqa: E402
from gossamer.errors import CheckpointError, ConfigError, GossamerError, UnsupportedModelError  # noqa: E402
from gossamer.export import gguf as export  # noqa: E402
from gossamer.export.gguf import write_gguf  # noqa: E402
from gossamer.graph.families import build_graph  # noqa: E402
from gossamer.graph.ir import Graph  # noqa: E402
from gossamer.graph.weights import Constant, leaves  # noqa: E402
from gossamer.runtime.start import load_graph  # noqa: E402

from ..families.configs import CASES, LLAMA, PHI, QWEN_MOE, Case  # noqa: E402
from ..families.test_parity import randomise  # noqa: E402

# What llama.cpp's readers would compute otherwise, so that it must be refused.
BEYOND = {
    "llama-gelu": "act",
    "llama-rope-dynamic": "dynamic",
    "qwen2-late-windows": "window",
    "qwen2-layer-types": "window",
    "gemma2": "scale",
    "gemma2-uncapped": "",
    "gemma3": "scale",
    "gemma3-capped": "scale",
    "gpt2-scaled-untied": "act gelu",
    "qwen3_moe": "mlp.gate_proj",
    "qwen3_moe-mlp-only-window": "mlp.gate_proj",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(directory: Path, config: Any) -> Path:
    """A random checkpoint of the config, in bf16, with a vocabulary."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, torch.Generator().manual_seed(3))
    model.to(torch.bfloat16).save_pretrained(directory)
    tokens = [f"<{i}>" for i in range(config.vocab_size)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": tokens[i], **flags, "special": True} for i in (1, 2)]
    made = bpe_tokenizer(tokens, [], added, pre="gpt-2")
    (directory / "tokenizer.json").write_text(json.dumps(made))
    named = {"bos_token": tokens[1], "eos_token": tokens[2], "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def loaded(directory: Path) -> tuple[Graph, Any]:
    graph = build_graph(read_config(directory))
    return graph, Checkpoint(directory)


ALL_EXPERTS = Case(config=lambda: transformers.Qwen3MoeConfig(**QWEN_MOE, norm_topk_prob=True))


@pytest.mark.parametrize("name", [*CASES, "qwen3_moe-all"])
def test_families_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", CASES.get(name, ALL_EXPERTS).config())
    path = tmp_path / "m.gguf"
    if name in BEYOND:
        with pytest.raises(UnsupportedModelError, match=f"(?s)GGUF.*{BEYOND[name]}"):
            write_gguf(path, directory, type="bf16")
        assert not list(tmp_path.glob("*.gguf"))
        return
    write_gguf(path, directory, type="bf16")
    names = {t.name for t in gguf.GGUFReader(path).tensors}
    ours, source = loaded(directory)
    other = build_graph(read_config(gguf_directory(path)))
    made = GGUFCheckpoint(path)
    check_tensors(other, {n: made.info(n).shape for n in made.names()})
    assert (other.kv_groups, other.values) == (ours.kv_groups, ours.values)
    for a, b in zip(ours.nodes, other.nodes, strict=True):
        assert replace(a, attrs={}) == replace(b, attrs={})
        assert b.attrs == {
            k: pytest.approx(v, 1e-6) if isinstance(v, float) else v for k, v in a.attrs.items()
        }
    assert {"token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight"} <= names
    for key, weight in ours.weights.items():
        want, got = (evaluate(w.expr, s) for w, s in ((weight, source), (other.weights[key], made)))
        if isinstance(weight.expr, Constant):
            assert np.allclose(got, want, rtol=3e-7, atol=0), key
        else:
            assert np.array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32)), key


GEMMA = {**LLAMA, "num_hidden_layers": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9}


@pytest.mark.parametrize("kind", ["Gemma2Config", "Gemma3TextConfig"])
def test_gemmas_whose_heads_are_their_own_measure(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", getattr(transformers, kind)(**GEMMA))
    write_gguf(tmp_path / "m.gguf", directory, type="bf16")
    ours, source = loaded(directory)
    other = build_graph(read_config(gguf_directory(tmp_path / "m.gguf")))
    made = GGUFCheckpoint(tmp_path / "m.gguf")
    assert other.nodes == ours.nodes
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    want = source.read("model.layers.0.input_layernorm.weight").astype(np.float32) + 1
    assert np.array_equal(stored["blk.0.attn_norm.weight"], want)
    for key, weight in ours.weights.items():
        a, b = (evaluate(w.expr, s) for w, s in ((weight, source), (other.weights[key], made)))
        assert np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6, atol=1e-7), key


WIDE = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "Qwen3Config"])
def test_transformers_loads_what_is_written_and_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", getattr(transformers, kind)(**WIDE))
    write_gguf(tmp_path / "m.gguf", directory, type="q8_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", attn_implementation="eager", dtype=torch.float32
    ).eval()
    graph = build_graph(read_config(gguf_directory(tmp_path / "m.gguf")))
    ours = ReferenceModel.load(graph, GGUFCheckpoint(tmp_path / "m.gguf"), torch.float32)
    ids = torch.arange(40) * 7 % 101
    from ..families.test_parity import step

    with torch.inference_mode():
        want = theirs(ids[None]).logits[0]
    (got,) = step(ours, [(ids, 0, 40)], None)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_blocks_are_those_of_the_gguf_package_and_are_served_as_they_are(type: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", transformers.LlamaConfig(**WIDE))
    made = write_gguf(tmp_path / "m.gguf", directory, type=type)
    assert (made.kept, made.bytes) == (0, (tmp_path / "m.gguf").stat().st_size)
    kind = gguf.GGMLQuantizationType[type.upper()]
    down = Checkpoint(directory).read("model.layers.0.mlp.down_proj.weight").astype(np.float32)
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(stored["blk.0.ffn_down.weight"], gguf.quants.quantize(down, kind))
    graph, _, source = load_graph(EngineConfig(model=str(tmp_path / "m.gguf")))
    want = {"q8_0": ("int8", 32), "q4_0": ("int4", 32)}[type]
    for key, weight in graph.weights.items():
        if len(weight.shape) == 2:
            assert (weight.format, weight.group) == want
            codes = evaluate_codes(weight.expr, source)
            assert np.array_equal(codes.floats(), evaluate(weight.expr, source)), key
    again = write_gguf(tmp_path / "again.gguf", gguf_directory(tmp_path / "m.gguf"), type=type)
    assert again.kept == again.tensors[type.upper()] > 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


class Integers:
    """A checkpoint whose matrices are random codes of a format."""

    def __init__(self, directory: Path, format: str, group: int) -> None:
        self._inner, self._format, self._group = Checkpoint(directory), format, group
        self.names, self.info, self.release = self._inner.names, self._inner.info, self._inner.release

    def stored(self, name: str) -> tuple[str, int]:
        matrix = len(self.info(name).shape) == 2
        return (self._format, self._group) if matrix else ("f32", 0)

    def read_codes(self, name: str, start: int, stop: int) -> Codes:
        rows, k = self.info(name).shape
        rng = np.random.default_rng(len(name))
        low, high = {"int8": (-127, 128), "int4": (-8, 8)}.get(self._format, (0, 16))
        groups = -(-k // self._group)
        zeros = rng.integers(0, 16, (rows, groups), np.uint8) if self._format == "uint4" else None
        whole = Codes(
            format=self._format,
            group=self._group,
            codes=rng.integers(low, high, (rows, k), np.int8),
            scales=rng.random((rows, groups)).astype(np.float16).astype(np.float32),
            zeros=zeros,
        )
        return replace(
            whole,
            codes=whole.codes[start:stop],
            scales=whole.scales[start:stop],
            zeros=None if zeros is None else zeros[start:stop],
        )

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.stored(name)[0] == "f32":
            return self._inner.read_rows(name, start, stop)
        return self.read_codes(name, start, stop).floats()


@pytest.mark.parametrize(
    "type,format,group,kept",
    [
        ("q8_0", "int8", 32, True),
        ("q8_0", "int8", 16, False),
        ("q8_0", "int4", 64, True),
        ("q8_0", "uint4", 128, True),
        ("q8_0", "nf4", 64, True),
        ("q4_0", "int4", 32, True),
        ("q4_0", "int4", 128, True),
        ("q4_0", "int8", 32, False),
    ],
)
def test_integers_are_kept_where_the_type_holds_them(
    type: str, format: str, group: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "model", transformers.LlamaConfig(**WIDE))
    source = Integers(directory, format, group)
    monkeypatch.setattr(export, "open_checkpoint", lambda _: source)
    made = write_gguf(tmp_path / "m.gguf", directory, type=type)
    graph = build_graph(read_config(directory))
    names = {leaf.name for w in graph.weights.values() if len(w.shape) == 2 for leaf in leaves(w.expr)}
    assert made.kept == (len(names) if kept else 0)
    written = GGUFCheckpoint(tmp_path / "m.gguf")
    same = [np.array_equal(written.read(n), source.read_rows(n, 0, source.info(n).shape[0])) for n in names]
    assert all(same) == kept


def test_a_target_that_is_taken_and_one_that_cannot_be(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", transformers.LlamaConfig(**WIDE))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"mine")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": path, "type": "q8_0"}, "is there already; --force"),
        ({"path": tmp_path / "m.bin", "type": "q8_0"}, "does not end in .gguf"),
        ({"path": tmp_path / "absent" / "m.gguf", "type": "q8_0"}, "no directory"),
        ({"path": tmp_path / "n.gguf", "type": "q2_k"}, "'q2_k'.*choose bf16, q8_0, q4_0"),
    ]
    for given, message in cases:
        with pytest.raises(ConfigError, match=message):
            write_gguf(given["path"], directory, type=given["type"])
    assert path.read_bytes() == b"mine"
    assert write_gguf(path, directory, type="q8_0", force=True).bytes == path.stat().st_size


def test_damaged_weights_leave_nothing_behind(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", transformers.LlamaConfig(**WIDE))
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    info = Checkpoint(directory).info("model.layers.2.mlp.up_proj.weight")
    data[info.start : info.start + 2] = b"\xc0\x7f"  # NaN
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.up_proj.*NaN"):
        write_gguf(tmp_path / "m.gguf", directory, type="q4_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


HOSTILE_VALUES = (0, 2**32 - 1, 2**62, -1, "x", True, float("nan"), [1, 2], ["a"])
HOSTILE_KEYS = {
    "LlamaConfig": ("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window", "expert_count"),
    "Phi3Config": ("rope.scaling.original_context_length", "attention.sliding_window"),
    "Gemma2Config": ("attn_logit_softcapping",),
    "GPT2Config": (),
}


@pytest.mark.parametrize("kind", HOSTILE_KEYS)
def test_hostile_metadata_ends_in_an_error_of_ours(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key of a real file, and some that it lacks, with values that no reader expects."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    given = {"Gemma2Config": GEMMA, "Phi3Config": PHI}.get(kind, WIDE)
    if kind == "GPT2Config":
        given = {"vocab_size": 101, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}
    directory = saved(tmp_path / "model", getattr(transformers, kind)(**given))
    write_gguf(tmp_path / "m.gguf", directory, type="q8_0")
    file = GGUFFile(tmp_path / "m.gguf")
    tensors = {
        t.name: LazyBlocks(t.block.name, t.shape, partial(pieces, file, t)) for t in file.tensors.values()
    }
    name = file.metadata["general.architecture"]
    keys = [key for key in file.metadata if kind == "LlamaConfig" or key.startswith(name)]
    keys += [f"{name}.{key}" for key in HOSTILE_KEYS[kind]]
    keys += ["tokenizer.chat_templates", "tokenizer.huggingface.json"] if kind == "LlamaConfig" else []
    refused = 0
    for key in keys:
        for value in HOSTILE_VALUES:
            write_gguf_file(tmp_path / "bad.gguf", file.metadata | {key: value}, tensors)
            try:
                build_graph(read_config(gguf_directory(tmp_path / "bad.gguf")))
                GGUFCheckpoint(tmp_path / "bad.gguf")
            except GossamerError:
                refused += 1
    assert refused > 40


def pieces(file: GGUFFile, tensor: GGUFTensor) -> Iterator[np.ndarray]:
    yield np.frombuffer(file.map[tensor.start : tensor.stop], np.uint8)
