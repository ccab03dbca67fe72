"""The one error type for a user's mistake."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """A mistake a user can fix: raised before training, shown by the app without a traceback.

    The message says what was seen and how to fix it.
    """
