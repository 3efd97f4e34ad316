"""The report of a ledger: whole HTML, nothing of the user's unescaped, every row and reason in it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from gossamer.bench.ablation.report import main, report_html, write_report
from gossamer.bench.ledger import METRICS, Ledger, Proof, Row
from gossamer.bench.ledger_json import ledger_to_json
from gossamer.errors import ConfigError
from gossamer.techniques import CARDS as HANDBOOK
from tests.bench.ablation.sample import CARDS, card, effect, figure, ledger, row, side

_VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """What a page holds; a tag that is not closed where it should be fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """What a reader sees, with the words of pictures."""
        labels = [str(a[k]) for _, a in self.tags for k in ("aria-label", "title") if a.get(k)]
        return "\n".join([data for tag, data in self.texts if tag not in ("style", "script")] + labels)

    def attributes(self, name: str) -> list[str]:
        return [str(a[name]) for _, a in self.tags if name in a]


def page(of: Ledger, cards: object = CARDS) -> Page:
    """Parsed, and held to what every report must be."""
    html = report_html(of, cards)  # type: ignore[arg-type]
    assert html.startswith("<!doctype html>") and len(html.encode()) < 1_000_000
    found = Page(html)
    ids = found.attributes("id")
    assert len(set(ids)) == len(ids)
    links = found.attributes("href")
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in links)
    assert not found.attributes("src") and "url(" not in html and "@import" not in html
    assert not re.search(
        r"(?<![=-])\b([Nn]a[Nn]|inf|Infinity|None|null)\b", found.text
    )  # cards say x=None, ZeRO-Infinity
    numbers = " ".join(v for _, a in found.tags for v in a.values() if v)
    assert not re.search(r"\b(nan|inf)\b", numbers)
    for tag, attributes in found.tags:
        if tag == "svg":
            assert attributes.get("role") == "img" and attributes.get("aria-label")
    headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    return found


def section(html: str, name: str) -> str:
    """The HTML of a technique's section."""
    start = html.index(f'id="t-{name}"')
    return html[
        start : html.find('<section id="t-', start + 1)
        if html.find('<section id="t-', start + 1) > 0
        else None
    ]


def pair(technique: str = "quantization", **figures: float) -> tuple[Row, ...]:
    """One technique alone that halves each of these."""
    sides = [side(name, **{k: v * f for k, v in figures.items()}) for name, f in (("off", 1.0), ("on", 0.5))]
    return (row(technique, "alone", *sides, tuple(effect(metric, 0.5) for metric in figures)),)


def test_a_whole_run() -> None:
    found = page(ledger())
    for known in CARDS:
        assert known.title in found.text and known.principle in found.text
    for heading in ("At a glance", "One after the other", "Where memory goes", "Memory against speed",
                    "What each is worth at the end", "The techniques", "How this was measured"):  # fmt: skip
        assert ("h2", heading) in found.texts
    assert "15 of 17" in found.text  # two are not built
    assert "AMD EPYC 9R14, 2 processors, avx512, 16.0 GiB of memory" in found.text
    assert "2026-11-30 19:40+00:00, 29 min, 9 interleaved rounds" in found.text
    assert "engines had 98 % of their processors, the probe moved 1.04\u00d7" in found.text
    assert "3 % for others" in found.text and "1 % for perplexity" in found.text


def test_the_handbooks_own_cards() -> None:
    assert {known.name for known in HANDBOOK} == {known.name for known in CARDS}
    found = page(ledger(), HANDBOOK)
    for known in HANDBOOK:
        assert known.memory_promise in found.text and known.title_zh in found.text


def test_losses_stand_like_gains() -> None:
    html = report_html(ledger(), CARDS)
    loser = section(html, "speculative_decoding")
    assert "loses: speed" in loser and "loses" in loser and 'class="iv v-loses"' in loser
    assert "no difference: memory, speed" in section(html, "dynamic_batching")  # its noise is wide
    assert "loses: first token, quality" in section(html, "quantization")


def test_figures_are_the_ledgers() -> None:
    off, on = (
        side("bf16", weights_bytes=3 << 20, itl_ms=figure(9, 10, 14)),
        side("int4", weights_bytes=1 << 20),
    )
    on.figures["itl_ms"] = figure(4, 5, 5)
    effects = (effect("weights_bytes", 1 / 3), effect("itl_ms", 0.5, shape="135m"))
    html = report_html(ledger((row("quantization", "alone", off, on, effects),)), CARDS)
    text = Page(html).text
    assert "3.00 → 1.00 MiB" in text and "\u221267 %" in text
    assert "10.0 → 5.00 ms" in text and "2.00\u00d7" in text
    part = section(html, "quantization")
    assert part.count("<circle") == 2 + 2 + 6 + 0  # an interval's dot for each effect, and every sample


def test_a_second_comparison_stands_below_the_first() -> None:
    first = row(
        "pruning", "alone", side("dense", itl_ms=4.0), side("zeros", itl_ms=2.0), (effect("itl_ms", 0.5),)
    )
    second = row(
        "pruning",
        "alone",
        side("dense int4", itl_ms=1.0),
        side("sparse int8", itl_ms=2.0),
        (effect("itl_ms", 2.0),),
    )
    html = report_html(ledger((first, second)), CARDS)
    part = section(html, "pruning")
    assert part.index("zeros") < part.index("And sparse int8, against dense int4")
    assert Page(html).text.count("0.500\u00d7") >= 1 and 'id="p-pruning-2"' in html
    summary = html[: html.index('id="t-')]
    assert "4.00 \u2192 2.00 ms" in Page(html).text and "dense int4" not in summary


def test_speed_says_its_shape_where_it_is_another() -> None:
    rows = pair(itl_ms=8.0)
    effects = (replace(rows[0].effects[0], shape=""),)
    assert "on the model itself" in page(ledger((replace(rows[0], effects=effects),))).text
    assert "speed on 135m" in page(ledger(rows)).text


def test_what_is_missing_says_why() -> None:
    rows = (row("quantization", "alone", None, None, note="error: the start failed & burned"),)
    found = page(ledger(rows))
    assert "error: the start failed & burned" in found.text
    assert "not built: one machine is all there is" in found.text  # its card says so
    assert "it was not part of this run" in found.text and "not part of this run: " in found.text
    assert "Nothing was measured" in found.text and "0 of 17" in found.text


def test_an_early_end_is_said() -> None:
    early = replace(ledger(pair(itl_ms=2.0)), settings={"interrupted": True}, seconds=math.inf)
    assert "ended early" in page(early).text
    assert "ended early" not in page(ledger()).text


def test_a_disturbed_run_is_said() -> None:
    busy = replace(ledger(pair(itl_ms=2.0)), settings={"cpu_share": 0.31, "probe_moved": 1.0})
    assert "engines had 31 % of their processors" in page(busy).text
    assert "lost in noise" in page(busy).text and "lost in noise" not in page(ledger()).text


def test_one_side_alone() -> None:
    found = page(ledger((row("quantization", "alone", None, side("int4", weights_bytes=1e6)),)))
    assert "No figures: " in found.text
    page(ledger((row("quantization", "cumulative", side("bf16", weights_bytes=1e6), None),)))


def test_nothing_and_little() -> None:
    assert "0 of 17" in page(ledger(())).text
    assert "0 of 0" in page(ledger(()), ()).text
    for metric in METRICS:
        page(ledger(pair(**{metric: 4.0})))
        page(ledger(pair(**{metric: 0.0})))
    unknown = page(ledger(pair("some_new_thing", itl_ms=3.0)), ())
    assert "some new thing" in unknown.text


def test_values_without_bounds() -> None:
    for value in (math.nan, math.inf, -math.inf, 0.0, 1e-300, 1e300, -1.0):
        bad = replace(effect("kl", 2.0), ratio=value, low=value, high=value)
        sides = [side(name, **dict.fromkeys(METRICS, value)) for name in ("off", "on")]
        effects = tuple(replace(bad, metric=metric) for metric in METRICS)
        page(
            ledger(
                tuple(
                    row("quantization", mode, *sides, effects) for mode in ("alone", "cumulative", "without")
                )
            )
        )
    wide = replace(effect("itl_ms", 0.9), low=0.0, high=math.inf, verdict="no difference")
    page(ledger((row("quantization", "alone", side("a", itl_ms=2.0), side("b", itl_ms=1.0), (wide,)),)))


def test_everything_is_escaped() -> None:
    evil = "</title><script>alert(1)</script>\"'><img src=x onerror=y>&amp;\x00\ud800"
    sizes = {"weights_bytes": 1.0, "kv_bytes": 1.0, "itl_ms": 2.0, "tokens_per_s": 3.0}
    sides = [replace(side(evil, arena_bytes=s, **sizes), config=f"{evil}{s}") for s in (1.0, 2.0)]
    proof = Proof(kernels=((evil, 1, 2),), facts=(evil, "the same tokens" + evil))
    effects = (replace(effect("itl_ms", 0.5), shape=evil), effect("tokens_per_s", 1.5))
    rows = tuple(
        row(evil if mode == "alone" else "pruning", mode, *sides, effects, note=evil, proof=proof)
        for mode in ("alone", "cumulative", "without")
    )
    odd = ledger(rows, model=evil)
    told = {evil: evil, "cpu": evil, "list": [evil]}
    odd = replace(
        odd, speed_shape=evil, began=evil, machine=told, settings={evil: told}, versions={evil: evil}
    )
    cards = (
        replace(
            card("pruning"), title=evil, title_zh=evil, principle=evil, papers=(evil,), off=evil, here=evil
        ),
    )
    found = page(odd, cards)
    assert [tag for tag, _ in found.tags if tag in ("script", "img", "title")].count("img") == 0
    assert sum(tag == "script" for tag, _ in found.tags) == 1
    assert not any(name.startswith("on") for _, a in found.tags for name in a)
    assert "<script>alert(1)</script>" in found.text


def test_many_rounds_stay_small() -> None:
    page(ledger(rounds=60))


def test_a_step_without_proof_is_marked() -> None:
    sides = [side(n, weights_bytes=w, kv_bytes=1.0, arena_bytes=1.0) for n, w in (("a", 8.0), ("b", 4.0))]
    found = page(
        ledger((row("quantization", "cumulative", *sides, note="error: nothing shows that it ran"),))
    )
    assert "Quantization (not proved)" in found.text


def test_the_proof_is_shown() -> None:
    kernels = tuple((f"kernel{i}", i + 1, 1 << 20) for i in range(11))
    proof = Proof(kernels=kernels, facts=("12 of 30 guessed tokens accepted",))
    found = page(ledger((replace(pair(itl_ms=2.0)[0], proof=proof),)))
    assert "kernel0" in found.text and "3 more kernels" in found.text
    assert "12 of 30 guessed tokens accepted" in found.text and "#p-quantization" in found.attributes("href")
    assert "No receipt shows that it ran." in page(ledger(pair(itl_ms=2.0))).text


def test_writes_and_makes_it_again(tmp_path: Path) -> None:
    source, first, second = (tmp_path / name for name in ("ledger.json", "a.html", "b.html"))
    source.write_text(ledger_to_json(ledger()), encoding="utf-8")
    write_report(ledger(), first)
    assert main([str(source), "-o", str(second)]) == 0
    assert first.read_text(encoding="utf-8") == second.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html", "ledger.json"]


def test_links_to_pages_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gossamer.bench.ablation.report as module

    monkeypatch.setattr(module, "_DOCS", tmp_path / "the docs")
    (tmp_path / "the docs").mkdir()
    (tmp_path / "the docs" / "pruning.md").write_text("# Pruning")
    (tmp_path / "out").mkdir()
    write_report(ledger(), tmp_path / "out" / "r.html")
    found = Page((tmp_path / "out" / "r.html").read_text(encoding="utf-8"))
    assert [link for link in found.attributes("href") if link.endswith(".md")] == ["../the%20docs/pruning.md"]


def test_what_cannot_be_written_or_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(ledger(()), tmp_path / "no" / "report.html")
    source = tmp_path / "ledger.json"
    for text in (None, b"{}", b"\xff"):
        if text is not None:
            source.write_bytes(text)
        assert main([str(source), "-o", str(tmp_path / "r.html")]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_a_browser_lays_it_out(tmp_path: Path) -> None:
    """No page is wider than its window, at the widths of a phone and of a desk, and the tables sort."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    probe = (
        "<script>document.querySelector('th button').click();"
        "document.title = document.documentElement.scrollWidth + ' ' + innerWidth + ' '"
        " + document.querySelector('.summary tbody th').textContent</script></body>"
    )
    (tmp_path / "r.html").write_text(report_html(ledger(), CARDS).replace("</body>", probe), encoding="utf-8")
    for width in (380, 760, 1180, 1600):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
        command += [f"file://{tmp_path}/r.html"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        found = re.search(r"<title>(\d+) (\d+) (.*?)</title>", dom)
        assert found is not None
        assert int(found[1]) <= int(found[2]), width
        assert found[3] == "Continuous batching"  # the first of the alphabet
