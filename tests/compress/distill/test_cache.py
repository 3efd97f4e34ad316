"""A teacher's logits on disk are what it said, and are filled once."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="compression needs torch (pip install gossamer[torch])")

from gossamer.compress.distill.cache import LogitCache, cache_key, record_bytes  # noqa: E402
from gossamer.compress.distill.losses import TopTarget  # noqa: E402
from gossamer.compress.distill.teacher import LiveTeacher, Teacher  # noqa: E402
from gossamer.compress.step import Stopped  # noqa: E402
from gossamer.compress.text import Windows  # noqa: E402
from gossamer.errors import CheckpointError  # noqa: E402
from tests.compress.distill.small import VOCAB, model, text  # noqa: E402

WINDOWS = Windows(text(), 16, 1)


def teacher() -> Teacher:
    return LiveTeacher(model(), bf16=False)


def cache(at: Path, key: str = "key", kept: int = 5) -> LogitCache:
    return LogitCache(at, key, length=16, kept=kept, vocab=VOCAB, temperature=2.0)


def top(made: LogitCache, position: int, count: int) -> TopTarget:
    target = made.lesson(position, WINDOWS.batch(position, count)).target
    assert isinstance(target, TopTarget)
    return target


@pytest.mark.parametrize("kept", [1, 5, VOCAB, 500])
def test_it_gives_the_largest_and_the_share_of_the_rest(tmp_path: Path, kept: int) -> None:
    made = cache(tmp_path, kept=kept)
    made.fill(teacher, WINDOWS, 6, 2)
    ids_BL = WINDOWS.batch(2, 3)
    live = teacher().lesson(2, ids_BL).target.log_p(2.0)
    got = top(made, 2, 3)
    kept = min(kept, VOCAB)
    assert got.ids.shape == got.logs.shape == (48, kept)
    torch.testing.assert_close(got.logs, live.topk(kept)[0], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(got.logs, live.gather(-1, got.ids), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(got.rest, 1 - got.logs.exp().sum(-1), rtol=0, atol=2e-3)
    assert (tmp_path / "lessons").stat().st_size == 6 * record_bytes(16, kept, VOCAB)


def test_an_interruption_changes_no_bit_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    whole = cache(tmp_path / "whole")
    whole.fill(teacher, WINDOWS, 8, 2)
    part = cache(tmp_path / "part")

    def stop(done: int) -> None:
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        part.fill(teacher, WINDOWS, 8, 2, stop)
    with (tmp_path / "part" / "lessons").open("ab") as file:  # killed within a batch
        file.write(b"x" * int(1.5 * record_bytes(16, 5, VOCAB)))
    batches: list[int] = []
    again = cache(tmp_path / "part")
    again.fill(teacher, WINDOWS, 8, 2, batches.append)
    assert batches == [4, 6, 8]
    lessons = [(tmp_path / name / "lessons").read_bytes() for name in ("whole", "part")]
    assert lessons[0] == lessons[1]

    def none() -> Teacher:
        raise AssertionError("the teacher is loaded although all is there")

    cache(tmp_path / "part").fill(none, WINDOWS, 8, 2)
    cache(tmp_path / "part").fill(none, WINDOWS, 6, 2)


def test_another_key_begins_anew(tmp_path: Path) -> None:
    cache(tmp_path).fill(teacher, WINDOWS, 2, 2)
    assert len(cache(tmp_path)) == 2
    assert len(cache(tmp_path, "another")) == 0
    tokens = text()
    keys = {
        cache_key("a", tokens, seed=1), cache_key("b", tokens, seed=1), cache_key("a", tokens, seed=2),
        cache_key("a", tokens[:-1], seed=1), cache_key("a", tokens, seed=1, kept=2),
    }  # fmt: skip
    assert len(keys) == 5


def test_a_full_disk_is_said_and_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cache(tmp_path)
    made.fill(teacher, WINDOWS, 2, 2)

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LogitCache, "_records", full)
    with pytest.raises(CheckpointError, match=r"No space left.*lower cache_logits"):
        made.fill(teacher, WINDOWS, 8, 2)
    assert len(made) == 2


def test_large_vocabularies_take_four_bytes_a_token() -> None:
    assert record_bytes(4, 8, 1 << 16) == 4 * (8 * 4 + 4)
    assert record_bytes(4, 8, (1 << 16) + 1) == 4 * (8 * 6 + 4)
