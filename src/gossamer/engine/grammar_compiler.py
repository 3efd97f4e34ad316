"""From what a request wants its output to look like to a grammar over the model's vocabulary."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.engine.request import StructuredOutputs
from gossamer.engine.structured_output import GrammarFactory, LLGrammar
from gossamer.errors import QueueFullError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["WHITE_SPACE", "GrammarCompiler"]

QUICK_SECONDS = 0.03  # of CPU time in which nearly every honest grammar compiles
CPU_SECONDS = 0.3  # that one grammar may take to compile
KEPT = 32  # compiled grammars, and as many refusals
WAITING = 32  # grammars that may wait for their turn
WORKERS = 2  # that try slow grammars at the same time
# Of JSON: a space, or a line's end with its indentation. Without a bound a small model writes it for ever.
WHITE_SPACE = r" |\r?\n[ \t]{0,20}"
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
    """Compiles grammars and keeps the latest. Safe to use from several threads. Each is compiled once, and
    one that is not done quickly begins again among the slow ones (`WORKERS` at a time), so that no honest one
    waits long behind a flood of hostile ones. Refusals are kept apart: they push no good one out.

    Every grammar is tried in a small worker process first (started at the first use and kept), whose children
    can be ended whatever a hostile one does; see `grammar_worker.py`.

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
        self._idle: list[_Worker] = []
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None  # quick, slow
        self._pending: dict[StructuredOutputs, Future[LLMatcher | str]] = {}
        self._good: OrderedDict[StructuredOutputs, Future[LLMatcher | str]] = OrderedDict()
        self._refused: OrderedDict[StructuredOutputs, Future[LLMatcher | str]] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def compile(self, wanted: StructuredOutputs, ends: tuple[int, ...]) -> GrammarFactory:
        """What makes a grammar for each output. ends: tokens that end one.

        Raises RequestError where the grammar is wrong, matches nothing or takes too long to compile,
        QueueFullError where too many wait to be compiled.
        """
        return self.factory(wanted, ends, self.begin(wanted).result())

    def begin(self, wanted: StructuredOutputs) -> Future[LLMatcher | str]:
        """Starts to compile, or finds it done: a matcher, or why there is none, for `factory`. Does not wait.

        Raises QueueFullError.
        """
        with self._lock:
            for kept in (self._good, self._refused):
                if wanted in kept:
                    kept.move_to_end(wanted)
                    return kept[wanted]
            future = self._pending.get(wanted)
            if future is not None:
                return future
            if len(self._pending) >= WORKERS + WAITING:
                raise QueueFullError(f"{WAITING} grammars wait to be compiled already; try again later")
            if self._pools is None:
                self._pools = ThreadPoolExecutor(1, "grammar"), ThreadPoolExecutor(WORKERS, "slow-grammar")
            quick, slow = self._pools
            future = self._pending[wanted] = Future()
        future.add_done_callback(lambda done: self._keep(wanted, done))
        quick.submit(self._run, wanted, future, slow)
        return future

    def _run(
        self, wanted: StructuredOutputs, future: Future[LLMatcher | str], slow: ThreadPoolExecutor | None
    ) -> None:
        """Compiles within the time there is; slow: who goes on with what takes longer than a moment."""
        try:
            found = self._compile(wanted, QUICK_SECONDS if slow is not None else CPU_SECONDS)
            if found is not None:
                future.set_result(found)
            elif slow is not None:
                slow.submit(self._run, wanted, future, None)
            else:
                future.set_result(f"it takes more than {CPU_SECONDS} s to compile; simplify it")
        except BaseException as error:
            future.set_exception(error)

    def factory(
        self, wanted: StructuredOutputs, ends: tuple[int, ...], found: LLMatcher | str
    ) -> GrammarFactory:
        """See `compile`; found: what `begin` brought."""
        if isinstance(found, str):
            raise RequestError(f"structured_outputs: the {wanted.kind} cannot be used: {found}")
        vocab = self._vocab
        return lambda: LLGrammar(found, ends, vocab)

    def _keep(self, wanted: StructuredOutputs, done: Future[LLMatcher | str]) -> None:
        with self._lock:
            self._pending.pop(wanted, None)
            if done.cancelled() or done.exception() is not None:
                return
            kept = self._refused if isinstance(done.result(), str) else self._good
            kept[wanted] = done
            if len(kept) > KEPT:
                kept.popitem(last=False)

    @property
    def pending(self) -> int:
        """How many are being compiled or wait for it."""
        return len(self._pending)

    def close(self) -> None:
        """Ends the worker processes, once what they do is done; a later compilation starts them again."""
        with self._lock:
            pools, self._pools = self._pools, None
        for pool in pools or ():
            pool.shutdown()
        self.__del__()

    def __del__(self) -> None:
        idle = getattr(self, "_idle", [])
        while idle:
            idle.pop().close()

    def _compile(self, wanted: StructuredOutputs, seconds: float) -> LLMatcher | str | None:
        """A matcher, or why there is none; None where so much CPU time is not enough."""
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _source(wanted)
        except ValueError as cause:
            return _first_line(str(cause))
        worker = self._worker()
        try:
            error = worker.attempt(grammar, seconds)
        finally:
            self._put_back(worker)
        if error is None or error:
            return error
        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._own_tokenizer(), grammar, log_level=0, limits=limits)
        return _first_line(matcher.get_error()) or matcher

    def _worker(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Worker(sorted(set(self._special.values())))

    def _put_back(self, worker: _Worker) -> None:
        if worker.ended:
            worker.close()
        else:
            with self._lock:
                self._idle.append(worker)

    def _own_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._reading:
            if self._tokenizer is None:
                tokens = list(self._tokens())
                self._vocab = len(tokens)
                self._tokenizer = LLTokenizer(
                    TokenizerWrapper(_Vocabulary(tokens, sorted(self._special), self._encode))
                )
            return self._tokenizer


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
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what Rust says of a stack overflow
        )
        self._exchange({"special": special, "limits": _LIMITS})

    @property
    def ended(self) -> bool:
        """Whether the process is gone, by its limits or otherwise."""
        return self._process.poll() is not None

    def attempt(self, grammar: str, seconds: float) -> str | None:
        """Why a grammar does not compile; "" where it does, None where its CPU time is over."""
        reply = self._exchange({"grammar": grammar, "seconds": seconds})
        if "error" in reply:
            return _first_line(reply["error"])
        if reply.get("signal") == signal.SIGPROF:
            return None
        return "it nests too deep or needs too much memory; simplify it"

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
        self._process.wait()
        return {}


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
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITE_SPACE})


def _first_line(error: str) -> str:
    """llguidance's message in one line of bounded length."""
    lines = error.strip().splitlines() or [""]
    line = lines[0]
    if line.endswith(":"):  # what is wrong with an expression stands below a picture of it
        line += next((below.removeprefix("error:") for below in lines if below.startswith("error:")), "")
    if line.startswith("NoExtension"):
        return "it matches no text"
    return line if len(line) <= 200 else line[:197] + "..."
