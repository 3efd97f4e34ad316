"""The memory table of a start."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from gossamer.cli.show import memory_table
from gossamer.config import Offloading
from gossamer.llm import engine_config
from gossamer.runtime.start import start


@pytest.mark.parametrize(
    ("host", "words"),
    [(9 << 20, "9.00 MiB read anew in every step"), (0, "0 B all of them fit on the device")],
)
def test_weights_in_host_memory_have_a_row(host: int, words: str) -> None:
    started = start(engine_config("gossamer/pocket", max_num_seqs=1, max_model_len=64))
    assert "in host memory" not in shown(started)
    config = replace(started.config, backend="cuda", offloading=Offloading())
    there = replace(started, config=config, memory=replace(started.memory, host=host))
    assert f"weights in host memory {words}" in shown(there)


def shown(started: object) -> str:
    """The table's text, each run of spaces as one."""
    console = Console(width=160, force_terminal=False)
    with console.capture() as capture:
        console.print(memory_table(started))  # type: ignore[arg-type]
    return " ".join(capture.get().split())
