"""Every peer's file keeps the contract, and what they share is what the product says it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import llama_cpp
from benchmarks.peers.checkpoint import write_checkpoint
from benchmarks.peers.contract import PEERS, Limits, get_peer
from gossamer.checkpoint.weights import DummySource
from gossamer.graph.families import build_graph
from gossamer.graph.weights import Constant

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    write_checkpoint(folder / "config.json", folder / "checkpoint", None)
    return folder / "checkpoint"


@pytest.mark.parametrize("module", PEERS)
def test_a_peers_file_imports_without_its_library(module: str) -> None:
    peer = get_peer(module)
    names = [f.name for f in peer.formats]
    assert len(set(names)) == len(names) and {f.bits for f in peer.formats} <= {4, 8, 16}
    assert all("/" not in name for name in names)  # they name files
    assert any(f.default for f in peer.formats)
    for value in peer.run_env.values():
        value.format(threads=2)


def test_the_child_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, benchmarks.peers.child\n"
        "from benchmarks.peers.contract import PEERS, get_peer\n"
        "for name in PEERS: get_peer(name)\n"
        "print(sorted({'numpy', 'gossamer', 'torch', 'rich'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_checkpoint_holds_what_the_engine_would_make_up_itself(checkpoint: Path) -> None:
    source = DummySource(build_graph(TINY))
    stored = dict(llama_cpp._bf16_tensors(checkpoint / "model.safetensors"))
    assert "lm_head.weight" not in stored and len(stored) == 2 + 2 * 9
    for name, half in stored.items():
        wide = (half.astype(np.uint32) << 16).view(np.float32)
        assert np.allclose(wide, source.read(name), rtol=1 / 256, atol=0)


@pytest.mark.parametrize("format", ["int4", "int8", "bf16"])
def test_gossamer_times_every_token(checkpoint: Path, format: str) -> None:
    peer = get_peer("gossamer")
    session = peer.load(checkpoint, format, Limits(2, 3, 32))
    timing = session.generate([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 6)
    assert timing.prefill_s > 0 and timing.decode_s > 0
    assert 0 < timing.decode_tokens <= 15  # three first tokens belong to the prefill
    assert session.generate([[1, 2, 3]], 1).decode_tokens == 0


def test_rotary_factors_are_the_products() -> None:
    graph = build_graph(TINY | {"rope_scaling": LLAMA3})
    (rope, *_) = (node for node in graph.nodes if node.op == "rope")
    expr = graph.weights[rope.weights[0]].expr
    assert isinstance(expr, Constant)
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = llama_cpp._rope_factors(TINY | {"rope_scaling": LLAMA3})
    assert np.allclose(plain / factors, np.array(expr.values), rtol=1e-6)
    assert llama_cpp._rope_factors(TINY) == []
