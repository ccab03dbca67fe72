"""Which units may be pruned, and in which numbers, as a user states it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptrain.errors import ConfigurationError
from adaptrain.pruning.family import KINDS


def read_groups(groups: str | Sequence[str]) -> tuple[str, ...]:
    """Returns what may go, in one order: `"heads"`, `"ffn"` (neurons) and `"layers"`, of which some are named.

    Raises:
        ConfigurationError: None or an unknown one is named, or layers without what goes with them.
    """
    known = (*KINDS, "layers")
    named = (groups,) if isinstance(groups, str) else tuple(groups)
    if not named or any(kind not in known for kind in named):
        raise ConfigurationError(f"groups must name some of {', '.join(known)}, got {list(named)}.")
    if "layers" in named and not set(KINDS) <= set(named):
        raise ConfigurationError(
            f"groups names layers, which go with all of their heads and neurons, without {' and '.join(KINDS)}: got"
            f" {list(named)}. Name all three."
        )
    return tuple(kind for kind in known if kind in named)


def read_round_to(round_to: str | int | Mapping[str, int]) -> str | int | dict[str, int]:
    """Returns what numbers of units are multiples of: `"auto"`, one whole number, or one for each kind.

    Raises:
        ConfigurationError: It is none of these.
    """
    values = round_to.values() if isinstance(round_to, Mapping) else [round_to]
    numbers = all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values)
    if round_to != "auto" and not (numbers and (not isinstance(round_to, Mapping) or set(round_to) <= set(KINDS))):
        raise ConfigurationError(
            f"round_to must be 'auto', a whole number of at least 1, or a mapping such as {{'heads': 1, 'ffn': 16}};"
            f" got {round_to!r}."
        )
    return dict(round_to) if isinstance(round_to, Mapping) else round_to
