"""Traces as they are published, their times under compression, and the figures of a replay."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from gossamer.bench.measure import recording
from gossamer.bench.plot import check_picture, draw
from gossamer.bench.replay import Goals, figures, parse_ways, ratios, run_ways, start_ways, way_figures
from gossamer.bench.throughput import Outcome, Point, run_jobs
from gossamer.bench.trace import Arrival, Pace, fit, pace_jobs, read_trace, schedule
from gossamer.bench.workload import Job, uncached
from gossamer.config import EngineConfig
from gossamer.engine.engine import Stats
from gossamer.errors import ConfigError
from gossamer.runtime.start import load_graph, start

BYTES = 2 * 2 * 5 * 4 * 16  # of a token: keys and values, two bytes, 5 layers, 4 heads of 16 lanes
TRACE = [Arrival(5, 3, 0.0), Arrival(9, 2, 1.0), Arrival(4, 4, 10.0), Arrival(7, 1, 40.0)]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_published_traces(shared: Path) -> None:
    traces = shared / "data" / "traces"
    azure = read_trace(traces / "AzureLLMInferenceTrace_conv.csv")
    assert len(azure) == 19366
    assert [(a.input_len, a.output_len) for a in azure[:2]] == [(374, 44), (396, 109)]
    assert azure[0].at == 0 and azure[1].at == pytest.approx(4.314579, abs=1e-5)
    assert all(a.at <= b.at for a, b in pairwise(azure) if a.at is not None and b.at is not None)
    assert read_trace(traces / "vidur_arxiv_summarization_llama2tok.csv")[0] == Arrival(3772, 54, None)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("Timestamp,Model,Request tokens,Response tokens\n8,x,7,2\n5,y,3,1\n", None),
        ("t,prompt_len,output_len\n8.0,7.0,2\n5,3,1\n", None),
        (
            "arrival_time,input_length,output_length\n"
            "2023-11-16T18:00:08+00:00,7,2\n2023-11-16 18:00:05.0000000,3,1\n",
            None,
        ),
        ("a,b,c\n8,7,2\n5,3,1\n", ["a", "b", "c"]),
    ],
)
def test_columns_and_times_in_many_forms(tmp_path: Path, text: str, columns: list[str] | None) -> None:
    assert read_trace(write(tmp_path, text), columns) == [Arrival(3, 1, 0.0), Arrival(7, 2, 3.0)]


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("a,b\n1,2\n", None, "it has a, b: name them with --columns"),
        ("a,b\n1,2\n", ["a", "x"], "no column 'x'; --columns takes"),
        ("a,b\n1,2\n", ["a"], "1 columns were named"),
        ("time,input_len,output_len\nsoon,1,2\n", None, "line 2: time 'soon' is neither"),
        ("time,input_len,output_len\nnan,1,2\n", None, "not finite"),
        ("input_len,output_len\n1,2\n1,x\n", None, "line 3: length 'x'"),
        ("input_len,output_len\n1.5,2\n", None, "'1.5' is not a whole"),
        ("input_len,output_len\n1\n", None, "length None"),
        ("input_len,output_len\n1,inf\n", None, "'inf' is not a whole"),
        ("input_len,output_len\n0,2\n", None, "at least 1"),
        ("input_len,output_len\n", None, "no requests"),
        ("", None, "it has none"),
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, text: str, columns: list[str] | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_trace(write(tmp_path, text), columns)


def test_compression_keeps_the_pattern() -> None:
    assert schedule(TRACE, Pace()) == [0, 1, 10, 40]
    assert schedule(TRACE, Pace(speed=10)) == [0, 0.1, 1, 4]
    assert schedule(TRACE, Pace(rate=3)) == pytest.approx([0, 1 / 40, 10 / 40, 1])
    assert schedule(TRACE, Pace(saturate=True)) == [0, 0, 0, 0]
    assert schedule(TRACE, Pace(speed=10, duration=1)) == [0, 0.1, 1]
    jobs = pace_jobs(TRACE, Pace(speed=10, duration=1), vocab=11)
    assert [(len(j.prompt), j.output_len, j.at) for j in jobs] == [(5, 3, 0), (9, 2, 0.1), (4, 4, 1)]
    assert jobs == pace_jobs(TRACE, Pace(speed=10, duration=1), vocab=11)


def test_arrivals_of_a_trace_without_times() -> None:
    timeless = [Arrival(1, 1, None)] * 1000
    times = schedule(timeless, Pace(rate=50, seed=3))
    assert times == sorted(times) and times[-1] == pytest.approx(20, rel=0.15)
    with pytest.raises(ConfigError, match="no times; give --rate"):
        schedule(timeless, Pace())
    with pytest.raises(ConfigError, match="come at once"):
        schedule([Arrival(1, 1, 0.0)] * 2, Pace(rate=1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speed": 0}, "speed 0"),
        ({"rate": math.nan}, "rate nan"),
        ({"duration": -1}, "duration -1"),
        ({"speed": 2, "rate": 2}, "give one of them"),
        ({"rate": 2, "saturate": True}, "give one of them"),
        ({"saturate": True, "duration": 2}, "--duration cuts nothing"),
    ],
)
def test_paces_that_cannot_be(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Pace(**options)  # type: ignore[arg-type]


def test_long_requests_are_cut_or_skipped() -> None:
    trace = [Arrival(5, 5, 0.0), Arrival(20, 5, 1.0), Arrival(8, 9, 2.0)]
    cut, long = fit(trace, 10, skip=False)
    assert long == 2 and [(a.input_len, a.output_len) for a in cut] == [(5, 5), (9, 1), (8, 2)]
    assert fit(trace, 10, skip=True) == (trace[:1], 2)


def stats(computed: int, preemptions: int) -> Stats:
    names = dict.fromkeys(Stats.__slots__, 0)
    return Stats(**(names | {"computed_tokens": computed, "preemptions": preemptions}))


def test_figures() -> None:
    points = (
        Point(at=1, seconds=1, tokens=9, running=2, waiting=1, held=0.5, filled=0.8, preempted=0),
        Point(at=4, seconds=3, tokens=4, running=1, waiting=0, held=1.0, filled=0.9, preempted=1),
    )
    outcome = Outcome(
        seconds=4.0,
        cpu=6.0,
        arrived=((1.0, 1.5, 2.0), (1.0, 4.0)),
        ttft=(1.0, 0.5),
        e2e=(2.0, 3.5),
        tokens=((7, 7, 7), (7, 7)),
        points=points,
        before=stats(100, 2),
        after=stats(113, 3),
    )
    jobs = [Job((1, 2, 3), 3), Job((1, 2, 3, 4), 2, 0.5)]
    found = figures(jobs, outcome, Goals(ttft_ms=1000, itl_ms=500))
    assert found["requests_per_s"] == 0.5 and found["total_tokens_per_s"] == 3.0
    assert found["good_requests"] == 1 and found["goodput_requests_per_s"] == 0.25
    assert found["kv_held_mean"] == pytest.approx(3.5 / 4) and found["kv_held_peak"] == 1
    assert found["kv_wasted"] == pytest.approx((0.5 * 0.2 + 3 * 0.1) / 3.5, abs=1e-4)
    assert found["running_mean"] == 1.25 and found["running_while_waiting"] == 2
    assert found["computed_tokens"] == 13 and found["needed_tokens"] == 10
    assert found["extra_tokens"] == 3 and found["preemptions"] == 1
    assert figures(jobs, outcome, Goals())["goodput_requests_per_s"] is None
    assert figures(jobs, outcome, Goals(ttft_ms=600))["good_requests"] == 1
    slower = found | {"total_tokens_per_s": 1.0, "running_while_waiting": None}
    assert ratios({"a": found, "b": slower})["a/b"] == {"throughput": 3, "running": None, "ttft_p95": 1}


def config(shared: Path, **options: object) -> EngineConfig:
    values = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return EngineConfig(model=str(shared / "models" / "stories260K"), **(values | options))  # type: ignore[arg-type]


def work() -> list[Job]:
    trace = [Arrival(20 + 7 * (i % 5), 6 + 5 * (i % 3), float(i)) for i in range(12)]
    return pace_jobs(trace, Pace(saturate=True), vocab=500)


def test_ways_in_equal_memory(shared: Path) -> None:
    base = config(shared, kv_bytes=2 * 128 * BYTES)
    names = parse_ways("continuous, ragged,padded,contiguous")
    ways = start_ways(names, base, load_graph(base)[0])
    contiguous = ways[-1]
    outcomes = run_ways(ways, work(), 1)
    found = {way.name: way_figures(way, work(), outcomes[way.name], Goals()) for way in ways}
    assert len({f["memory"]["kv_bytes"] for f in found.values()}) == 1
    needed = found["continuous"]["needed_tokens"]
    assert found["ragged"]["computed_tokens"] == needed < found["padded"]["computed_tokens"]
    assert contiguous.engine.started.executor.limits.page_size == 128
    assert found["contiguous"]["kv_wasted"] > 0.5 > found["continuous"]["kv_wasted"]
    assert found["continuous"]["running_peak"] > found["contiguous"]["running_peak"] == 2


def test_preemptions_are_in_the_points(shared: Path) -> None:
    tight = uncached(config(shared, kv_bytes=128 * BYTES))
    jobs = [Job(tuple(range(3, 3 + 20)), 60) for _ in range(4)]
    outcome = run_jobs(*recording(start(tight)), jobs)
    assert outcome.preemptions == sum(p.preempted for p in outcome.points) > 0
    assert figures(jobs, outcome, Goals())["extra_tokens"] > 0


@pytest.mark.parametrize("text", ["continuous", "paged,paged", "paged,other", ""])
def test_comparisons_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="choose from"):
        parse_ways(text)


def test_pictures(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = run_jobs(*recording(start(config(shared))), work())
    for name in ("a.svg", "b.png"):
        check_picture(tmp_path / name)
        draw({"one": outcome, "other": outcome}, "a title", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    text = (tmp_path / "a.svg").read_text()
    assert "<!-- waiting -->" in text and "<!-- a title -->" in text
    for wrong in (tmp_path / "a.doc", tmp_path / "none" / "a.svg"):
        with pytest.raises(ConfigError, match="--plot"):
            check_picture(wrong)
