"""tools/pocket: the training model is transformers' Llama, the schedule ends, a run resumes exactly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="tools/pocket trains with torch")
POCKET = Path(__file__).parents[2] / "tools" / "pocket"
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 160,
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of tools/pocket, whose modules stand beside each other."""
    monkeypatch.syspath_prepend(str(POCKET))
    names = {path.stem for path in POCKET.glob("*.py")}

    def importer(name: str) -> ModuleType:
        return __import__(name)

    yield importer
    for name in names & sys.modules.keys():
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(POCKET)):
            del sys.modules[name]


@pytest.fixture
def model(load: Any) -> Any:
    module = load("model")
    config = module.PocketConfig(**SMALL)
    pocket = module.build(config)
    module.initialize(pocket, config, 3)
    return pocket


def test_logits_equal_transformers(load: Any, model: Any) -> None:
    transformers = pytest.importorskip("transformers")
    module = load("model")
    config = transformers.LlamaConfig(**module.PocketConfig(**SMALL).to_hf())
    reference = transformers.LlamaForCausalLM(config).float().eval()
    weights = module.hf_weights(model)
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids = torch.randint(0, SMALL["vocab_size"], (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = module.build(module.PocketConfig(**SMALL), weights)
        torch.testing.assert_close(model.logits(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.logits(ids), again.logits(ids), rtol=0, atol=0)


def test_cleaning_keeps_paragraphs_and_verse(load: Any) -> None:
    text = load("text")
    book = (
        "\ufeff##  CHAPTER I \n\n\n\n_So_ it was, **indeed**.\u00a0And a_b stayed. \nVerse,\nmore verse.\n\n"
    )
    assert text.clean(book) == "## CHAPTER I\n\nSo it was, indeed. And a_b stayed.\nVerse,\nmore verse.\n"


def test_tokenizer_round_trips_any_text(load: Any) -> None:
    prepare = load("prepare")
    tokenizer = prepare.train_tokenizer(iter(["It's the lady's hat, and 1871 hats.\n\n"] * 3), 280)
    for text in ("It's 1899.\n\n  Tabs\tand  “quotes”", "naïve 😀 \x00", " leading", "trailing \n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id("<|endofbook|>") == 0


def test_windows_cover_every_token_once_an_epoch(load: Any, tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "t")
    windows = load("data").Windows(tmp_path / "t", context=10, seed=1, validation_tokens=100)
    seen: list[int] = []
    for index in range(windows.per_epoch):
        inputs, targets = windows.batch(index, 1)
        assert torch.equal(inputs[0, 1:], targets[0, :-1])
        seen += inputs[0].tolist()
    assert len(set(seen)) == len(seen) >= 880 and max(seen) < 900
    first, _ = windows.batch(0, 1)
    assert torch.equal(first, windows.batch(0, 1)[0]), "the order depends on the position alone"


@pytest.mark.parametrize("speeds", [[100.0] * 400, [100.0] * 60 + [7.0] * 400, [20.0] * 50 + [300.0] * 900])
def test_schedule_always_ends_decayed(load: Any, speeds: list[float]) -> None:
    schedule = load("schedule").Schedule(warmup_tokens=500, least_decay_steps=20)
    seconds, tokens, deadline = 0.0, 0, 100.0
    factors = []
    for speed in speeds:
        factors.append(schedule.factor(tokens))
        tokens, seconds = tokens + 100, seconds + 100 / speed
        expected = max(0.0, deadline - seconds) * speed
        if schedule.due(tokens_seen=tokens, tokens_expected=expected):
            schedule.begin_decay()
        schedule.advance(step_tokens=100, tokens_expected=expected)
        if schedule.finished:
            break
    assert schedule.finished and schedule.decay_steps >= 20
    assert max(factors) == 1.0 and factors[-1] < 0.2
    assert schedule.factor(tokens) == pytest.approx(0.0, abs=1e-6)


def test_a_long_pause_hardly_changes_the_expected_speed(load: Any) -> None:
    smoothed = load("train").smoothed
    assert smoothed(0.0, 100.0) == 100.0
    assert smoothed(100.0, 0.01) > 94.0


def test_evaluation_scores_every_prediction_once(load: Any, model: Any) -> None:
    evaluate = load("evaluate")
    spans = evaluate.windows(1000, 160, 80)
    scored = [i for _, first, end in spans for i in range(first, end)]
    assert scored == list(range(1000))
    assert all(end - start <= 160 for start, _, end in spans)
    ids = torch.randint(0, 320, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        logits = model.logits(torch.tensor([ids[:-1]]))[0]
        whole = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    assert evaluate.score_ids(model, ids, context=160, stride=80) == pytest.approx(whole, rel=1e-5)
    score = evaluate.Score(name="x", tokens=10, size_bytes=40, nats=20.0)
    assert (score.loss, score.bits_per_byte) == (2.0, pytest.approx(20 / math.log(2) / 40))


def train(work: Path, *extra: str) -> dict[str, Any]:
    """Runs the training script on a tiny budget and returns its checkpoint."""
    command = [sys.executable, str(POCKET / "train.py"), "--work", str(work), "--no-compile"]
    sizes = {
        "context": 32,
        "batch": 2,
        "micro-batch": 1,
        "workers": 2,
        "validation": 200,
        "validate-every": 5,
    }
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([*command, *options, *extra], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    saved: dict[str, Any] = torch.load(work / "checkpoint.pt", weights_only=True)
    return saved


@pytest.mark.slow
def test_run_resumes_exactly_and_exports(load: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    prepare = load("prepare")
    texts = ["Once upon a time there was a small dog. He ran over the hill, and 3 sheep after him.\n"] * 200
    for name in ("once", "twice"):
        work = tmp_path / name
        work.mkdir()
        tokenizer = prepare.train_tokenizer(iter(texts), 400)
        tokenizer.save(str(work / "tokenizer.json"))
        ids = np.array(tokenizer.encode("".join(texts)).ids, dtype=np.uint16)
        ids.tofile(work / "tokens.u16")
        facts = {"books": 1, "bytes": 100, "tokens": len(ids), "bytes_per_token": 4.0}
        (work / "data.json").write_text(json.dumps(facts))
    once = train(tmp_path / "once", "--stop-after", "6")
    train(tmp_path / "twice", "--stop-after", "3")
    twice = train(tmp_path / "twice", "--stop-after", "3")
    assert twice["state"]["position"] == once["state"]["position"] == 12
    assert [tokens for tokens, _ in twice["state"]["train_loss"]] == [64 * i for i in range(1, 7)]
    for name, weight in once["model"].items():
        torch.testing.assert_close(weight, twice["model"][name], rtol=0, atol=1e-6)

    held_out = tmp_path / "books" / "held-out"
    held_out.mkdir(parents=True)
    (held_out / "a-dog.txt").write_text("".join(texts[:30]))
    command = [sys.executable, str(POCKET / "export.py"), "--books", str(held_out.parent), "--unfinished"]
    paths = ["--work", str(tmp_path / "once"), "--out", str(tmp_path / "model")]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("Once upon a time")["input_ids"]
    weight = once["model"]["model.embed_tokens.weight"].bfloat16().float()
    torch.testing.assert_close(reference.lm_head.weight, weight, rtol=0, atol=0)
    assert tokenizer.decode(tokens) == "Once upon a time"
    assert "bits per byte" in (tmp_path / "model" / "README.md").read_text()
