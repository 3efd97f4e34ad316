"""Models that ahead-of-serving techniques make of the one at hand, hastily: what is measured with them is the
technique's effect on memory and speed, and the quality that little training leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gossamer.checkpoint.hub import read_config, resolve_model
from gossamer.errors import ConfigError, DependencyError
from gossamer.graph.families import build_graph
from gossamer.quality.windows import Text

__all__ = ["make_pruned", "make_student", "split_texts"]

Progress = Callable[[str, int, int], None]
_MOST_SECONDS = 1800
_TRAINED = 0.7  # of every text; the rest is for quality
_PRUNED = """
name = "two of four weights zero"
[data]
samples = 32
context = 256
[[step]]
prune = "sparsegpt"
pattern = "2:4"
"""
_STUDENT = """
name = "fewer heads and channels, then distilled"
[data]
samples = 32
context = 256
[[step]]
prune = "structured"
heads = 0.25
ffn = 0.35
[[step]]
train = "distil"
steps = 300
"""


def split_texts(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """What trains and what quality is measured on, of every text its own part."""
    parts: tuple[list[Text], list[Text]] = ([], [])
    for text in texts:
        at = max(text.text.rfind("\n", 0, int(len(text.text) * _TRAINED)), 0) or int(
            len(text.text) * _TRAINED
        )
        for part, piece in zip(parts, (text.text[:at], text.text[at:]), strict=True):
            part.append(Text(text.name, piece))
    return parts


def make_pruned(model: str, texts: Sequence[Text], folder: Path, progress: Progress) -> Path:
    """A directory with the model, two of four neighbouring weights of its blocks zero (SparseGPT, Frantar and
    Alistarh, 2023), nothing trained. Raises GossamerError."""
    return _make("pruned", _PRUNED, model, texts, folder, progress)


def make_student(model: str, texts: Sequence[Text], folder: Path, progress: Progress) -> Path:
    """A directory with a smaller model, distilled from this one in 300 steps. Raises GossamerError."""
    return _make("student", _STUDENT, model, texts, folder, progress)


def _make(
    name: str, recipe: str, model: str, texts: Sequence[Text], folder: Path, progress: Progress
) -> Path:
    try:
        from gossamer.compress.recipe import parse_recipe
        from gossamer.compress.run import Compression, Watch, compress, estimates
    except ImportError as error:
        raise DependencyError(
            f"a {name} model is made with torch; install it with: pip install 'gossamer[torch]'"
        ) from error
    steps = parse_recipe(recipe)
    graph = build_graph(read_config(resolve_model(model)), name=model)
    seconds = sum(estimate.seconds for _, estimate in estimates(graph, steps))
    if seconds > _MOST_SECONDS:
        raise ConfigError(
            f"a {name} model would take about {seconds / 60:.0f} minutes, and {_MOST_SECONDS // 60} are "
            "given; make one with `gossamer compress`, and hold the two against each other with "
            "`gossamer bench`"
        )
    files = []
    for index, text in enumerate(texts):
        files.append(folder / f"{index}.txt")
        files[-1].write_text(text.text, encoding="utf-8")
    given = Compression(
        model=model,
        recipe=steps,
        out=folder / name,
        text=tuple(files),
        measure=False,
    )
    return compress(given, Watch(progress=progress))
