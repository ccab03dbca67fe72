"""What the factors of the learning-rate multiplier share."""

from __future__ import annotations

from typing import Any, ClassVar


class Factor:
    """A factor with its own small state; a subclass names the attributes that are its state."""

    _state: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain Python."""
        return {name: _copy(getattr(self, name)) for name in self._state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        for name in self._state:
            setattr(self, name, _copy(state_dict[name]))


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
