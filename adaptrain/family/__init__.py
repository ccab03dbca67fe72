"""The models that one pruned run leaves, from the dense to the smallest. Names are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrain._lazy import lazily

if TYPE_CHECKING:
    from adaptrain.family.cascade import Cascade as Cascade
    from adaptrain.family.cascade import CascadeReport as CascadeReport
    from adaptrain.family.member import Member as Member
    from adaptrain.family.member import Prediction as Prediction
    from adaptrain.family.model_family import ModelFamily as ModelFamily

_NAMES = {
    "Cascade": "adaptrain.family.cascade",
    "CascadeReport": "adaptrain.family.cascade",
    "Member": "adaptrain.family.member",
    "ModelFamily": "adaptrain.family.model_family",
    "Prediction": "adaptrain.family.member",
}

__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazily(__name__, _NAMES)
