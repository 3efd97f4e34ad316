"""What a plan is for: how long requests are and how many run at once."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ConfigError

__all__ = ["Workload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of prompt_tokens and output_tokens (means), `concurrency` of them at any time."""

    prompt_tokens: int = 256
    output_tokens: int = 128
    concurrency: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens", "concurrency"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name.replace('_', ' ')} {value} must be at least 1")

    @property
    def longest(self) -> int:
        """Tokens of a request, prompt and output together."""
        return self.prompt_tokens + self.output_tokens
