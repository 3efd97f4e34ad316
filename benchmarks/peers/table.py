"""From measurements to medians, Markdown and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.workloads import WORKLOADS

__all__ = ["markdown", "picture", "summarize"]

Line = Mapping[str, Any]
_SHARE = 0.85  # of its processors' time; below, a figure is marked


def summarize(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """One line for each shape, contender and workload, in the order they came: medians over the rounds with
    the least and the most, or the error where no round gave a figure."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["shape"], line["contender"], line["workload"]), []).append(line)
    found = []
    for (shape, contender, workload), group in groups.items():
        done = [line for line in group if "error" not in line]
        entry: dict[str, Any] = {"shape": shape, "contender": contender, "workload": workload}
        if not done:
            found.append(entry | {"error": group[-1]["error"]})
            continue
        name = f"{WORKLOADS[workload].figure}_tokens_per_s"
        rates = [line[name] for line in done]
        found.append(
            entry
            | {
                "tokens_per_s": median(rates),
                "least": min(rates),
                "most": max(rates),
                "rounds": len(done),
                "load_s": median(line["load_s"] for line in done),
                "peak_resident_bytes": median(line["peak_resident_bytes"] for line in done),
                "cpu_share": median(line["cpu_share"] for line in done),
            }
        )
    return found


def markdown(summary: Sequence[Line], contenders: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables, one for each shape: contenders by nominal bits, workloads in tokens per second.

    contenders: name -> {"bits", "head", "default", "versions", "note"}.
    """
    parts = []
    for shape in dict.fromkeys(line["shape"] for line in summary):
        mine = [line for line in summary if line["shape"] == shape]
        works = [w for w in WORKLOADS if any(line["workload"] == w for line in mine)]
        names = [n for n in contenders if any(line["contender"] == n for line in mine)]
        names.sort(key=lambda n: contenders[n]["bits"])
        rows = [
            f"### {shape}\n",
            "| bits | engine and format | head | " + " | ".join(works) + " | peak MB (1 / most) | load s |",
            "|---|---|---|" + "---|" * (len(works) + 2),
        ]
        for name in names:
            cells = {line["workload"]: line for line in mine if line["contender"] == name}
            about = contenders[name]
            title = f"{name} (default)" if about["default"] else name
            figures = [_rate(cells.get(work), mine, contenders) for work in works]
            rows.append(
                f"| {about['bits']} | {title} | {about['head']} | {' | '.join(figures)} | "
                f"{_memory([cells.get(w) for w in works])} | {_load(cells.values())} |"
            )
        errors: dict[str, list[str]] = {}
        for line in mine:
            if "error" in line:
                errors.setdefault(f"{line['contender']}: {line['error']}", []).append(line["workload"])
        if any("error" not in line and line["cpu_share"] < _SHARE for line in mine):
            rows += [
                "",
                f"° its threads had less than {100 * _SHARE:.0f} % of the time: they slept, or others ran",
            ]
        rows += ["", *(f"- {text} ({', '.join(w)})" for text, w in errors.items())] if errors else []
        parts.append("\n".join(rows))
    used = dict.fromkeys(a["versions"] for a in contenders.values() if a["versions"])
    notes = dict.fromkeys(f"{n.rpartition(' ')[0]}: {a['note']}" for n, a in contenders.items() if a["note"])
    parts.append("\n".join([f"Versions: {'; '.join(used)}.", *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _rate(cell: Line | None, lines: Sequence[Line], contenders: Mapping[str, Mapping[str, Any]]) -> str:
    """Tokens per second, bold where it is the most among those of the same bits."""
    if cell is None:
        return ""
    if "error" in cell:
        return "-"
    bits = contenders[cell["contender"]]["bits"]
    rivals = [
        line["tokens_per_s"]
        for line in lines
        if line["workload"] == cell["workload"]
        and "error" not in line
        and contenders[line["contender"]]["bits"] == bits
    ]
    rate = cell["tokens_per_s"]
    text = (f"{rate:.1f}" if rate < 100 else f"{rate:.0f}") + "°" * (cell["cpu_share"] < _SHARE)
    return f"**{text}**" if len(rivals) > 1 and rate == max(rivals) else text


def _memory(cells: Sequence[Line | None]) -> str:
    sizes = [c["peak_resident_bytes"] / 1e6 for c in cells if c is not None and "error" not in c]
    return f"{sizes[0]:.0f} / {max(sizes):.0f}" if sizes else "-"


def _load(cells: Iterable[Line]) -> str:
    seconds = [c["load_s"] for c in cells if "error" not in c]
    return f"{median(seconds):.1f}" if seconds else "-"


def picture(summary: Sequence[Line], contenders: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of tokens per second: a row of panels for each shape, a panel for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [line for line in summary if "error" not in line]
    shapes = list(dict.fromkeys(line["shape"] for line in done))
    works = [w for w in WORKLOADS if any(line["workload"] == w for line in done)]
    names = sorted({line["contender"] for line in done}, key=lambda n: (contenders[n]["bits"], n))
    figure, axes = pyplot.subplots(
        len(shapes),
        len(works),
        figsize=(2.6 * len(works) + 2.2, (0.26 * len(names) + 0.9) * len(shapes)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for row, shape in zip(axes, shapes):
        for axis, work in zip(row, works):
            for i, name in enumerate(names):
                for line in done:
                    if (line["shape"], line["workload"], line["contender"]) == (shape, work, name):
                        ours = name.startswith("Gossamer")
                        rate = line["tokens_per_s"]
                        error = [[rate - line["least"]], [line["most"] - rate]]
                        axis.barh(
                            i, rate, xerr=error, color="#b5541c" if ours else "#9aa5b1", ecolor="#444444"
                        )
            axis.set_title(f"{shape}: {work}" if work == works[0] else work, fontsize=9)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
            if not any((line["shape"], line["workload"]) == (shape, work) for line in done):
                axis.set_visible(False)
    axes[0][0].invert_yaxis()  # they all share it
    figure.supxlabel("tokens per second (median; whiskers: least and most)", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
