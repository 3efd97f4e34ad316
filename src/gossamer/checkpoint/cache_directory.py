"""Where what was made from models is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """$GOSSAMER_CACHE, else gossamer/ in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("GOSSAMER_CACHE") or Path(base) / "gossamer")
