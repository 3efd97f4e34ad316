"""`gossamer export`: a model in the format of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.options import flag
from gossamer.cli.show import emit_json, stderr
from gossamer.cli.sizes import format_size
from gossamer.errors import ConfigError, NotBuiltError
from gossamer.progress import byte_bar

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file or a hub id.")],
    out: Annotated[Path, flag("--out", "-o", metavar="PATH", help="The file or directory to write.")],
    format: Annotated[str, flag("--format", help="gguf, or directories: gptq, compressed-tensors.")] = "gguf",
    type: Annotated[
        str | None,
        flag(
            "--type",
            help="How numbers are stored; of gguf: bf16, q8_0 (the default) or q4_0; of gptq: stored, the "
            "model's own integers; of compressed-tensors: bitmask, without the zeros of pruned matrices.",
        ),
    ] = None,
    revision: Annotated[str | None, flag("--revision", help="Branch, tag or commit on the hub.")] = None,
    force: Annotated[bool, flag("--force", help="Replace what is there.")] = False,
    json: Annotated[bool, flag("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model in the format of other engines."""
    from gossamer.checkpoint.hub import resolve_model
    from gossamer.export.formats import FORMATS, PLANNED

    if format in PLANNED:
        raise NotBuiltError(f"export as {format} is not built yet; there is {', '.join(FORMATS)}")
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown; there is {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    if type is not None and type not in chosen.types:
        raise ConfigError(f"{format} of the type {type!r} is not written; choose {', '.join(chosen.types)}")
    directory = resolve_model(model, revision)
    with byte_bar(not json, "writing") as progress:
        made = chosen.write(
            out,
            directory,
            type=type or chosen.default,
            name=Path(model).name,
            force=force,
            progress=progress,
        )
    if json:
        emit_json(
            {
                "path": str(made.path),
                "format": format,
                "type": type or chosen.default,
                "bytes": made.bytes,
                "tensors": made.tensors,
                "matrices_kept": made.kept,
                "notes": made.notes,
            }
        )
        return
    for note in made.notes:
        stderr().print(f"note: {note}", soft_wrap=True, markup=False)
    kinds = ", ".join(f"{count} {kind}" for kind, count in made.tensors.items())
    own = "without their zeros" if format == "compressed-tensors" else "with the model's own integers"
    kept = f"; {made.kept} matrices {own}" if made.kept else ""
    print(f"{made.path}: {format_size(made.bytes)}, tensors: {kinds}{kept}")
