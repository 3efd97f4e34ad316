"""The command line of `python -m benchmarks.peers`."""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.contract import PEERS, get_peer
from benchmarks.peers.runner import Contender, Settings, Shape, prepare_all, run_rounds
from benchmarks.peers.table import markdown, picture, summarize
from benchmarks.peers.workloads import WORKLOADS
from gossamer.errors import ConfigError, GossamerError

__all__ = ["choose_contenders", "main"]

_SHARED = Path(__file__).parents[3] / "shared"
_TOKENIZER = _SHARED / "tokenizers" / "smollm2"
_WORK = Path.home() / ".cache" / "gossamer" / "peers"


def choose_contenders(text: str) -> list[Contender]:
    """From "llama_cpp:Q4_0,gossamer": a peer with all its formats, or with those that match a pattern.

    Raises ConfigError for a peer or a format that is not there.
    """
    found = []
    for item in text.split(","):
        module, _, pattern = item.strip().partition(":")
        if module not in PEERS:
            raise ConfigError(f"peer {module!r} is unknown; choose {', '.join(PEERS)}")
        peer = get_peer(module)
        formats = [f for f in peer.formats if fnmatch.fnmatchcase(f.name, pattern or "*")]
        if not formats:
            names = ", ".join(f.name for f in peer.formats)
            raise ConfigError(f"{module} has no format {pattern!r}; choose {names}")
        found += [Contender(module, peer, format) for format in formats]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Gossamer beside its peers."
    )
    add = parser.add_argument
    add("--peers", default=",".join(PEERS), help="peer or peer:format, with commas (default: all)")
    add("--shapes", default="smollm2-135m,llama-3.2-1b", help="names under --shape-dir, with commas")
    add("--workloads", default=",".join(WORKLOADS), help="with commas (default: all)")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add(
        "--work",
        type=Path,
        default=_WORK,
        help="environments, models",
    )
    add("--shape-dir", type=Path, default=_SHARED / "models" / "shapes", help="folders with a config.json")
    add("--tokenizer", type=Path, default=_TOKENIZER, help="for exporters that insist")
    add("--time-limit", type=float, help="seconds after which nothing new is started")
    add("--run-limit", type=float, default=600.0, help="seconds for one process (default 600)")
    add("--prefix", default="", help="a command in front of every measurement, such as 'flock FILE'")
    add("--json", type=Path, metavar="FILE", help="write every measurement and the summary")
    add("--markdown", type=Path, metavar="FILE", help="write the table (it is always printed)")
    add("--picture", type=Path, metavar="FILE", help="write a PNG")
    add(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing: tables of --json files",
    )
    add("--prepare-only", action="store_true", help="install and make the models, measure nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Gives the exit code: 0 done (whatever peers failed), 2 a mistake in the arguments."""
    args = _parser().parse_args(argv)
    try:
        report = _merge(args.sources) if args.sources else _measure(args)
    except GossamerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = summarize(report["measurements"])
    if args.json is not None:
        args.json.write_text(json.dumps(report | {"summary": summary}, indent=1))
    text = _limits(report["probes"]) + markdown(summary, report["contenders"])
    if args.markdown is not None:
        args.markdown.write_text(text)
    if args.picture is not None and any("error" not in line for line in summary):
        picture(summary, report["contenders"], args.picture)
    print(text)
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    for name, least in (("rounds", 1), ("threads", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"{name} {getattr(args, name)} must be at least {least}")
    works = []
    for name in args.workloads.split(","):
        if name not in WORKLOADS:
            raise ConfigError(f"workload {name!r} is unknown; choose {', '.join(WORKLOADS)}")
        works.append(WORKLOADS[name])
    contenders = choose_contenders(args.peers)
    shapes = [_shape(args, name) for name in args.shapes.split(",")]
    settings = Settings(
        work=args.work.resolve(),
        threads=args.threads,
        rounds=args.rounds,
        prefix=tuple(shlex.split(args.prefix)),
        run_limit=args.run_limit,
        time_limit=args.time_limit,
    )
    prepare_all(contenders, shapes, settings, _say)
    lines: list[dict[str, Any]] = []
    probes: list[dict[str, Any]] = []
    if not args.prepare_only:
        probes.append(_probe(settings))
        for line in run_rounds(contenders, shapes, works, settings, _say):
            lines.append(line)
            if args.json is not None:  # what was measured outlives an interruption
                args.json.write_text(json.dumps(_report(contenders, probes, lines), indent=1))
        probes.append(_probe(settings))
    return _report(contenders, probes, lines)


def _report(contenders: Sequence[Contender], probes: list[Any], lines: list[Any]) -> dict[str, Any]:
    about = {
        c.name: {
            "bits": c.format.bits,
            "head": c.format.head,
            "default": c.format.default,
            "versions": c.versions,
            "note": c.peer.note,
        }
        for c in contenders
    }
    return {"contenders": about, "probes": probes, "measurements": lines}


def _shape(args: argparse.Namespace, name: str) -> Shape:
    from benchmarks.peers.checkpoint import write_checkpoint

    config = args.shape_dir / name / "config.json"
    if not config.is_file():
        there = sorted(p.parent.name for p in args.shape_dir.glob("*/config.json"))
        raise ConfigError(
            f"shape {name!r} has no {config}; "
            + (f"choose {', '.join(there)}" if there else "give --shape-dir a folder of such folders")
        )
    shape = Shape(name, config, args.work.resolve() / "models" / name / "checkpoint")
    _say(f"checkpoint of {name}")
    write_checkpoint(config, shape.checkpoint, args.tokenizer if args.tokenizer.is_dir() else None)
    return shape


def _probe(settings: Settings) -> dict[str, Any]:
    """This machine's limits, measured in a process of its own under the same prefix."""
    command = [sys.executable, "-m", "gossamer", "probe", "--json", "--threads", str(settings.threads)]
    done = subprocess.run([*settings.prefix, *command], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"the probe failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _limits(probes: Sequence[dict[str, Any]]) -> str:
    if not probes:
        return ""
    read, int8, bf16 = (median(p[k] for p in probes) for k in ("read_gb_s", "int8_gmacs", "bf16_gmacs"))
    return (
        f"{probes[0]['hardware']['cpu']}, {probes[0]['threads']} threads; probed around the runs: read "
        f"{read:.1f} GB/s, int8 {int8:.0f} GMAC/s, bf16 {bf16:.0f} GMAC/s. Tokens per second, medians.\n\n"
    )


def _merge(files: Sequence[Path]) -> dict[str, Any]:
    """Several reports as one, as if their rounds had followed each other."""
    merged: dict[str, Any] = {"contenders": {}, "probes": [], "measurements": []}
    for file in files:
        try:
            report = json.loads(file.read_text())
            merged["contenders"] |= report["contenders"]
            merged["probes"] += report["probes"]
            merged["measurements"] += report["measurements"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is not a report of --json: {error}") from None
    return merged


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
