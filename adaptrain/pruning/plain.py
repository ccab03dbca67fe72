"""Which structures a Hugging Face config can describe, so that plain transformers builds them."""

from __future__ import annotations

from typing import Any

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import Match
from adaptrain.pruning.structure import Structure


def plain_config(match: Match, *, heads: int, ffn: int) -> Any:
    """Returns the model's config with another shape, the same in all layers.

    Args:
        match: The model; of a family with `config` declared.
        heads: Key-value heads of each layer. Ignored where the family's config cannot say it.
        ffn: Feed-forward neurons of each layer. Ignored where the family's config cannot say it.

    Raises:
        ValueError: The config's class refuses these numbers.
    """
    fields, sizes = match.family.config, structures.dimensions(match)[0]
    assert fields is not None
    values = match.model.config.to_dict() | {fields.layers: len(match.layers)}
    if fields.ffn is not None:
        values[fields.ffn] = ffn
    if fields.query_heads is not None:
        values[fields.query_heads] = heads * sizes["queries"]
        if fields.key_value_heads is not None:
            values[fields.key_value_heads] = heads
        if fields.head_size is not None:
            values[fields.head_size] = sizes["head_size"]
    return type(match.model.config).from_dict(values)


def head_counts(match: Match) -> list[int]:
    """Returns the numbers of key-value heads, the same in all layers, that the config can describe; ascending.

    Some configs refuse heads that do not divide the hidden size, even where the width of a head is given.
    """
    sizes = structures.dimensions(match)
    dense = sizes[0]["heads"]
    fields = match.family.config
    if fields is None or fields.query_heads is None or any(layer["heads"] != dense for layer in sizes):
        return [dense]
    return [count for count in range(1, dense) if _accepted(match, count)] + [dense]


def obstacles(match: Match, structure: Structure) -> list[str]:
    """Returns what keeps a config from describing a structure as it is, in words; empty where nothing does."""
    fields = match.family.config
    if fields is None:
        return [f"the family {match.family.name!r} does not say where a config holds its shape"]
    widths, sizes = structures.widths(structure), structures.dimensions(match)
    found = []
    ffn = sorted({layer["ffn"] for layer in widths})
    if len(ffn) > 1:
        found.append(f"the layers have different FFN widths ({_list(ffn)}), and the config holds one")
    elif ffn == [0] and sizes[0]["ffn"]:
        found.append("no FFN neurons are left, and plain layers need at least one")
    elif fields.ffn is None and ffn != [sizes[0]["ffn"]]:
        found.append("the config does not hold the FFN width")
    heads = sorted({layer["heads"] for layer in widths})
    counts = head_counts(match)
    if len(heads) > 1:
        found.append(f"the layers have different numbers of heads ({_list(heads)}), and the config holds one")
    elif heads[0] not in counts:
        config = type(match.model.config).__name__
        only = f"{counts[0]} heads" if len(counts) == 1 else f"{_list(counts)} heads of this size"
        found.append(f"each layer has {heads[0]} heads, and a {config} can only describe {only}")
    return found


def uniform_kinds(match: Match, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the kinds of units that can go while a config can still describe the model.

    Args:
        match: The model.
        kinds: The kinds of units that may go.

    Raises:
        ConfigurationError: None of them can.
    """
    fields = match.family.config
    possible = tuple(
        kind
        for kind in kinds
        if fields is not None and (len(head_counts(match)) > 1 if kind == "heads" else fields.ffn is not None)
    )
    if not possible:
        raise ConfigurationError(
            f"uniform=True cannot prune {' and '.join(kinds)} of {type(match.model).__name__}: its config has no field"
            " for fewer of them. Allow another of groups: [heads, ffn], or set uniform=False."
        )
    return possible


def uniform_widths(match: Match, kind: str, step: int) -> list[int]:
    """Returns the widths of one kind, the same in all layers and below the dense one, to choose from; ascending.

    Args:
        match: The model.
        kind: `"heads"` or `"ffn"`.
        step: FFN widths are multiples of this.
    """
    if kind == "heads":
        return [count for count in head_counts(match)[:-1] if count % step == 0]
    return list(range(step, min(layer["ffn"] for layer in structures.dimensions(match)), step))


def _accepted(match: Match, heads: int) -> bool:
    try:
        plain_config(match, heads=heads, ffn=structures.dimensions(match)[0]["ffn"])
    except Exception as error:
        # huggingface_hub wraps what a config's own check raises, in a class that old versions do not have.
        if isinstance(error, ValueError) or isinstance(error.__cause__, ValueError):
            return False
        raise
    return True


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
