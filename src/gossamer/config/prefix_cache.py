"""Prefix cache: keys and values of prompts seen before are used again."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PrefixCache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCache:
    """Part of PagedAttention: pages outlive their requests until their memory is wanted. Off (None): every
    prompt is computed from its first token."""
