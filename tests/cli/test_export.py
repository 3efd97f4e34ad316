"""`gossamer export`, and models that are GGUF files on the command line."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from .conftest import Cli


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


def test_export_writes_what_generate_reads(cli: Cli, stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    made = cli("export", stories, "--type", "bf16", "-o", path, "--json").json
    assert made["bytes"] == path.stat().st_size and made["tensors"] == {"BF16": 36, "F32": 11}
    asked = ("--prompt", "Once upon a time", "--temperature", 0, "--max-tokens", 30)
    texts = [cli("generate", model, *asked).out for model in (path, stories)]
    assert texts[0] == texts[1] and "Lily" in texts[0]
    assert "bf16" in cli("generate", path, *asked).err  # as the file says, with no flag
    field = gguf.GGUFReader(path).get_field("general.name")
    assert field is not None and field.contents() == "stories260K"


def test_export_says_what_it_wrote(cli: Cli, stories: Path, tmp_path: Path) -> None:
    ran = cli("export", stories, "-o", tmp_path / "s.gguf")
    assert ran.code == 0 and "31 Q8_0" in ran.out and "5 F16" in ran.out
    assert "5 matrices" in ran.err and "not whole blocks of 32" in ran.err


def test_export_mistakes(cli: Cli, stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    path.write_bytes(b"mine")
    for arguments, message in (
        (("-o", path), "is there already; --force replaces it"),
        (("-o", path, "--force", "--type", "q3_k"), "choose bf16, q8_0, q4_0"),
        (
            ("-o", path, "--force", "--format", "onnx"),
            "onnx is not built yet; there is gguf, gptq",
        ),
        (
            ("-o", path, "--force", "--format", "zip"),
            "'zip' is unknown; there is gguf, gptq",
        ),
        (("-o", tmp_path / "s.bin"), "does not end in .gguf"),
        ((), "Missing option"),
    ):
        assert message in cli("export", stories, *arguments).complaint
    assert path.read_bytes() == b"mine"
