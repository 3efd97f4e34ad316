"""The life of a compression: whole results only, going on after an interruption, and what is refused."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gossamer.checkpoint.safetensors import Checkpoint
from gossamer.compress.recipe import parse_recipe
from gossamer.compress.run import Compression, Watch, compress, estimates
from gossamer.compress.step import Stopped
from gossamer.config.compression import RTN, Distil, Magnitude, StepConfig
from gossamer.errors import CheckpointError, ConfigError, MemoryBudgetError
from gossamer.export.gguf import write_gguf
from gossamer.graph.families import build_graph
from gossamer.quality.certificate import read_certificate
from tests.compress.test_blocks import graph_of

POCKET = Path(__file__).parents[2] / "src" / "gossamer" / "models" / "pocket"
RECIPE = parse_recipe(
    """
[data]
context = 16
samples = 4
[[step]]
prune = "wanda"
[[step]]
train = "recover"
steps = 4
batch = 1
context = 16
bf16 = false
"""
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The old house stood by the river, and nobody had lived in it for many years.\n" * 60)
    return path


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(given(text, tmp_path_factory.mktemp("whole") / "small"))


def given(text: Path, out: Path) -> Compression:
    return Compression(
        model="gossamer/pocket", recipe=RECIPE, out=out, text=(text,), threads=1, measure=False
    )


def tensors(directory: Path) -> dict[str, bytes]:
    source = Checkpoint(directory)
    return {name: source.read(name).tobytes() for name in source.names()}


def test_the_result_is_a_model_with_its_certificate(made: Path) -> None:
    certificate = read_certificate(made)
    assert certificate is not None
    assert [step.step for step in certificate.steps] == ["prune wanda", "train recover"]
    assert certificate.compressed.sparsity == pytest.approx(0.5, abs=0.01)
    assert certificate.original.sparsity < 0.01
    assert certificate.data is not None
    assert certificate.data.files[0].name == "story.txt"
    assert certificate.quality is None  # it was not to be measured, and says so
    assert "gossamer/pocket" in (made / "README.md").read_text()
    assert sorted(p.name for p in made.parent.iterdir()) == ["small"]  # nothing is left beside it
    build_graph(json.loads((made / "config.json").read_text()))


@pytest.mark.parametrize("calls", [0, 2, 9])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(
    calls: int, made: Path, text: Path, tmp_path: Path
) -> None:
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > calls

    job = given(text, tmp_path / "small")
    with pytest.raises(Stopped):
        compress(job, Watch(stopping=stopping))
    assert not job.out.exists()
    resumed: list[bool] = []
    compress(job, Watch(step=lambda index, name, done: resumed.append(done)))
    assert tensors(job.out) == tensors(made)
    assert resumed[1] is False


def test_a_step_that_was_finished_is_not_done_again(made: Path, text: Path, tmp_path: Path) -> None:
    job, began = given(text, tmp_path / "small"), 0

    def step(index: int, name: str, done: bool) -> None:
        nonlocal began
        began = index

    with pytest.raises(Stopped):
        compress(job, Watch(step=step, stopping=lambda: began == 1))
    done: list[bool] = []
    compress(job, Watch(step=lambda index, name, resumed: done.append(resumed)))
    assert done == [True, False]
    assert tensors(job.out) == tensors(made)


def test_another_recipe_does_not_go_on_from_this_ones_work(text: Path, tmp_path: Path) -> None:
    job = given(text, tmp_path / "small")
    with pytest.raises(Stopped):
        compress(job, Watch(stopping=lambda: True))
    other = replace(RECIPE, steps=RECIPE.steps[:1])
    with pytest.raises(ConfigError, match="another recipe"):
        compress(replace(job, recipe=other))


def test_what_is_there_is_never_overwritten(text: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match="exists already"):
        compress(given(text, tmp_path / "small"))
    assert (tmp_path / "small" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["file/small", "x" * 300, "link"])
def test_a_place_that_cannot_be_is_refused_before_any_work(text: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="choose another"):
        compress(given(text, tmp_path / name))


def test_text_kept_before_the_state_was_written_is_not_taken_for_another_runs(
    made: Path, text: Path, tmp_path: Path
) -> None:
    job = given(text, tmp_path / "small")
    job.work.mkdir()
    for name in ("text.npy", "held.npy"):  # of a run killed just there, with another text
        np.save(job.work / name, np.full(400, 7, np.int32))
    assert tensors(compress(job)) == tensors(made)


def test_what_another_run_made_meanwhile_is_kept(text: Path, tmp_path: Path) -> None:
    job = given(text, tmp_path / "small")

    def other(expected: object) -> None:
        job.out.mkdir()
        (job.out / "config.json").write_text("{}")

    with pytest.raises(ConfigError, match="exists already"):
        compress(job, Watch(estimate=other))
    assert [path.name for path in job.out.iterdir()] == ["config.json"]


@pytest.mark.parametrize("gone", [True, False])
def test_the_certificate_names_the_text_that_was_read_whatever_became_of_it(
    made: Path, text: Path, tmp_path: Path, gone: bool
) -> None:
    own = tmp_path / "story.txt"
    own.write_bytes(text.read_bytes())
    job = given(own, tmp_path / "small")
    with pytest.raises(Stopped):
        compress(job, Watch(stopping=lambda: True))
    if gone:
        own.unlink()
    else:
        own.write_text("another story")
    first, second = read_certificate(made), read_certificate(compress(job))
    assert first is not None
    assert second is not None
    assert first.data == second.data


def test_two_at_once_do_not_share_a_workplace(text: Path, tmp_path: Path) -> None:
    job = given(text, tmp_path / "small")
    job.work.mkdir(parents=True)
    with (job.work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another compression works"):
            compress(job)


def test_text_is_needed_and_must_be_long_enough(text: Path, tmp_path: Path) -> None:
    job = given(text, tmp_path / "small")
    with pytest.raises(ConfigError, match="no text is given"):
        compress(replace(job, text=()))
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(ConfigError, match="calibration text has"):
        compress(replace(job, text=(short,)))
    with pytest.raises(CheckpointError, match=r"absent\.txt"):
        compress(replace(job, out=tmp_path / "other", text=(tmp_path / "absent.txt",)))
    assert not job.out.exists()


def test_a_text_that_was_too_short_may_grow(text: Path, tmp_path: Path) -> None:
    growing = tmp_path / "growing.txt"
    growing.write_text("Too short.")
    job = replace(given(growing, tmp_path / "small"), recipe=replace(RECIPE, steps=RECIPE.steps[:1]))
    with pytest.raises(ConfigError, match="calibration text has"):
        compress(job)
    growing.write_text(text.read_text())
    assert compress(job) == job.out


def test_a_disk_that_is_too_small_is_named_in_numbers_that_differ(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_500_000))
    with pytest.raises(ConfigError, match=r"about [1-9]\d+\.\d MB of disk.*and 2\.5 MB are free"):
        compress(given(text, tmp_path / "small"))


def test_training_beyond_the_memory_is_refused_before_the_first_step(text: Path, tmp_path: Path) -> None:
    steps = (*RECIPE.steps[:1], replace(RECIPE.steps[1], batch=65536, context=512))  # type: ignore[call-arg]
    job = replace(given(text, tmp_path / "small"), recipe=replace(RECIPE, steps=steps))
    with pytest.raises(MemoryBudgetError, match=r"train recover would take about .* GB"):
        compress(job)
    assert not job.work.exists()


def test_every_step_says_what_it_will_take() -> None:
    graph = graph_of("llama")
    found = estimates(graph, RECIPE)
    assert [name for name, _ in found] == ["prune wanda", "train recover"]
    assert all(e.seconds > 0 and e.memory > 0 and e.disk >= 0 for _, e in found)


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (RTN(format="int4-g32", overrides=(("no.such.*", "int8"),)), "matches no matrix"),
        (Magnitude(skip=("no.such.*",)), "matches no matrix"),
        (Distil(teacher="/no/such/teacher"), "no model directory at '/no/such/teacher'"),
    ],
)
def test_what_the_model_cannot_take_or_is_nowhere_is_refused_before_the_first_step(
    text: Path, tmp_path: Path, last: StepConfig, says: str
) -> None:
    job = replace(given(text, tmp_path / "small"), recipe=replace(RECIPE, steps=(*RECIPE.steps, last)))
    began: list[str] = []
    with pytest.raises((ConfigError, CheckpointError), match=says):
        compress(job, Watch(step=lambda index, name, done: began.append(name)))
    assert not began
    assert not job.work.exists()


def test_a_gguf_file_of_floats_is_compressed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "pocket.gguf", POCKET, type="bf16")
    recipe = parse_recipe('[[step]]\nquantize = "rtn"\nformat = "int8"')
    made = {}
    for name, model in (("a", str(tmp_path / "pocket.gguf")), ("b", "gossamer/pocket")):
        job = Compression(model=model, recipe=recipe, out=tmp_path / name, threads=1, measure=False)
        made[name] = Checkpoint(compress(job))
    assert sorted(made["a"].names()) == sorted(made["b"].names())
    for name in made["a"].names():  # GGUF holds norms in f32
        np.testing.assert_array_equal(
            made["a"].read(name).astype(np.float32), made["b"].read(name).astype(np.float32)
        )


def test_a_quantized_model_is_refused_at_once(made: Path, text: Path, tmp_path: Path) -> None:
    recipe = parse_recipe('[[step]]\nquantize = "rtn"\nformat = "int8"')
    first = compress(
        Compression(model=str(made), recipe=recipe, out=tmp_path / "q", threads=1, measure=False)
    )
    with pytest.raises(ConfigError, match="works on floats"):
        compress(replace(given(text, tmp_path / "again"), model=str(first)))
