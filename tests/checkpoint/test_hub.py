"""From a model's name to its directory, without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.hub import POCKET, POCKET_HALF, read_config, resolve_model
from gossamer.errors import CheckpointError


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "model",
    [
        "./absent",
        "/absent",
        "~/absent",
        "~nobody-of-that-name/x",
        "a/b/c",
        "..",
        "../x",
        "",
        "a b",
        "x/..",
        "-x",
        "m.safetensors",
    ],
)
def test_local_looking_names_never_reach_the_network(model: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("reached for the network"))
    if model == "..":
        assert resolve_model(model) == Path(model)
        return
    with pytest.raises(CheckpointError, match="no model directory at"):
        resolve_model(model)


def test_a_name_beyond_what_file_systems_take_is_an_error_of_ours() -> None:
    with pytest.raises(CheckpointError, match="name too long; check the path"):
        resolve_model("x" * 5000)


def test_files_are_not_models(tmp_path: Path) -> None:
    for name, message in (("m.gguf", "too few for a header"), ("model.safetensors", "pass the directory")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=message):
            resolve_model(str(tmp_path / name))


@pytest.mark.parametrize("name", [POCKET, POCKET_HALF])
def test_pocket_is_found_in_the_package_or_said_to_be_missing(
    monkeypatch: Any, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (resolve_model(name) / "model.safetensors").is_file()  # as it is installed here
    monkeypatch.setattr("gossamer.checkpoint.hub._PACKAGE", tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} is missing.*install gossamer again"):
        resolve_model(name)
    directory = tmp_path / "models" / name.removeprefix("gossamer/")
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    assert resolve_model(name) == directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one model, and a hub that cannot be reached."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_offline_comes_from_the_cache(cache: Path) -> None:
    assert resolve_model("someone/tiny") == cache


def test_offline_and_not_cached_says_what_to_do(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"local cache.*hf download someone/other"):
        resolve_model("someone/other")
    with pytest.raises(CheckpointError, match="revision 'v9'"):
        resolve_model("someone/tiny", "v9")
    for typed, meant in (("gossamer/pockt", POCKET), ("pocket_half", POCKET_HALF), ("Pocket", POCKET)):
        with pytest.raises(CheckpointError, match=f"did you mean {meant}\\?"):
            resolve_model(typed)


def test_hub_errors_become_ours(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(kind: type[Exception]) -> Any:
        error = kind.__new__(kind)
        error.args = ("boom",)

        def download(*_: Any, **__: Any) -> str:
            raise error

        return download

    for kind, message in (
        (errors.GatedRepoError, "gated"),
        (errors.RepositoryNotFoundError, "no model 'someone/tiny'"),
        (errors.RevisionNotFoundError, "no revision"),
        (OSError, "cannot download someone/tiny"),
        (RuntimeError, "cannot download someone/tiny"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail(kind))
        with pytest.raises(CheckpointError, match=message):
            resolve_model("someone/tiny")


def test_read_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json in"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for text in ("", "[1]", "{", '{"a": NaN}', "\ufeff[", '{"a": 1, "a": 2}', "[" * 10**5):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_config(tmp_path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_config(tmp_path)
    path.write_text(json.dumps({"a": "x" * (5 << 20)}))
    with pytest.raises(CheckpointError, match="larger than the 4194304"):
        read_config(tmp_path)
    path.write_text('{"model_type": "llama"}')
    assert read_config(tmp_path) == {"model_type": "llama"}
