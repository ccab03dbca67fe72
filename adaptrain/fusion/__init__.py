"""Several models made into one: merged weights, or answers that are averaged. Names are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrain._lazy import lazily

if TYPE_CHECKING:
    from adaptrain.fusion.ensemble import Ensemble as Ensemble
    from adaptrain.fusion.merging import merge as merge

_NAMES = {
    "Ensemble": "adaptrain.fusion.ensemble",
    "merge": "adaptrain.fusion.merging",
}

__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazily(__name__, _NAMES)
