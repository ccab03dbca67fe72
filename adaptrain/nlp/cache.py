"""A folder of prepared data, so that the second run starts at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Returns `$ADAPTRAIN_CACHE`, else `adaptrain` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    if own := os.environ.get("ADAPTRAIN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "adaptrain"


def cached(name: str, key: Mapping[str, Any], build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `build` made the last time it was asked for with this key.

    A file that cannot be read is built again; a folder that cannot be written costs a warning. Files appear whole or
    not at all, so processes may share the folder.

    Args:
        name: Begins the file's name.
        key: What the result depends on, as strict JSON. The code of this package counts as part of it.
        build: Makes the result: tensors and plain Python in a dict.

    Returns:
        The result.
    """
    text = json.dumps({"key": dict(key), "code": _code_version()}, sort_keys=True)
    path = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"
    if path.exists():
        try:
            entry = torch.load(path, weights_only=True)
            if entry["key"] == text:
                return entry["value"]
        except Exception as error:  # a damaged file raises whatever its bytes happen to spell
            log.warning("The cached data %s cannot be read (%s); making it again.", path, type(error).__name__)
    value = build()
    try:
        _write({"key": text, "value": value}, path)
    except OSError as error:
        log.warning("Prepared data is not kept: %s (set ADAPTRAIN_CACHE to a folder that can be written).", error)
    return value


def _write(entry: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(entry, file)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


@cache
def _code_version() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
