"""Tries grammars in a process of its own; `grammar_compiler.py` starts it as a script.

A grammar comes with a request, so it may be hostile, and llguidance's own limits do not reach everything: an
intersection of a few patterns runs for minutes, a chain of twenty thousand rules overflows the stack. A timer
over CPU time, limits on address space and a small stack end this process instead of the engine's.

Protocol: one JSON object per line. First {"special": [texts of special tokens], "limits": {...}} -> {}; then
{"grammar": text} -> {"error": message, "" where it compiles and something matches}.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

import llguidance

MEMORY_BYTES = 1 << 30
STACK_BYTES = 1 << 20  # less than any thread has that compiles the same again


class _Bytes:
    """A vocabulary of the 256 bytes and the special tokens."""

    bos_token_id = None

    def __init__(self, special: list[str]) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in special] + [b""]
        self.special_token_ids = list(range(256, 256 + len(special)))
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _try(tokenizer: llguidance.LLTokenizer, grammar: str, limits: llguidance.LLParserLimits) -> str:
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def main(cpu_seconds: float) -> None:
    """Serves requests until standard input closes, each within so much CPU time."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_STACK, STACK_BYTES)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ctrl-C goes to the whole terminal group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = json.loads(sys.stdin.buffer.readline())
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(first["special"])))
    limits = llguidance.LLParserLimits(**first["limits"])
    sys.stdout.buffer.write(b"{}\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        # Unhandled, the signal ends the process; CPU time, so that a busy machine ends no honest grammar.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        error = _try(tokenizer, json.loads(line)["grammar"], limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps({"error": error}).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
