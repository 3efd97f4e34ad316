"""The steps recover and distil: directory to directory, resumable, with the facts of the certificate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compression needs torch (pip install gossamer[torch])")

from gossamer.backends.reference import ReferenceModel  # noqa: E402
from gossamer.checkpoint.hub import resolve_model  # noqa: E402
from gossamer.checkpoint.safetensors import Checkpoint  # noqa: E402
from gossamer.compress.distill.step import estimate, run  # noqa: E402
from gossamer.compress.model import open_model  # noqa: E402
from gossamer.compress.step import Stopped  # noqa: E402
from gossamer.config.compression.train import Distil, Recover  # noqa: E402
from gossamer.errors import CheckpointError, ConfigError  # noqa: E402
from tests.compress.distill.small import directory, job, text  # noqa: E402
from tests.graph.small import llama, llama_config  # noqa: E402

DISTIL = Distil(steps=4, batch=2, context=16, hidden=0.1, attention=0.1, ce=0.1)
RECOVER = Recover(steps=4, batch=2, context=16)
NARROW = {"hidden_size": 24, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1}


def tensors(at: Path) -> dict[str, np.ndarray]:
    source = Checkpoint(at)
    return {name: np.array(source.read(name)) for name in source.names()}


def half(name: str, array: np.ndarray) -> np.ndarray:
    """float16, and every second input zero."""
    array = array.astype(np.float16)
    if array.ndim == 2:
        array[:, ::2] = 0
    return array


def test_recovery_keeps_zeros_dtype_and_config(tmp_path: Path) -> None:
    at = directory(tmp_path / "model", half)
    work = job(tmp_path, at)
    facts = run(RECOVER, work)
    before, after = tensors(at), tensors(work.out)
    assert before.keys() == after.keys()
    for name, array in after.items():
        assert array.dtype == np.float16
        assert not np.array_equal(array, before[name])
        if array.ndim == 2:
            assert not array[:, ::2].any()
    assert json.loads((work.out / "config.json").read_text()) == json.loads((at / "config.json").read_text())
    assert facts["steps"] == 4 and facts["tokens"] == 4 * 2 * 16
    assert facts["zeros_kept"] == sum(int((a == 0).sum()) for a in before.values() if a.ndim == 2)
    assert facts["bytes"] == sum(a.nbytes for a in after.values())
    json.dumps(facts)


def test_a_stopped_step_goes_on_and_gives_the_same_model(tmp_path: Path) -> None:
    at = directory(tmp_path / "model")
    whole = job(tmp_path / "whole", at)
    run(DISTIL, whole)
    seen: list[tuple[str, int, int]] = []
    part = job(
        tmp_path / "part",
        at,
        progress=lambda *what: seen.append(what),
        stopping=lambda: len(seen) == 2,
    )
    with pytest.raises(Stopped):
        run(DISTIL, part)
    assert [done for _, done, _ in seen] == [1, 2] and "tokens/s" in seen[0][0]
    assert not list(part.out.iterdir())
    run(DISTIL, replace(part, stopping=lambda: False))
    assert [done for _, done, _ in seen] == [1, 2, 3, 4]
    for name, array in tensors(whole.out).items():
        np.testing.assert_array_equal(tensors(part.out)[name], array)
    losses = [json.loads((work.out / "losses.json").read_text()) for work in (whole, part)]
    assert losses[0] == losses[1]
    assert len(losses[0]["loss"]) == 4 and losses[0]["tokens_per_step"] == 32
    assert {"ce", "forward_kl", "hidden", "attention"} <= losses[0].keys()


def test_the_curve_is_a_picture_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    work = job(tmp_path, directory(tmp_path / "model"))
    run(RECOVER, work)
    assert (work.out / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_student_from_nothing_nears_its_teacher(tmp_path: Path) -> None:
    at = directory(tmp_path / "model")
    own = tmp_path / "student.json"
    own.write_text(json.dumps({**llama_config(**NARROW), "tie_word_embeddings": True}))
    config = Distil(student=str(own), steps=60, batch=8, context=16, lr=1e-2, loss="reverse_kl")
    work = job(tmp_path, at)
    facts = run(config, work)
    assert facts["losses"]["reverse_kl"]["last"] < 0.8 * facts["losses"]["reverse_kl"]["first"]
    assert facts["parameters"] < facts["teacher_parameters"]
    graph, source = open_model(work.out)
    assert (graph.hidden, graph.layers) == (24, 1)
    model = ReferenceModel.load(graph, source)
    assert torch.isfinite(model.logits(torch.zeros(1, 4, dtype=torch.long))).all()


def test_the_text_alone_needs_no_teacher_s_predictions(tmp_path: Path) -> None:
    at = directory(tmp_path / "model")
    work = job(tmp_path, at)
    facts = run(Distil(steps=2, batch=2, context=16, loss="ce"), work)
    assert set(facts["losses"]) == {"loss", "ce"}
    recovered = job(tmp_path / "recover", at)
    run(Recover(steps=2, batch=2, context=16), recovered)
    for name, array in tensors(work.out).items():
        np.testing.assert_array_equal(array, tensors(recovered.out)[name])


def test_a_cached_teacher_teaches_the_same(tmp_path: Path) -> None:
    at = directory(tmp_path / "model")
    pupil = directory(tmp_path / "pupil", lambda name, a: np.roll(a, 1, 0))
    live, cached = (job(tmp_path / name, pupil, original=at) for name in ("live", "cached"))
    config = Distil(steps=3, batch=2, context=16, bf16=False)
    for folder in (at, pupil):  # the tokenizers are compared
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(resolve_model("gossamer/pocket") / name, folder)
    losses = [run(config, live), run(replace(config, cache_logits=101), cached)]
    kl = [facts["losses"]["forward_kl"]["last"] for facts in losses]
    assert kl[0] > 0.01 and kl[1] == pytest.approx(kl[0], rel=1e-2)
    assert (cached.scratch / "teacher" / "lessons").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    at = directory(tmp_path / "model")
    other = directory(tmp_path / "other", vocab_size=99)
    with pytest.raises(ConfigError, match="context is 65"):
        run(replace(RECOVER, context=65), job(tmp_path, at))
    with pytest.raises(ConfigError, match="99"):
        run(DISTIL, job(tmp_path, at, original=other))
    with pytest.raises(ConfigError, match="text has 20 tokens"):
        run(RECOVER, job(tmp_path, at, text=text(20)))
    with pytest.raises(ConfigError, match=r"token 500.*vocabulary has 101"):
        run(RECOVER, job(tmp_path, at, text=text() + 400))
    with pytest.raises(CheckpointError, match=r"no config\.json at .*absent"):
        run(replace(DISTIL, student=str(tmp_path / "absent")), job(tmp_path, at))
    bad = directory(tmp_path / "bad", lambda name, a: a * np.nan if "down" in name else a)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight holds NaN"):
        run(RECOVER, job(tmp_path, bad))
    with pytest.raises(ConfigError, match="optimizer is 'sgd'; choose adamw, muon"):
        Recover(optimizer="sgd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cache_logits keeps predictions alone"):
        Distil(cache_logits=8, hidden=1.0)


def test_estimates_follow_the_work() -> None:
    graph = llama()
    plain = estimate(RECOVER, graph, 0, 1e9)
    assert estimate(RECOVER, graph, 0, 2e9).seconds == plain.seconds / 2
    assert estimate(replace(RECOVER, steps=8), graph, 0, 1e9).seconds == 2 * plain.seconds
    taught = estimate(Distil(steps=4, batch=2, context=16), graph, 0, 1e9)
    assert taught.seconds == pytest.approx(plain.seconds * 8 / 6) and taught.memory > plain.memory
    cached = estimate(Distil(steps=4, batch=2, context=16, cache_logits=8), graph, 0, 1e9)
    assert cached.disk - taught.disk == 8 * 16 * (8 * 4 + 4)
    again = estimate(replace(RECOVER, checkpointing=True), graph, 0, 1e9)
    assert again.seconds > plain.seconds and again.memory < plain.memory
