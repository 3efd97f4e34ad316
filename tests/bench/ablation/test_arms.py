from __future__ import annotations

import shlex
from dataclasses import fields
from itertools import pairwise

import pytest
import typer

from gossamer.bench.ablation.arms import (
    NAMES,
    ORDER,
    Arm,
    Setting,
    alone,
    base,
    cumulative,
    further,
    typed,
    without,
)
from gossamer.cli.main import app
from gossamer.config import EngineConfig
from gossamer.errors import ConfigError

ALL = [*alone(NAMES, student="gossamer/pocket-half"), *cumulative(NAMES), *without(NAMES)]
MEASURED = [arm for arm in ALL if arm.on is not None]
FURTHER = [*further(NAMES, student="gossamer/pocket-half"), *further(NAMES, pruned="gossamer/pocket-half")]


def config(setting: Setting | None, arm: Arm) -> EngineConfig:
    assert setting is not None
    given = {**setting.fields, **setting.limits} | ({"load_format": "dummy"} if arm.shaped else {})
    return base(setting.model or "gossamer/pocket", **given)


def named(arm: Arm) -> str:
    return f"{arm.technique}-{arm.mode}"


@pytest.mark.parametrize("arm", [*MEASURED, *FURTHER], ids=named)
def test_both_sides_can_be_and_differ(arm: Arm) -> None:
    assert arm.off is not None and arm.on is not None
    off, on = config(arm.off, arm), config(arm.on, arm)
    assert (off, arm.off.kv_tokens, arm.off.roomy_tokens) != (on, arm.on.kv_tokens, arm.on.roomy_tokens)
    assert arm.off.name != arm.on.name
    assert (
        typed(off) != typed(on)
        or off.model != on.model
        or arm.off.kv_tokens != arm.on.kv_tokens
        or (arm.off.roomy_tokens != arm.on.roomy_tokens)
    )


def test_every_technique_stands_alone_in_the_handbooks_order() -> None:
    assert [arm.technique for arm in alone(NAMES)] == list(NAMES)
    assert len(set(NAMES)) == 17
    for arm in alone(NAMES):
        assert arm.on is not None or arm.note, f"{arm.technique} says nothing of why it is not measured"


def test_zeros_are_held_against_fewer_bits_and_a_students_guesses_against_none() -> None:
    assert [arm.technique for arm in FURTHER] == ["pruning", "speculative_decoding", "pruning"]
    assert [arm.shaped for arm in FURTHER] == [True, False, False]
    assert not further(("quantization",), student="gossamer/pocket-half")


def test_what_a_technique_changes_is_that_technique_alone() -> None:
    """A field of another technique differs only where one cannot be without the other."""
    together = {
        "quantization": {"mixed_precision"},
        "mixed_precision": {"quantization"},
        "continuous_batching": {"static_batching"},
        "pruning": {"dummy_sparsity", "sparse_weights"},
        "distillation": {"model"},
    }
    for arm in MEASURED:
        off, on = config(arm.off, arm), config(arm.on, arm)
        differing = {f.name for f in fields(off) if getattr(off, f.name) != getattr(on, f.name)}
        own = {arm.technique} | together.get(arm.technique, set())
        assert differing <= own and (differing or arm.technique == "paged_attention"), named(arm)


def test_cumulative_arms_are_a_chain_that_ends_with_everything() -> None:
    chain = cumulative(NAMES)
    assert [arm.technique for arm in chain] == list(ORDER)
    for before, after in pairwise(chain):
        assert before.on == after.off
    first, last = chain[0].off, chain[-1].on
    assert first is not None and last is not None
    for name in ORDER:
        assert first.fields.get(name) is None
        assert last.fields.get(name) is not None or name == "mixed_precision"
    whole = without(NAMES)[0].on
    assert whole is not None and dict(whole.fields) == dict(last.fields) and whole.kv_tokens == last.kv_tokens


def test_cumulative_skips_what_was_not_asked_for() -> None:
    chain = cumulative(("quantization", "operator_fusion"))
    assert [arm.technique for arm in chain] == ["operator_fusion", "quantization"]
    assert chain[-1].on is not None and chain[-1].on.fields["memory_reuse"] is None


def test_unknown_techniques_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quantization'"):
        alone(("quantisation",))


def test_settings_are_typed_in_flags_that_exist() -> None:
    group = typer.main.get_command(app)
    known = {
        flag for p in group.commands["bench"].commands["latency"].params for flag in p.opts + p.secondary_opts
    }  # type: ignore[attr-defined]
    for arm in MEASURED:
        for setting in (arm.off, arm.on):
            for word in shlex.split(typed(config(setting, arm))):
                assert not word.startswith("-") or word in known, word
