"""A model's structure: which of its original heads and neurons are left, as plain Python that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.pruning.family import Match
from adaptrain.pruning.projections import projection, submodule

Structure = list[dict[str, list[int]]]
"""For each layer the kept units by kind (`"heads"`, `"ffn"`), as indices into the dense model, ascending.

A layer that is gone as a whole has no units, and an empty `"layers"`; others do not have that key.
"""

_ATTRIBUTE = "_adaptrain_structure"  # on the model: its record, so that whoever holds the model knows what was cut


def dimensions(match: Match) -> list[dict[str, int]]:
    """Returns, for each layer, how many units of each kind the dense model has and how wide they are.

    `heads` are key-value heads, each `head_size` wide and read by `queries` query heads; `ffn` are neurons.
    """
    return [layer_dimensions(match, layer) for layer in range(len(match.layers))]


def layer_dimensions(match: Match, layer: int) -> dict[str, int]:
    """Returns the `dimensions` of one layer."""
    known = getattr(match.model, _ATTRIBUTE, None)
    return _measure(match, match.layers[layer]) if known is None else dict(known["dimensions"][layer])


def current(match: Match) -> Structure:
    """Returns what is left of the model; every unit where nothing was cut."""
    known = getattr(match.model, _ATTRIBUTE, None)
    if known is not None:
        return copy_of(known["layers"])
    return dense(match)


def current_widths(match: Match) -> list[dict[str, int]]:
    """Returns the `widths` of what is left of the model."""
    known = getattr(match.model, _ATTRIBUTE, None)
    if known is not None:
        return widths(known["layers"])
    return [{kind: layer[kind] for kind in ("heads", "ffn")} for layer in dimensions(match)]


def dense(match: Match) -> Structure:
    """Returns the structure of the model before anything was cut."""
    return [{kind: list(range(layer[kind])) for kind in ("heads", "ffn")} for layer in dimensions(match)]


def without_layer(structure: Structure, layer: int) -> Structure:
    """Returns the structure with one layer gone as a whole."""
    kept = copy_of(structure)
    kept[layer] = {kind: [] for kind in (*kept[layer], "layers")}
    return kept


def is_dropped(layer: Mapping[str, list[int]]) -> bool:
    """Whether a layer of a structure is gone as a whole."""
    return "layers" in layer


def is_pruned(module: nn.Module) -> bool:
    """Whether a module is a model whose structure was changed."""
    return hasattr(module, _ATTRIBUTE)


def copy_of(structure: Structure) -> Structure:
    """Returns an independent copy."""
    return [{kind: list(kept) for kind, kept in layer.items()} for layer in structure]


def widths(structure: Structure) -> list[dict[str, int]]:
    """Returns the number of kept units of each kind, for each layer."""
    return [{kind: len(kept) for kind, kept in layer.items()} for layer in structure]


def record(match: Match, structure: Structure | None = None) -> dict[str, Any]:
    """Returns what a checkpoint needs to rebuild the shapes: family, dense dimensions, kept original indices.

    Args:
        match: The model.
        structure: The structure to describe; None: the model's own.
    """
    kept = current(match) if structure is None else structure
    return {"family": match.family.name, "dimensions": dimensions(match), "layers": copy_of(kept)}


def remember(match: Match, structure: Structure) -> None:
    """Notes on the model what is left of it."""
    setattr(match.model, _ATTRIBUTE, record(match, structure))


def check_record(match: Match, saved: Mapping[str, Any]) -> None:
    """Refuses a record of another architecture.

    Raises:
        ConfigurationError: The family, the number of layers or a layer's dense dimensions differ; it says which.
    """
    own = record(match)
    differences = []
    if saved["family"] != own["family"]:
        differences.append(f"family {saved['family']} instead of {own['family']}")
    elif len(saved["dimensions"]) != len(own["dimensions"]):
        differences.append(f"{len(saved['dimensions'])} layers instead of {len(own['dimensions'])}")
    else:
        for index, (theirs, ours) in enumerate(zip(saved["dimensions"], own["dimensions"], strict=True)):
            differences += [
                f"{theirs.get(name)} instead of {ours[name]} for '{name}' of layer {index}"
                for name in ours
                if theirs.get(name) != ours[name]
            ]
    if differences:
        shown = ", ".join(differences[:4]) + (", ..." if len(differences) > 4 else "")
        raise ConfigurationError(
            f"The checkpoint holds another architecture than {type(match.model).__name__}: {shown}."
            " Build the module as it was built for the run that saved the checkpoint."
        )


def _measure(match: Match, layer: nn.Module) -> dict[str, int]:
    attention, ffn = match.family.attention, match.family.ffn
    found = {"heads": 0, "head_size": 0, "queries": 0, "ffn": 0, "hidden": 0}
    if attention is not None:
        head_size = int(getattr(submodule(layer, attention.module), attention.head_size))
        paths = (attention.query, attention.key, attention.value)
        query, key = projection(layer, attention.query), projection(layer, attention.key)
        assert query is not None
        assert key is not None
        keys = key.outputs // paths.count(attention.key)  # a path that is named several times is several in one
        found["heads"] = keys // head_size
        found["head_size"] = head_size
        found["queries"] = query.outputs // paths.count(attention.query) // keys
        found["hidden"] = query.inputs
    if ffn is not None:
        output = projection(layer, ffn.output)
        assert output is not None
        found["ffn"] = output.inputs
        found["hidden"] = output.outputs
    return found
