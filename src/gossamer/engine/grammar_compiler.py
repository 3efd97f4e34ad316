"""From what a request wants its output to look like to a grammar over the model's vocabulary."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.engine.request import StructuredOutputs
from gossamer.engine.structured_output import GrammarFactory, LLGrammar
from gossamer.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["GrammarCompiler"]

CPU_SECONDS = 0.3  # that one grammar may take to compile
KEPT = 32  # compiled grammars, and refusals
_WORKER = Path(__file__).with_name("grammar_worker.py")
_LIMITS: dict[str, Any] = {
    # A mask is a few milliseconds at most, its lexer states some 100 MB: see llguidance's LLParserLimits.
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class GrammarCompiler:
    """Compiles grammars and keeps the latest. Safe to use from several threads; one compiles at a time.

    Every grammar is tried in a small worker process first (started at the first use and kept), which can be
    ended whatever a hostile one does; see `grammar_worker.py`.

    tokens: makes the bytes of each token id of the model, at the first use; b"" never appears in an output.
    special: token id -> text of those that no text spells. encode: text -> ids.
    """

    def __init__(
        self,
        tokens: Callable[[], Sequence[bytes]],
        special: Mapping[int, str],
        encode: Callable[[str], list[int]],
    ) -> None:
        self._tokens, self._special, self._encode = tokens, dict(special), encode
        self._tokenizer: LLTokenizer | None = None
        self._vocab = 0
        self._worker: _Worker | None = None
        self._compiled: OrderedDict[StructuredOutputs, LLMatcher | str] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, wanted: StructuredOutputs, ends: tuple[int, ...]) -> GrammarFactory:
        """What makes a grammar for each output. ends: tokens that end one.

        Raises RequestError where the grammar is wrong, matches nothing or takes too long to compile.
        """
        with self._lock:
            found = self._compiled.pop(wanted, None)
            if found is None:
                found = self._compile(wanted)
            self._compiled[wanted] = found
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        if isinstance(found, str):
            raise RequestError(f"structured_outputs: the {wanted.kind} cannot be used: {found}")
        start, vocab = found, self._vocab
        return lambda: LLGrammar(start, ends, vocab)

    def close(self) -> None:
        """Ends the worker process; a later compilation starts it again."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
                self._worker = None

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            worker.close()

    def _compile(self, wanted: StructuredOutputs) -> LLMatcher | str:
        """A matcher, or why there is none."""
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

        try:
            grammar = _source(wanted)
        except ValueError as cause:
            return _first_line(str(cause))
        if self._worker is None:
            self._worker = _Worker(sorted(set(self._special.values())))
        error = self._worker.attempt(grammar)
        if self._worker.ended:
            self._worker.close()
            self._worker = None
        if error:
            return error
        if self._tokenizer is None:
            tokens = list(self._tokens())
            self._vocab = len(tokens)
            self._tokenizer = LLTokenizer(
                TokenizerWrapper(_Vocabulary(tokens, sorted(self._special), self._encode))
            )
        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        return _first_line(matcher.get_error()) or matcher


class _Vocabulary:
    """The model's tokens as llguidance reads them; one more stands for the end."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], encode: Callable[[str], list[int]]) -> None:
        self.tokens = [*tokens, b""]
        self.special_token_ids = special
        self.eos_token_id = len(tokens)
        self._encode = encode
        self._plain = {i for i, data in enumerate(tokens) if data}.difference(special)
        self._ids = {tokens[i]: i for i in sorted(self._plain, reverse=True)}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell exactly the text: the tokenizer's, unless it adds a space or special ones."""
        wanted, ids = text.encode(), self._encode(text)
        if b"".join(self.tokens[i] for i in ids) == wanted and self._plain.issuperset(ids):
            return ids
        ids, at = [], 0
        while at < len(wanted):
            size = min(self._longest, len(wanted) - at)
            while size and wanted[at : at + size] not in self._ids:
                size -= 1
            if not size:
                break  # not to be spelled; llguidance goes on byte by byte, and the mask says so
            ids.append(self._ids[wanted[at : at + size]])
            at += size
        return ids


class _Worker:
    """One `grammar_worker.py` process and its pipes."""

    def __init__(self, special: list[str]) -> None:
        # -P: the folder of the script holds modules that could hide others.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what Rust says of a stack overflow
        )
        self._exchange({"special": special, "limits": _LIMITS})

    @property
    def ended(self) -> bool:
        """Whether the process is gone, by its limits or otherwise."""
        return self._process.poll() is not None

    def attempt(self, grammar: str) -> str:
        """Why a grammar does not compile; "" where it does."""
        return _first_line(self._exchange({"grammar": grammar})["error"])

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            reply = stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            return dict(json.loads(reply))
        if self._process.wait() == -signal.SIGPROF:
            return {"error": f"it takes more than {CPU_SECONDS} s to compile; simplify it"}
        return {"error": "it nests too deep or needs too much memory; simplify it"}


def _source(wanted: StructuredOutputs) -> str:
    """llguidance's own form of what is wanted."""
    from llguidance import LLMatcher

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in wanted.choice))
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(wanted.grammar)
    schema = '{"type": "object"}' if wanted.json is None else str(wanted.json)
    # A space, or a line's end with its indentation: without a bound a small model writes spaces for ever.
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": r" |\r?\n[ \t]{0,20}"})


def _first_line(error: str) -> str:
    """llguidance's message in one line of bounded length."""
    line = (error.strip().splitlines() or [""])[0]
    if line.startswith("NoExtension"):
        return "it matches no text"
    return line if len(line) <= 200 else line[:197] + "..."
