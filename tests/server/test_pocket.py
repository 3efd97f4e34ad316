"""The embedded model, served and asked through the openai SDK."""

from __future__ import annotations

from pathlib import Path

from gossamer.engine.request import SamplingParams
from gossamer.llm import LLM
from tests.server.serving import STORY, serving, text_engine


def test_the_sdk_streams_the_embedded_model() -> None:
    engine = text_engine(Path("gossamer/pocket"), quantization="int8", max_num_seqs=4, max_model_len=128)
    with serving(engine, served_model_name="gossamer/pocket") as live:
        assert [m.id for m in live.sdk.models.list()] == ["gossamer/pocket"]
        asked = {"model": "gossamer/pocket", "prompt": STORY, "max_tokens": 24, "seed": 3}
        pieces = list(live.sdk.completions.create(**asked, stream=True))
        text = "".join(piece.choices[0].text for piece in pieces)
        assert pieces[-1].choices[0].finish_reason in ("length", "stop")
        assert len([piece for piece in pieces if piece.choices[0].text]) > 5
        assert live.sdk.completions.create(**asked).choices[0].text == text


def test_the_story_continues_in_english() -> None:
    out = LLM("gossamer/pocket", max_num_seqs=1, max_model_len=128).generate(
        "The old man opened the door and",
        SamplingParams(temperature=0.7, seed=1, max_tokens=48),
        use_tqdm=False,
    )[0]
    words = out.outputs[0].text.split()
    assert len(words) > 5
    assert any(word.strip(".,;\"'").lower() in {"the", "a", "and", "of", "to", "he", "was"} for word in words)
