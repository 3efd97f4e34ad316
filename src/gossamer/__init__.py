"""Gossamer: large language models in little memory, fast, on the machine at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.engine.request import SamplingParams, StructuredOutputs
    from gossamer.llm import LLM

__all__ = ["LLM", "SamplingParams", "StructuredOutputs", "__version__"]
__version__ = "0.1.0"

_LAZY = {
    "LLM": "gossamer.llm",
    "SamplingParams": "gossamer.engine.request",
    "StructuredOutputs": "gossamer.engine.request",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `import gossamer` stays fast."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
