"""Offers adaptrain's configs to any Hydra application in an environment where adaptrain is installed."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from adaptrain.app.config import config_dir


class AdaptrainSearchPath(SearchPathPlugin):
    """Appends adaptrain's config folder, so that an application's own groups come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra calls this once, before it composes."""
        search_path.append(provider="adaptrain", path=f"file://{config_dir()}")
