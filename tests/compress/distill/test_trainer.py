"""Training learns, keeps zeros, and goes on exactly where it was killed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compression needs torch (pip install gossamer[torch])")

from gossamer.compress.distill.forward import Forward, attention_taps, hidden_taps  # noqa: E402
from gossamer.compress.distill.matching import Matching, layer_map  # noqa: E402
from gossamer.compress.distill.objective import Objective  # noqa: E402
from gossamer.compress.distill.optim import rate  # noqa: E402
from gossamer.compress.distill.teacher import LiveTeacher  # noqa: E402
from gossamer.compress.distill.trainer import CHECKPOINT, Trainer  # noqa: E402
from gossamer.compress.text import Windows  # noqa: E402
from gossamer.config.compression.train import Distil, Recover, Training  # noqa: E402
from gossamer.errors import CheckpointError, ConfigError, GossamerError  # noqa: E402
from tests.compress.distill.small import VOCAB, model, text  # noqa: E402

CONFIG = Distil(steps=6, batch=2, accumulate=2, context=16, lr=3e-3, hidden=0.5, attention=0.5)
NARROW = {"hidden_size": 24, "head_dim": 4, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distilling(config: Training = CONFIG) -> Trainer:
    """A narrow student that matches all there is to match."""
    teacher, student = model(), model(NARROW)
    pairs = {
        name: (0.5, Matching(student.graph, teacher.graph, taps(student.graph), taps(teacher.graph), 1))
        for name, taps in (("hidden", hidden_taps), ("attention", attention_taps))
    }
    theirs = tuple(other for _, matching in pairs.values() for _, other in matching.pairs)
    objective = Objective(
        ce=0.5, kind="forward_kl", teacher=LiveTeacher(teacher, theirs, bf16=config.bf16), matching=pairs
    )
    return Trainer(student, objective, Windows(text(), config.context, 1), config, key="a run")


def recovering(config: Training, zeros: bool = False) -> Trainer:
    student = model()
    if zeros:
        with torch.no_grad():
            for p in student.parameters():
                if p.ndim > 1:
                    p[:, ::2] = 0
    return Trainer(student, Objective(ce=1.0), Windows(text(), config.context, 1), config)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone()
        for module in (trainer.model, trainer.objective)
        for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("kept", [1, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, kept: int, optimizer: str
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    (tmp_path / "whole").mkdir()
    whole = distilling(config)
    assert whole.run(tmp_path / "whole")
    first = distilling(config)
    while first.step < kept:
        first.train_step()
    first.save(tmp_path)
    first.train_step()  # done after the checkpoint, and lost
    second = distilling(config)
    assert second.resume(tmp_path) and second.step == kept
    assert second.run(tmp_path)
    assert second.losses == whole.losses and len(whole.losses["loss"]) == config.steps
    for (name, a), b in zip(weights(whole).items(), weights(second).values(), strict=True):
        assert torch.equal(a, b), name


def test_computing_activations_again_changes_no_bit(tmp_path: Path) -> None:
    plain, again = distilling(), distilling(replace(CONFIG, checkpointing=True))
    for trainer in (plain, again):
        for _ in range(2):
            trainer.train_step()
    assert plain.losses == again.losses
    for (name, a), b in zip(weights(plain).items(), weights(again).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_and_zeros_stay_zero(tmp_path: Path, optimizer: str) -> None:
    config = Recover(steps=40, batch=8, context=16, lr=1e-2, optimizer=optimizer)  # type: ignore[arg-type]
    trainer = recovering(config, zeros=True)
    trainer.run(tmp_path)
    losses = trainer.losses["loss"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert trainer.zeros.count > 0
    for name, p in trainer.model.named_parameters():
        if p.ndim > 1:
            assert not p[:, ::2].any(), name
            assert p[:, 1::2].all(), name


def test_all_losses_fall(tmp_path: Path) -> None:
    trainer = distilling(replace(CONFIG, steps=40, lr=1e-2))
    trainer.run(tmp_path)
    for name in ("ce", "hidden", "attention", "loss"):
        series = trainer.losses[name]
        assert np.mean(series[-5:]) < 0.9 * np.mean(series[:3]), name


def test_gradients_of_parts_of_a_batch_add_up() -> None:
    whole = recovering(Recover(steps=3, batch=4, context=16, bf16=False))
    parts = recovering(Recover(steps=3, batch=1, accumulate=4, context=16, bf16=False))
    for trainer in (whole, parts):
        trainer.train_step()
    assert whole.losses["loss"] == pytest.approx(parts.losses["loss"], rel=1e-5)
    for name, p in whole.model.named_parameters():
        mine, other = p.grad, parts.model.get_parameter(name).grad
        assert mine is not None and other is not None
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_vectors_are_not_decayed_and_matrices_are(tmp_path: Path) -> None:
    """Of a weight that never has a gradient only the decay is left."""
    trainer = recovering(Recover(steps=1, warmup=0.0, batch=1, context=16, lr=0.1, weight_decay=1.0))
    groups = [group for optimizer in trainer._optimizers for group in optimizer.param_groups]
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    unseen = VOCAB - 1
    before = trainer.model.weight("embedding").detach().clone()
    trainer.windows = Windows(np.tile(np.arange(8, dtype=np.int32), 100), 16, 1)
    trainer.train_step()
    after = trainer.model.weight("embedding").detach()
    torch.testing.assert_close(after[unseen], before[unseen] * 0.9)


def test_a_loss_that_is_not_finite_says_so_and_loses_nothing(tmp_path: Path) -> None:
    trainer = recovering(Recover(steps=5, batch=2, context=16))
    trainer.train_step()
    trainer.save(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters())[:] = float("inf")
    with pytest.raises(GossamerError, match=r"nan in step 2 of 5.*lower lr \(it is 0.001\)"):
        trainer.run(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_gradient_that_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    trainer = recovering(Recover(steps=5, batch=2, context=16))
    before = weights(trainer)
    next(trainer.model.parameters()).register_hook(lambda g: g * float("nan"))
    with pytest.raises(GossamerError, match="norm of the gradients is nan in step 1"):
        trainer.train_step()
    for name, p in weights(trainer).items():
        assert torch.equal(p, before[name]), name


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    trainer = distilling()
    assert not trainer.resume(tmp_path)
    trainer.save(tmp_path)
    with pytest.raises(ConfigError, match=r"lr 0\.003, not 0\.1"):
        distilling(replace(CONFIG, lr=0.1)).resume(tmp_path)
    assert distilling(replace(CONFIG, save_seconds=5.0, checkpointing=True)).resume(tmp_path)
    other = distilling()
    other.key = "another"
    with pytest.raises(ConfigError, match="another model"):
        other.resume(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="remove it to begin anew"):
        distilling().resume(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = recovering(Recover(steps=5, batch=2, context=16))
    trainer.save(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gossamer.compress.distill.trainer.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*the last one stays"):
        trainer.save(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_the_learning_rate_rises_and_falls() -> None:
    config = Recover(steps=100, lr=0.5, warmup=0.1, final=0.2)
    rates = [rate(config, step) for step in range(100)]
    assert rates[9] == rates[10] == pytest.approx(0.5) == max(rates)
    assert rates[-1] == pytest.approx(0.1) == min(rates[10:])
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert all(math.isfinite(rate(Recover(steps=1, warmup=w), 0)) for w in (0.0, 0.5, 1.0))


def test_layers_are_mapped_evenly_and_the_last_to_the_last() -> None:
    assert layer_map(3, 6) == (1, 3, 5)
    assert layer_map(4, 4) == (0, 1, 2, 3)
    assert layer_map(1, 6) == (5,)
    for layers in range(1, 9):
        for of in range(layers, 12):
            found = layer_map(layers, of)
            assert found[-1] == of - 1 and len(set(found)) == layers and list(found) == sorted(found)


def test_taps_are_what_layers_and_attention_give() -> None:
    made = model()
    out = Forward(made, (*hidden_taps(made.graph), *attention_taps(made.graph)))(
        torch.zeros(2, 5, dtype=torch.long)
    )
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "logits": (10, VOCAB),
        "layers.0.mlp.residual": (10, 48),
        "layers.1.mlp.residual": (10, 48),
        "layers.0.attention.heads": (10, 48),
        "layers.1.attention.heads": (10, 48),
    }
