"""Tries grammars in a process of its own; `grammar_compiler.py` starts it as a script.

A grammar comes with a request, so it may be hostile, and llguidance's own limits do not reach everything: an
intersection of a few patterns runs for minutes, a chain of twenty thousand rules overflows the stack. Each is
tried in a child of this process, which a timer over CPU time, limits on address space and a small stack end
instead of the engine's; a child costs a millisecond, a new worker a hundred.

Protocol: one JSON object per line. First {"special": [texts of special tokens], "limits": {...}} -> {}; then
{"grammar": text, "seconds": CPU time} -> {"error": message, "" where it compiles and something matches}, or
{"signal": number} where the child was ended by one (SIGPROF: its time is over).
"""

from __future__ import annotations

import json
import os
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


def _attempt(tokenizer: llguidance.LLTokenizer, limits: llguidance.LLParserLimits, line: bytes) -> bytes:
    """The reply to a request, made by a child."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        request = json.loads(line)
        # Unhandled, the signal ends the child; CPU time, so that a busy machine ends no honest grammar.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = json.dumps({"error": _try(tokenizer, request["grammar"], limits)}).encode()
        with open(write, "wb") as pipe:
            pipe.write(reply)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        reply = pipe.read()
    status = os.waitpid(child, 0)[1]
    return reply if status == 0 else json.dumps({"signal": os.WTERMSIG(status)}).encode()


def main() -> None:
    """Serves requests until standard input closes."""
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
        sys.stdout.buffer.write(_attempt(tokenizer, limits, line) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
