from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from gossamer.bench.ablation.shapes import SHAPES, check_shape, write_shape
from gossamer.checkpoint.hub import read_config
from gossamer.errors import ConfigError
from gossamer.graph.families import build_graph


@pytest.mark.parametrize(("name", "millions"), [("135m", 135), ("1b", 1236)])
def test_shapes_have_the_size_of_their_name(name: str, millions: int, tmp_path: Path) -> None:
    graph = build_graph(read_config(write_shape(name, tmp_path)), name=name)
    assert round(sum(prod(w.shape) for w in graph.weights.values()) / 1e6) == millions


def test_others_are_refused() -> None:
    assert set(SHAPES) == {"135m", "1b"}
    check_shape("own")
    with pytest.raises(ConfigError, match=r"7b.*135m, 1b, or own"):
        check_shape("7b")
