"""Operator fusion: neighbouring ops become one, so that fewer intermediates go through memory."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ConfigError

RULES = (
    "qkv_merge",
    "gate_up_merge",
    "activation_epilogue",
    "residual_epilogue",
    "norm_residual",
    "norm_quantize",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFusion:
    """without: rules to leave out, for measuring one by one (passes/operator_fusion.py says what each
    does). Off (None): every op runs by itself."""

    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for rule in self.without:
            if rule not in RULES:
                raise ConfigError(f"fusion rule {rule!r} is unknown; there are {', '.join(RULES)}")
