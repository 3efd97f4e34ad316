"""`gossamer ablate`: what each technique does here, beside what is claimed of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli.options import flag
from gossamer.cli.show import stderr
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.bench.ledger import Ledger, Mode

__all__ = ["ablate"]

_QUICK_SECONDS = 270.0  # of the five minutes, less what starts and probes take
_QUICK, _USUAL, _FULL = 7, 12, 15  # rounds
_ARM_SECONDS = {"135m": 40.0, "1b": 240.0, "own": 40.0}


def ablate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            envvar="GOSSAMER_MODEL",
            show_envvar=False,
            show_default=False,
            help="A directory, a hub id (owner/name), or gossamer/pocket.",
        ),
    ],
    technique: Annotated[
        list[str] | None,
        flag(
            "--technique",
            metavar="NAME",
            help="Only this one (quantization, paged_attention...), alone and left out of all the others. "
            "Repeatable.",
        ),
    ] = None,
    quick: Annotated[
        bool, flag("--quick", help="Each technique alone, within five minutes on a small machine.")
    ] = False,
    full: Annotated[
        bool,
        flag(
            "--full",
            help="Speed on the 1b shape, more rounds, and with --text models that are pruned and distilled "
            "for it, where none is shipped.",
        ),
    ] = False,
    speed_shape: Annotated[
        str | None,
        flag(
            "--speed-shape",
            metavar="SHAPE",
            help="What speed is taken on: 135m or 1b (random weights), or own, the model itself; small "
            "models sit in caches and hide effects. 135m if not given, 1b with --full.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        flag("--text", metavar="FILE", help="Text the model never saw, for quality. Repeatable."),
    ] = None,
    rounds: Annotated[
        int | None,
        flag(
            "--rounds",
            metavar="N",
            help="Most rounds of each pair; slow pairs end earlier.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None,
        flag("--html", "-o", metavar="FILE", help="Write a report with pictures, one HTML file."),
    ] = None,
) -> int | None:
    """Measure what each technique does to memory, speed and quality: alone, added up, and left out.

    Every pair of engines runs the same requests in turns. A verdict is 'gains' or 'loses' where the whole
    95 % interval lies to one side and the effect is 3 % at least, else 'no difference'. Ctrl-C keeps what is
    done.
    """
    from gossamer.bench.ablation.request import MODES, Request
    from gossamer.bench.ablation.run import ablate
    from gossamer.bench.ledger_json import ledger_to_json
    from gossamer.cli.show_ablation import live_watch, show_ledger
    from gossamer.quality.windows import read_texts
    from gossamer.techniques import card

    if quick and full:
        raise ConfigError("--quick and --full are opposites; give one of them")
    if out is not None:
        _check_out(out)
    shape = speed_shape or ("1b" if full else "135m")
    modes: tuple[Mode, ...] = ("alone",) if quick else ("alone", "without") if technique else MODES
    request = Request(
        model=model,
        techniques=tuple(dict.fromkeys(card(name).name for name in technique or ())),
        modes=modes,
        speed_shape=shape,
        texts=tuple(read_texts(text or ())),
        rounds=(_QUICK if quick else _FULL if full else _USUAL) if rounds is None else rounds,
        seconds=_QUICK_SECONDS if quick else None,
        arm_seconds=_ARM_SECONDS.get(shape, 40.0),
        tokens=2048 if quick else 32768 if full else 8192,
        make=full and bool(text),
    )
    with _ended_like_ctrl_c(), live_watch(sys.stderr.isatty(), not json) as watch:
        ledger = ablate(request, watch)
    lost = _keep(ledger, out)
    if json:
        print(ledger_to_json(ledger), flush=True)
    else:
        show_ledger(ledger)
        if out is not None and lost is None:
            stderr().print(f"the report is in {out}", soft_wrap=True, markup=False)
    if lost is not None:
        raise lost
    if ledger.settings["interrupted"]:
        stderr().print("interrupted: the techniques that were measured until then")
        return 130
    return None


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, too, keeps what is done, and leaves neither workers nor files."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_out(out: Path) -> None:
    """Raises ConfigError where no report can be written, before the minutes that it takes."""
    if out.is_dir():
        raise ConfigError(f"--html {out} is a directory; name a file")
    if not out.parent.is_dir():
        raise ConfigError(f"--html {out}: {out.parent} is no directory; make it, or name a file elsewhere")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--html {out}: {out.parent} cannot be written; name a file elsewhere")


def _keep(ledger: Ledger, out: Path | None) -> ConfigError | None:
    """Writes the report, before anything is printed that may fail. What stands against that is given, so that
    the ledger is printed all the same."""
    if out is not None:
        from gossamer.bench.ablation.report import write_report

        try:
            write_report(ledger, out)
        except ConfigError as error:
            return error
    return None
