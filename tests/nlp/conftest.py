from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = {"good": "fine great lovely warm bright", "bad": "awful dull cold grim sour"}


def review_rows(count: int, *, offset: int = 0) -> list[dict[str, Any]]:
    """Short texts of varying length whose words tell the class; each is unique by its number."""
    rows = []
    for number in range(offset, offset + count):
        label = ("good", "bad")[number % 2]
        words = WORDS[label].split()
        rows.append({"text": " ".join([*words[: 1 + number % 5], f"n{number}"]), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reviews(tmp_path: Path) -> dict[str, str]:
    """Arguments of a data module with three small files."""
    return {
        "train_file": str(write_jsonl(tmp_path / "train.jsonl", review_rows(50))),
        "val_file": str(write_jsonl(tmp_path / "val.jsonl", review_rows(11, offset=50))),
        "test_file": str(write_jsonl(tmp_path / "test.jsonl", review_rows(7, offset=61))),
    }
