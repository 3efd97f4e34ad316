"""The recipe of draft heads: it learns, goes on exactly where it was killed, and its output can be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compression needs torch (pip install gossamer[torch])")

from gossamer.backends.reference import ReferenceModel  # noqa: E402
from gossamer.checkpoint.heads import find_head, load_head  # noqa: E402
from gossamer.checkpoint.weights import DummySource  # noqa: E402
from gossamer.compress.eagle.__main__ import main  # noqa: E402
from gossamer.compress.eagle.acceptance import measure, write_on  # noqa: E402
from gossamer.compress.eagle.train import CHECKPOINT, EagleTrainer, Recipe, forward, shifted, write_head  # noqa: E402
from gossamer.compress.text import Windows  # noqa: E402
from gossamer.errors import CheckpointError, ConfigError  # noqa: E402
from gossamer.graph.families.eagle import HIDDEN, own_weights  # noqa: E402
from gossamer.graph.ir import Graph  # noqa: E402
from tests.graph.small import llama  # noqa: E402

RECIPE = Recipe(steps=8, batch=4, context=16, lr=3e-3)


def graph() -> Graph:
    return llama(num_hidden_layers=2)


def trainer(recipe: Recipe = RECIPE, graph: Graph | None = None) -> EagleTrainer:
    graph = graph or llama(num_hidden_layers=2)
    tokens = np.random.default_rng(1).integers(0, 101, 4000).astype(np.int32)
    return EagleTrainer(graph, DummySource(graph), Windows(tokens, recipe.context, recipe.seed), recipe)


def state(made: EagleTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.head.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_learns_and_leaves_the_target_s_weights_alone(tmp_path: Path) -> None:
    made = trainer(replace(RECIPE, steps=60))
    before = state(made)
    assert made.run(tmp_path)
    after, own = state(made), own_weights(made.head.graph)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in own), name
    tokens = np.array(made.losses.tokens)
    assert tokens.shape == (60, 2) and (tokens[-5:].mean(0) < tokens[:5].mean(0) - 0.01).all()


def test_no_second_pass_without_guesses_of_its_own(tmp_path: Path) -> None:
    made = trainer(replace(RECIPE, own=0.0, steps=2))
    made.run(tmp_path)
    assert np.array(made.losses.tokens).shape == (2, 1)


@pytest.mark.parametrize("saved", [1, 5])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path, saved: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = trainer()
    whole.run(tmp_path / "whole")
    killed = trainer()

    def kill(made: EagleTrainer) -> None:
        if made.step == saved:
            made.save(tmp_path)
        if made.step == saved + 1:  # work since the checkpoint is lost
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.run(tmp_path, on_step=kill)
    again = trainer()
    assert again.resume(tmp_path) and again.step == saved
    assert again.run(tmp_path)
    assert_same(state(again), state(whole))
    assert again.losses == whole.losses
    assert not list(tmp_path.glob(".*"))


def test_a_stop_is_a_checkpoint(tmp_path: Path) -> None:
    made = trainer()
    assert not made.run(tmp_path, stop=lambda: made.step == 3)
    again = trainer()
    assert again.resume(tmp_path) and again.step == 3
    assert_same(state(again), state(made))


def test_another_recipe_or_model_does_not_resume(tmp_path: Path) -> None:
    assert not trainer().resume(tmp_path)
    made = trainer()
    made.save(tmp_path)
    with pytest.raises(ConfigError, match=r"trained with lr 0\.003, not 0\.1"):
        trainer(replace(RECIPE, lr=0.1)).resume(tmp_path)
    with pytest.raises(ConfigError, match="head for another model"):
        trainer(graph=llama(intermediate_size=80)).resume(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="remove it to begin anew"):
        trainer().resume(tmp_path)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"context": 1}, {"own": 1.5}, {"lr": 0.0}])
def test_recipes_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(RECIPE, **wrong)


def test_what_is_written_is_what_is_loaded(tmp_path: Path) -> None:
    made, source = trainer(), DummySource(graph())
    made.run(tmp_path)
    write_head(made.head, graph(), tmp_path, {"steps": 8})
    assert json.loads((tmp_path / "config.json").read_text())["training"] == {"steps": 8}
    head, weights = load_head(tmp_path, graph(), source)
    assert head == made.head.graph
    loaded = ReferenceModel.load(head, weights)
    own = own_weights(head)
    for name, p in loaded.named_parameters():
        expected = made.head.weight(name)
        assert torch.equal(p, expected.bfloat16().float() if name in own else expected), name
    assert weights.content_key() != source.content_key()


def test_heads_of_others_and_other_models_are_refused(tmp_path: Path) -> None:
    write_head(trainer().head, graph(), tmp_path)
    for other, match in (
        (llama(vocab_size=99), "vocab_size 101; small has 99"),
        (llama(hidden_size=96, head_dim=8), "hidden_size 48; small has 96"),
        (llama(intermediate_size=80), "has shape"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_head(tmp_path, other, DummySource(other))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"type 'llama'.*draft_model"):
        load_head(tmp_path, graph(), DummySource(graph()))
    with pytest.raises(ConfigError, match=r"has none in eagle/.*compress\.eagle"):
        find_head(None, tmp_path)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_acceptance_is_what_drafting_by_the_definition_gives(tmp_path: Path, temperature: float) -> None:
    made = trainer(replace(RECIPE, steps=40))
    made.run(tmp_path)
    target, head = made.target, made.head
    prompts = np.random.default_rng(2).integers(0, 101, (3, 4))
    seeds, start, length = [5, 6, 7], 4, 3
    with torch.inference_mode():
        ids = write_on(target, prompts, 12, temperature=temperature, seeds=seeds)
        # What the target writes is what its logits over the whole text say.
        logits = forward(target, torch.from_numpy(ids))["logits"].view(3, 16, -1)
        chooses = chooser(temperature, seeds)
        for b in range(3):
            for at in range(start, 16):
                assert ids[b, at] == chooses(logits[b, at - 1], b, at - start)
        found = measure(target, head, ids, start=start, length=length, temperature=temperature, seeds=seeds)
        hits, drafts = np.zeros(length), 0
        for b in range(3):
            text = torch.from_numpy(ids[b : b + 1])
            true = shifted(forward(target, text)[HIDDEN], text)
            for last in range(start - 1, 16 - length):
                tokens, given = text[0, : last + 1].tolist(), true[: last + 1]
                right = True
                for depth in range(length):
                    out = forward(head, torch.tensor([tokens]), given)
                    token = chooses(out["logits"][-1], b, last + 1 + depth - start)
                    right = right and token == ids[b, last + 1 + depth]
                    hits[depth] += right
                    tokens, given = [*tokens, token], torch.cat((given, out[HIDDEN][-1:]))
                drafts += 1
    assert found.drafts == drafts and drafts == 3 * 10
    np.testing.assert_allclose(found.accepted, hits / drafts)
    assert found.tokens_per_step == pytest.approx(1 + (hits / drafts).sum())


def chooser(temperature: float, seeds: list[int]) -> Callable[[torch.Tensor, int, int], int]:
    from gossamer.graph.ops.sampling import sample_row

    def choose(logits: torch.Tensor, sequence: int, index: int) -> int:
        row = logits.numpy()
        return sample_row(row, temperature=temperature, seed=seeds[sequence], output_index=index)[0]

    return choose


def test_the_command_trains_goes_on_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "head"
    text.write_text("The old man shut the door.\nHe turned to the stranger, and smiled.\n" * 200)
    command = ["gossamer/pocket", "--text", str(text), "-o", str(out), "--batch=2", "--context=12"]
    assert main([*command, "--steps=2", "--held-out", str(text)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["target"] == "gossamer/pocket" and config["training"]["steps"] == 2
    assert set(config["training"]["accepted"]) == {"text as it is", "greedy", "temperature 0.8"}
    capsys.readouterr()
    assert main([*command, "--steps=2"]) == 0
    assert "going on at step 2" in capsys.readouterr().err
    assert main([*command, "--steps=3"]) == 2
    assert "trained with steps 2" in capsys.readouterr().err
    assert main([*command[:-1], "--context=1000"]) == 2
    assert "beyond the 512 positions" in capsys.readouterr().err
