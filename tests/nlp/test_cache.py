from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from adaptrain.nlp.cache import cache_folder, cached


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ADAPTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "adaptrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "adaptrain"


def test_a_second_call_with_the_same_key_builds_nothing() -> None:
    built = []

    def build() -> dict[str, object]:
        built.append(1)
        return {"ids": torch.arange(5), "names": ["a"]}

    first, second = cached("x", {"n": 1}, build), cached("x", {"n": 1}, build)
    assert len(built) == 1
    assert torch.equal(first["ids"], second["ids"])
    cached("x", {"n": 2}, build)
    assert len(built) == 2


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_a_damaged_file_is_built_again(damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    cached("x", {"n": 1}, lambda: {"value": 1})
    (path,) = cache_folder().iterdir()
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    assert cached("x", {"n": 1}, lambda: {"value": 2}) == {"value": 2}
    assert "cannot be read" in caplog.text
    assert cached("x", {"n": 1}, lambda: {"value": 3}) == {"value": 2}


def test_a_folder_that_cannot_be_written_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTRAIN_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert cached("x", {}, lambda: {"value": 1}) == {"value": 1}
    assert "ADAPTRAIN_CACHE" in caplog.text


def test_a_build_that_fails_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError):
        cached("x", {}, lambda: {"value": 1 / 0})
    assert not cache_folder().exists()
