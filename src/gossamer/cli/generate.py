"""`gossamer generate`: continue one prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gossamer.cli.engine_flags import EngineFlags
from gossamer.cli.models import model_context
from gossamer.cli.options import flag
from gossamer.cli.sampling_flags import SamplingFlags
from gossamer.cli.show import emit_json, show_start, stderr
from gossamer.errors import ConfigError, ContextLengthError, RequestError

if TYPE_CHECKING:
    from gossamer.engine.request import SamplingParams
    from gossamer.text_engine import TextEngine

__all__ = ["generate"]


def generate(
    engine: EngineFlags,
    sampling: SamplingFlags,
    prompt: Annotated[
        str | None,
        flag("--prompt", "-p", metavar="TEXT", help="The text to continue; - reads standard input."),
    ] = None,
    prompt_file: Annotated[
        Path | None, flag("--prompt-file", metavar="FILE", help="Take the prompt from a file.")
    ] = None,
    max_tokens: Annotated[int, flag("--max-tokens", "-n", help="Most tokens to produce.")] = 128,
    n: Annotated[int, flag("--n", help="How many continuations.")] = 1,
    logprobs: Annotated[
        int | None, flag("--logprobs", help="Log-probabilities of the k likeliest tokens (in --json).")
    ] = None,
    receipt: Annotated[
        bool, flag("--receipt", help="Show which kernels ran, how often and how long.")
    ] = False,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> int:
    """Continue a prompt, written live."""
    from rich.markup import escape

    from gossamer.cli.receipt import receipt_rows, receipt_table
    from gossamer.cli.stream import run_request

    if not (engine.model or engine.model_flag or prompt is not None or prompt_file):
        raise ConfigError("no model and no prompt were given; say `gossamer generate MODEL --prompt TEXT`")
    text = _prompt(prompt, prompt_file)
    given = sampling.given() | {"max_tokens": max_tokens, "n": n, "logprobs": logprobs}
    running, ids, params = _start(engine, text, given)
    show_start(running.started)
    report = run_request(running, ids, params, live=not json)
    lines = running.started.receipt() if receipt else []
    if json:
        emit_json(report | ({"receipt": receipt_rows(lines)} if receipt else {}))
    else:
        timing, console, context = report["timing"], stderr(), running.started.max_model_len
        ended = f"ended by {report['finish_reason']}"
        if report["finish_reason"] == "length" and len(report["token_ids"]) < max_tokens:
            ended = f"the context of {context:,} tokens is full"
        rate = f", then {timing['decode_tokens_per_s']:.1f} tok/s" if timing["decode_tokens_per_s"] else ""
        guesses = report["speculation"]
        if running.started.config.speculative_decoding is not None:
            ended += f"; {guesses['accepted']} of {guesses['drafted']} drafted tokens stood"
        console.print(
            f"[dim]{len(ids)} prompt tokens; first token after {timing['ttft_ms'] or 0:.0f} ms{rate}; "
            f"{ended}[/]",
            soft_wrap=True,
        )
        if receipt:
            console.print(receipt_table(lines) if lines else "this backend keeps no receipt")
    failed = next((each for each in report["outputs"] if each["finish_reason"] == "error"), None)
    if failed is not None:
        why = _FAILURES.get(failed["stop_reason"], failed["stop_reason"])
        stderr().print("[bold red]error:[/]", escape(str(why)), soft_wrap=True)
        return 2
    return 0


_FAILURES = {
    "nan": "the model computed NaN or infinity, so there is no next token: its weights are damaged, or the "
    "storage format cannot hold its values (try --dtype float32)",
    "empty": "no token was allowed: logit_bias, end tokens and grammar exclude all of them",
}


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ConfigError("both --prompt and --prompt-file were given; give one")
    try:
        if prompt_file is not None:
            return prompt_file.read_text(encoding="utf-8")
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        if prompt is not None:
            prompt.encode("utf-8")  # the shell may pass bytes that are no text
    except OSError as error:
        raise ConfigError(f"cannot read the prompt from {prompt_file}: {error.strerror}") from None
    except UnicodeError:
        raise ConfigError("the prompt is not UTF-8 text") from None
    if prompt is None:
        raise ConfigError("no prompt was given; pass --prompt TEXT, --prompt-file FILE, or --prompt -")
    return prompt


def _start(
    flags: EngineFlags, prompt: str, sampling: dict[str, Any]
) -> tuple[TextEngine, tuple[int, ...], SamplingParams]:
    """An engine with KV memory for this one request, the prompt's ids and the sampling parameters.

    The prompt is tokenized before anything is loaded, so that the memory can be cut to it.
    """
    from gossamer.checkpoint.hub import resolve_model
    from gossamer.checkpoint.tokenizer import Tokenizer
    from gossamer.engine.request import SamplingParams
    from gossamer.progress import loading_bar
    from gossamer.text_engine import TextEngine

    SamplingParams(**sampling)  # what cannot be is refused before anything is loaded
    if not prompt:
        raise RequestError("the prompt is empty; give at least one character")
    config = flags.config()
    context = model_context(flags)
    length = len(Tokenizer.load(resolve_model(config.model, config.revision)).encode(prompt))
    limit = config.max_model_len or context
    if length >= limit:
        raise ContextLengthError(
            f"the prompt has {length} tokens and the context holds {limit}, at least one for the output; "
            "shorten the prompt" + (" or raise --max-model-len" if limit < context else "")
        )
    sequences = flags.max_num_seqs or sampling["n"]
    config = flags.config(
        max_model_len=min(context, length + sampling["max_tokens"]),
        max_num_seqs=sequences,
        max_num_batched_tokens=max(min(512, length), sequences),
    )
    with loading_bar(sys.stderr.isatty()) as bar:
        engine = TextEngine.start(config, progress=bar)
    params = engine.default_params(**sampling)
    engine.compile(params)  # kept for the request: a grammar that is wrong is said first
    return engine, engine.encode(prompt), params
