"""README.md of a compressed model, from its certificate: what it is, what it lost, how it was made and runs.

The front matter is that of Hugging Face model cards (base_model, license, tags).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from gossamer.errors import CheckpointError
from gossamer.quality.certificate import CERTIFICATE, Certificate
from gossamer.quality.report import Quality, TaskScore, TextScore
from gossamer.quality.sizes import ModelRecord

__all__ = ["model_card", "write_model_card"]

_KEPT = ("license", "license_name", "license_link", "language", "library_name")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def write_model_card(
    directory: Path, certificate: Certificate, *, original: Path | None = None, name: str | None = None
) -> Path:
    """Writes README.md into a model's directory; gives its path.

    original: the directory of the model before, whose card says the licence; name: how to call the model
    (the directory's name if not given). Raises CheckpointError where a README.md is there already.
    """
    path = directory / "README.md"
    if path.exists():
        raise CheckpointError(f"{path} exists already; move it away, its place is the new model's card")
    kept = {} if original is None else _front_matter(original / "README.md")
    path.write_text(model_card(certificate, name or directory.name, kept), encoding="utf-8")
    return path


def model_card(certificate: Certificate, name: str, kept: dict[str, str] | None = None) -> str:
    """The card's text. kept: lines of front matter to keep, by key."""
    c = certificate
    head = dict(kept or {})
    if _HUB_ID.fullmatch(c.original.name):
        head["base_model"] = json.dumps(c.original.name)
        if any(step.step.startswith("quantize") for step in c.steps):
            head["base_model_relation"] = "quantized"
    head["pipeline_tag"] = "text-generation"
    kinds = dict.fromkeys(step.step for step in c.steps)
    head["tags"] = json.dumps(list(dict.fromkeys(["gossamer", "compressed", *" ".join(kinds).split()])))
    head.setdefault("library_name", "transformers")
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "---", "", f"# {name}", ""]
    steps = ", ".join(kinds) or "no step"
    lines += [
        f"`{c.original.name}` compressed with Gossamer by {steps}: "
        f"{c.compressed.bytes / max(c.original.bytes, 1):.1%} of the bytes that it had. What the model is, "
        "what it is for and what it must not be used for, its own card says.",
        "",
        *_sizes(c.original, c.compressed),
        *(_quality(c.quality) if c.quality is not None else _unmeasured()),
        *_making(c),
        *_serving(name),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _sizes(before: ModelRecord, after: ModelRecord) -> list[str]:
    rows = [
        ("weights", f"{before.bytes / 1e6:,.1f} MB", f"{after.bytes / 1e6:,.1f} MB"),
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("bits per weight", f"{before.bits_per_weight:.2f}", f"{after.bits_per_weight:.2f}"),
        ("zeros in the blocks", f"{before.sparsity:.1%}", f"{after.sparsity:.1%}"),
    ]
    return [*_table(["", "before", "after"], rows), ""]


def _quality(q: Quality) -> list[str]:
    lines = ["## What it lost", ""]
    if q.total is not None:
        lines += _texts(q)
    if q.reference is not None:
        d, noise = q.reference.divergence, q.reference.noise
        lines += [
            f"Against `{q.reference.execution.model}` ({_run(q.reference.execution.formats)} weights, "
            f"{q.reference.execution.kv} keys and values) over {d.tokens:,} tokens:",
            "",
            *_table(
                ["perplexity ratio", "KL mean", "KL 95th percentile", "KL 99th percentile", "same top token"],
                [
                    (
                        f"{q.reference.ratio:.4f}{_within(q.reference.ratio_error)}",
                        f"{d.kl_mean:.2e}{_within(d.kl_error, '.0e')}",
                        f"{d.kl_p95:.2e}",
                        f"{d.kl_p99:.2e}",
                        f"{d.top1:.2%}",
                    )
                ],
            ),
            "",
            "KL divergence is in nats per token."
            + (
                ""
                if noise is None
                else " The reference against itself, run another way, has a mean of "
                f"{noise.divergence.kl_mean:.1e}: no more than that is rounding."
            ),
            "",
        ]
    e = q.execution
    lines += [
        f"Measured as it is served: {_run(e.formats)} weights, {e.kv} keys and values, "
        + (f"{e.isa} kernels ({', '.join(k for k in e.kernels if 'linear' in k)})." if e.kernels
           else f"the {e.backend} backend."),
    ]  # fmt: skip
    if q.beside is not None:
        b = q.beside
        lines[-1] += (
            f" The torch reference of the same formats has perplexity {b.perplexity:.3f} where the kernels "
            f"have {b.served:.3f} ({b.divergence.tokens:,} tokens, mean KL {b.divergence.kl_mean:.1e})."
        )
    if q.tasks:
        lines += ["", *_tasks(q.tasks)]
    return [*lines, ""]


def _texts(q: Quality) -> list[str]:
    assert q.total is not None
    lines = [
        f"Windows of {q.context} tokens, {q.stride} apart: each token has at least "
        f"{q.context - q.stride} before it, a text's first ones excepted."
        + (" Every window begins with the begin token." if q.bos else ""),
        "",
    ]

    def row(score: TextScore, name: str) -> tuple[str, ...]:
        loss = f"{score.loss:.4f}{_within(score.error)}"
        return name, f"{score.tokens:,}", loss, f"{score.perplexity:.3f}", f"{score.bits_per_byte:.4f}"

    rows = [row(text, text.name) for text in q.texts] if len(q.texts) > 1 else []
    rows.append(row(q.total, "**all**" if rows else q.texts[0].name))
    if q.reference is not None:
        rows.append(row(q.reference.score, "the original on the same"))
    head = ["text", "tokens", "loss (nats/token)", "perplexity", "bits per byte"]
    return [*lines, *_table(head, rows), ""]


def _tasks(tasks: tuple[TaskScore, ...]) -> list[str]:
    rows = [
        (
            t.name,
            t.kind,
            f"{t.count:,}",
            f"{t.accuracy:.1%} ± {t.error:.1%}",
            "-" if t.normalised is None else f"{t.normalised:.1%}",
            f"{t.chance:.1%}",
        )
        for t in tasks
    ]
    return _table(["task", "kind", "questions", "right", "right, by length", "by chance"], rows)


def _unmeasured() -> list[str]:
    return ["Its quality has not been measured.", ""]


def _making(c: Certificate) -> list[str]:
    lines = [
        "## How it was made", "",
        *_table(["step", "seconds"], [(s.step, f"{s.seconds:.1f}") for s in c.steps]), "",
        f"Recipe `{c.recipe.name}`, seed {c.seed}:", "", "```toml", c.recipe.text.rstrip(), "```", "",
    ]  # fmt: skip
    if c.data is not None:
        files = ", ".join(f"`{file.name}`" for file in c.data.files) or "no files"
        lines += [
            f"Calibration and training drew on {c.data.tokens:,} tokens of {files} (SHA-256 of the tokens: "
            f"{c.data.sha256}).", ""
        ]  # fmt: skip
    torch = "" if c.versions.torch is None else f", torch {c.versions.torch}"
    lines += [
        f"Made {c.created} by gossamer {c.versions.gossamer} (numpy {c.versions.numpy}{torch}) on "
        f"{c.versions.processor}. `{CERTIFICATE}` has all of this for programs.",
        "",
    ]
    return lines


def _serving(name: str) -> list[str]:
    return ["## Running it", "", "```", f"gossamer serve ./{name}",
            f'gossamer generate ./{name} --prompt "Once upon a time"',
            f"gossamer eval ./{name} --certificate", "```"]  # fmt: skip


def _run(formats: dict[str, float]) -> str:
    return " and ".join(formats)


def _within(error: float | None, digits: str = ".4f") -> str:
    return "" if error is None else f" ± {error:{digits}}"


def _table(head: list[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    line = "|".join("---" if i == 0 else "---:" for i in range(len(head)))
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in cells)]


def _front_matter(path: Path) -> dict[str, str]:
    """What of a card's front matter holds for what is made of the model, by key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    pairs = (line.partition(":") for line in (found[1].splitlines() if found else []))
    return {key: value.strip() for key, _, value in pairs if key in _KEPT and value.strip()}
