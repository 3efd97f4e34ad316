"""An engine that speaks text: tokenizer in front, incremental detokenizer and stop strings behind.

`LLM`, the server and the command line all stand on this one place where tokens and text meet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from gossamer.checkpoint.chat_template import ChatTemplate
from gossamer.checkpoint.detokenize import IncrementalDetokenizer, StopChecker
from gossamer.checkpoint.generation_config import GenerationDefaults, read_generation_config
from gossamer.checkpoint.tokenizer import Tokenizer
from gossamer.config import EngineConfig
from gossamer.engine.batching.dynamic import budget_of
from gossamer.engine.engine import Engine, Update
from gossamer.engine.grammar_compiler import GrammarCompiler
from gossamer.engine.request import FinishReason, Request, SamplingParams, TokenLogprob, token_ids
from gossamer.engine.structured_output import GrammarFactory
from gossamer.errors import RequestError, TokenizerError
from gossamer.memory import give_back
from gossamer.runtime.start import Started, start

__all__ = ["TextEngine", "TextUpdate"]


@dataclass(slots=True)
class TextUpdate:
    """What a step brought one output: new text (may lag behind its tokens), tokens and, at the end, why
    it ended. prompt_logprobs: with output 0's first tokens, where asked for; one per token of the prompt,
    None for the first. times, cached: see gossamer.engine.engine.Update."""

    request_id: str
    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    times: Mapping[str, float]
    cached: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None


class _Output:
    """Text state of one output."""

    __slots__ = ("detokenizer", "stop")

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self.detokenizer = (
            None
            if tokenizer is None
            else IncrementalDetokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        )
        self.stop = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None

    def push(self, tokens: Sequence[int]) -> tuple[str, int, str | None]:
        """(text to show, how many of the tokens count, the stop string reached or None)."""
        if self.detokenizer is None:
            return "", len(tokens), None
        shown = ""
        for count, token in enumerate(tokens, 1):
            text = self.detokenizer.push(token)
            if self.stop is not None:
                text, stopped = self.stop.push(text)
                if stopped:
                    return shown + text, count, self.stop.matched
            shown += text
        return shown, len(tokens), None

    def finish(self) -> tuple[str, str | None]:
        """What was held back, and the stop string that it completes, if any."""
        if self.detokenizer is None:
            return "", None
        text = self.detokenizer.finish()
        if self.stop is None:
            return text, None
        text, stopped = self.stop.push(text)
        return (text, self.stop.matched) if stopped else (text + self.stop.finish(), None)


class TextEngine:
    """A started engine with its tokenizer. Single-threaded, like the engine below it.

    tokenizer is None for a model that has none (shapes with dummy weights): prompts are then token ids.
    """

    def __init__(self, started: Started, *, chat_template: str | None = None) -> None:
        self.started = started
        config = started.config
        batching = config.continuous_batching or config.static_batching
        assert batching is not None  # EngineConfig sees to it
        self.engine = Engine(
            started.executor,
            batching=batching,
            max_num_seqs=config.max_num_seqs,
            prefix_cache=config.prefix_cache,
            speculation=config.speculative_decoding,
            budget=budget_of(config.dynamic_batching),
        )
        self.defaults: GenerationDefaults = read_generation_config(started.directory)
        self.tokenizer = _tokenizer(started)
        give_back()  # reading a tokenizer takes twice what it keeps
        special = self.tokenizer.special_tokens if self.tokenizer is not None else {}
        self.chat_template = ChatTemplate.load(started.directory, special, chat_template)
        eos = self.tokenizer.eos_ids if self.tokenizer is not None else self.defaults.eos_token_ids
        self.eos_ids = tuple(i for i in eos if i < started.graph.vocab)
        self._grammars = None if self.tokenizer is None else _grammars(self.tokenizer, started.graph.vocab)
        self._outputs: dict[tuple[str, int], _Output] = {}
        self._counter = itertools.count()

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> TextEngine:
        """Loads the model of a configuration. Raises GossamerError for what a user can mend."""
        return cls(start(config, progress), chat_template=chat_template)

    def new_id(self) -> str:
        """An id that no request of this engine had."""
        return f"request-{next(self._counter)}"

    def default_params(self, **given: Any) -> SamplingParams:
        """Sampling parameters: what is given (and not None), else what the model's
        generation_config.json advises, else SamplingParams' own defaults. Raises RequestError."""
        advised = {
            name: value
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self.defaults, name)) is not None
        }
        if self.defaults.max_new_tokens is not None:
            advised["max_tokens"] = self.defaults.max_new_tokens
        return SamplingParams(**(advised | {k: v for k, v in given.items() if v is not None}))

    def encode(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt (ids pass through). Raises RequestError for an empty prompt,
        TokenizerError for text without a tokenizer."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; give at least one character or one token id")
            ids = tuple(self._need_tokenizer().encode(prompt, add_special_tokens))
        else:
            ids = token_ids("prompt", prompt)
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one character or one token id")
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> tuple[int, ...]:
        """Token ids of a conversation through the model's chat template. Raises TokenizerError where the
        model has none, RequestError for messages it refuses."""
        return self.encode(self.chat_template.render(messages, **options), add_special_tokens=False)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.started.directory} has no tokenizer; give the prompt as token ids, "
                "or add tokenizer.json"
            )
        return self.tokenizer

    def compile(self, params: SamplingParams) -> GrammarFactory | None:
        """The grammar of structured_outputs, for `submit`; None where none is asked for. May take some time,
        and any thread may call it. Raises RequestError where the grammar is wrong or too much,
        QueueFullError where too many wait to be compiled, TokenizerError without a tokenizer."""
        finish = self.begin_compiling(params)
        return None if finish is None else finish[1](finish[0].result())

    @property
    def compiling(self) -> int:
        """Grammars that are being compiled or wait for it."""
        return 0 if self._grammars is None else self._grammars.pending

    def begin_compiling(
        self, params: SamplingParams
    ) -> tuple[Future[Any], Callable[[Any], GrammarFactory]] | None:
        """`compile` for those who may not wait: (a future, what makes the grammar of its result)."""
        wanted = params.structured_outputs
        if wanted is None:
            return None
        special = self._need_tokenizer().special_ids
        grammars = self._grammars
        assert grammars is not None
        # A stop token that text spells is the grammar's to allow; one that does not can only be the end.
        ends = [token for token in params.stop_token_ids if token in special]
        ends += [] if params.ignore_eos else self.eos_ids
        vocab = self.started.graph.vocab
        known = tuple(t for t in dict.fromkeys(ends) if 0 <= t < vocab)
        return grammars.begin(wanted), lambda found: grammars.factory(wanted, known, found)

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        grammar: GrammarFactory | None = None,
    ) -> None:
        """Queues a request. grammar: what `compile` made of the parameters; compiled here if not given.
        Raises what Engine.submit and `compile` raise, and TokenizerError for stop strings without a
        tokenizer."""
        if params.stop:
            self._need_tokenizer()
        if grammar is None:
            grammar = self.compile(params)
        ids = tuple(prompt_ids)
        self.engine.submit(
            Request(
                id=request_id,
                prompt_ids=ids,
                params=params,
                eos_ids=self.eos_ids,
                priority=priority,
                tenant=tenant,
                cache_salt=cache_salt,
                grammar=grammar,
            )
        )
        for index in range(params.n):
            self._outputs[request_id, index] = _Output(self.tokenizer, ids, params)

    def step(self) -> list[TextUpdate]:
        """Runs one step of the engine."""
        return [text for update in self.engine.step() if (text := self._text(update)) is not None]

    def abort(self, request_id: str) -> list[TextUpdate]:
        """Ends a request in any phase."""
        return [t for update in self.engine.abort(request_id) if (t := self._text(update)) is not None]

    def has_work(self) -> bool:
        """Whether a step would bring something."""
        return self.engine.has_work()

    def close(self) -> None:
        """Ends the processes that render templates and try grammars; they start again when needed."""
        self.chat_template.close()
        if self._grammars is not None:
            self._grammars.close()

    def run(self) -> Iterator[TextUpdate]:
        """Steps until no work is left."""
        while self.has_work():
            yield from self.step()

    def _text(self, update: Update) -> TextUpdate | None:
        key = (update.request_id, update.index)
        output = self._outputs.get(key)
        if output is None:
            return None
        text, count, stop = output.push(update.tokens)
        reason, why = update.finish_reason, update.stop_reason
        if stop is not None:
            self.engine.finish(*key, stop_reason=stop)
            reason, why = "stop", stop
        elif reason is not None:
            held, stop = output.finish()
            text += held
            if stop is not None:
                reason, why = "stop", stop
        if reason is not None:
            del self._outputs[key]
        logprobs = update.logprobs if update.logprobs is None else update.logprobs[:count]
        scores = update.prompt_logprobs
        return TextUpdate(
            *key,
            text,
            update.tokens[:count],
            logprobs,
            reason,
            why,
            update.times,
            update.cached,
            None if scores is None else [None, *scores],
        )


def _grammars(tokenizer: Tokenizer, vocab: int) -> GrammarCompiler:
    """Grammars over a model's vocabulary, where end tokens and those beyond the tokenizer's spell nothing."""
    ends = set(tokenizer.eos_ids)
    known = range(min(vocab, tokenizer.vocab_size))

    def tokens() -> list[bytes]:
        spelled = [b"" if token in ends else tokenizer.token_bytes(token) for token in known]
        return spelled + [b""] * (vocab - len(spelled))

    special = {token: tokenizer.token_text(token) for token in tokenizer.special_ids - ends if token in known}
    before = tokenizer.encode("\n", add_special_tokens=False)

    def encode(text: str) -> list[int]:
        # After a line's end, because SentencePiece puts a space before what begins a text.
        return tokenizer.encode("\n" + text, add_special_tokens=False)[len(before) :]

    return GrammarCompiler(tokens, special, encode)


def _tokenizer(started: Started) -> Tokenizer | None:
    """The model's tokenizer; None for dummy weights without one, which are run on token ids."""
    try:
        return Tokenizer.load(started.directory)
    except TokenizerError:
        if started.config.load_format == "dummy":
            return None
        raise
