"""Certificates survive the disk whole, and say what is wrong with others; cards say what they say."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.checkpoint.hub import resolve_model
from gossamer.checkpoint.model_writer import write_weights
from gossamer.checkpoint.safetensors_writer import write_safetensors
from gossamer.errors import CheckpointError
from gossamer.quality.certificate import CERTIFICATE, data_record, read_certificate, write_certificate
from gossamer.quality.model_card import model_card, write_model_card
from gossamer.quality.sizes import content_hash, model_record
from tests.quality.records import certificate


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_certificate(tmp_path) is None
    for written in (certificate(), replace(certificate(), quality=None, data=None)):
        assert write_certificate(tmp_path, written).name == CERTIFICATE
        assert read_certificate(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [CERTIFICATE]


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("schema",), 2, "schema 2"),
        (("quality", "total", "perplexity"), -1.0, "quality.total.perplexity is -1.0"),
        (("quality", "reference", "divergence", "top1"), 1.5, "quality.reference.divergence.top1"),
        (("compressed", "bytes"), "many", "compressed.bytes is 'many'"),
        (("steps", 0, "step"), None, "steps.0.step is None"),
        (("seed",), ..., "seed"),
    ],
)
def test_a_certificate_that_is_wrong_says_where(
    tmp_path: Path, path: tuple[str | int, ...], value: object, said: str
) -> None:
    raw: Any = json.loads(write_certificate(tmp_path, certificate()).read_text())
    *above, last = path
    place = raw
    for key in above:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    (tmp_path / CERTIFICATE).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=said):
        read_certificate(tmp_path)


def test_facts_that_are_no_json_are_refused(tmp_path: Path) -> None:
    step = certificate().steps[0]
    for bad in (float("nan"), object()):
        with pytest.raises(CheckpointError, match="must be JSON"):
            write_certificate(tmp_path, replace(certificate(), steps=(replace(step, facts={"a": bad}),)))
    assert not list(tmp_path.iterdir())


def test_records_hash_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"words")
    record = data_record([tmp_path / "a.txt"], np.array([1, 258], np.int32))
    assert record.sha256 == hashlib.sha256(bytes([1, 0, 0, 0, 2, 1, 0, 0])).hexdigest()
    assert record.files[0].sha256 == hashlib.sha256(b"words").hexdigest() and record.files[0].bytes == 5


def test_a_models_record_counts_numbers_and_zeros(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.{x}_proj.weight": (16, 16) for x in "qkvo"}
    shapes |= {f"{layer}mlp.{x}_proj.weight": (16, 16) for x in ("gate", "up", "down")}
    vectors = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    shapes |= {f"{name}.weight": (16,) for name in vectors} | {"model.embed_tokens.weight": (8, 16)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    tensors[f"{layer}mlp.up_proj.weight"][:8] = 0
    tensors["model.embed_tokens.weight"][:] = 0
    write_safetensors(tmp_path / "model.safetensors", tensors)
    record = model_record(tmp_path, "tiny")
    assert record.parameters == 7 * 256 + 3 * 16 + 128 == sum(t.size for t in tensors.values())
    assert record.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert record.sparsity == pytest.approx(128 / (7 * 256), abs=1e-6)
    assert record.sha256 == content_hash(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"a second copy that nobody reads")
    (tmp_path / "README.md").write_text("a card is no content")
    assert record.sha256 == content_hash(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1e5}))
    assert record.sha256 != content_hash(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_weights(tmp_path, tensors, shard=2048)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert model_record(tmp_path, "tiny").bytes == sum(path.stat().st_size for path in shards)


def test_a_gguf_files_record_is_of_the_file(shared: Path) -> None:
    path = shared / "models" / "stories260K" / "stories260Ktok512.gguf"
    record = model_record(path, "stories")
    assert record.bytes == path.stat().st_size and record.sparsity == 0
    assert record.sha256 != model_record(path.parent, "stories").sha256


def test_a_card_says_what_the_certificate_says(tmp_path: Path) -> None:
    text = model_card(certificate(), "small", {"license": "mit"})
    front = text.split("---")[1].split("\n")
    assert 'base_model: "owner/name"' in front and "base_model_relation: quantized" in front
    assert "license: mit" in front
    assert '["gossamer", "compressed", "quantize", "rtn"]' in text and "50.0% of the bytes" in text
    for figure in ("1.0100 ± 0.0010", "2.00e-03", "90.00%", "12.182", "quantize = 'rtn'", "linear_int8"):
        assert figure in text
    assert "has not been measured" in model_card(replace(certificate(), quality=None), "small")
    path = write_model_card(tmp_path, certificate(), original=resolve_model("gossamer/pocket"))
    assert "license: apache-2.0" in path.read_text()
    with pytest.raises(CheckpointError, match="exists already"):
        write_model_card(tmp_path, certificate())
