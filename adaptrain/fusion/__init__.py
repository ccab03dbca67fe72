"""Several models made into one: merged weights, or answers that are averaged. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptrain.fusion.ensemble import Ensemble as Ensemble
    from adaptrain.fusion.merging import merge as merge

_NAMES = {
    "Ensemble": "adaptrain.fusion.ensemble",
    "merge": "adaptrain.fusion.merging",
}

__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'adaptrain.fusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
