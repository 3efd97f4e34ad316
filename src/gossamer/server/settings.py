"""How the server listens and what it bounds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from gossamer.errors import ConfigError

__all__ = ["ServerSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Raises ConfigError for a value out of range."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    served_model_name: str | None = None
    """The name clients use; None: the model as it was given at start."""
    api_key: str | None = field(default=None, repr=False)
    """When set, every route but /health wants `Authorization: Bearer KEY`."""
    chat_template: str | None = None
    """A file or the template itself; None: the model's own."""
    max_num_queued_reqs: int = 256
    """Most outputs that may wait to run (a request with n outputs takes n places); 429 past it."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests have after SIGTERM."""
    metrics_prefix: str = "gossamer"
    """What metric names begin with, before a colon; "vllm" suits dashboards made for vLLM."""
    max_body_bytes: int = 4 << 20
    """Largest request body; 413 past it."""
    ping_seconds: float = 15.0
    """Silence in a stream after which a comment is sent, so that proxies keep the connection."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not in 0..65535")
        for name in ("max_num_queued_reqs", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if not (self.shutdown_timeout >= 0 and math.isfinite(self.shutdown_timeout)):
            raise ConfigError(f"shutdown_timeout {self.shutdown_timeout} must be 0 or more seconds")
        if not (self.ping_seconds > 0 and math.isfinite(self.ping_seconds)):
            raise ConfigError(f"ping_seconds {self.ping_seconds} must be more than 0")
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix):
            raise ConfigError(
                f"metrics_prefix {self.metrics_prefix!r} must be letters, digits and _, not a digit first"
            )
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise ConfigError("api_key must be ASCII text and not empty; leave it out for no key")
        if self.served_model_name == "":
            raise ConfigError("served_model_name is empty; leave it out for the model's own name")
