"""What a pruning event did, told to a person and in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaptrain.policies.sparsity import Event
from adaptrain.pruning import structure as structures
from adaptrain.pruning.pruner import Pruner
from adaptrain.pruning.structure import Structure
from adaptrain.pruning.target import cost_name, in_given_unit


def describe_event(
    pruner: Pruner,
    old: Structure,
    new: Structure,
    *,
    first: int,
    event: int,
    plan: Sequence[Event],
    progress: float,
    measured: float | None,
) -> tuple[int, int, str, dict[str, Any]]:
    """Describes the events `first` to `event`, counted from 1; in a short run several are due at once.

    Args:
        pruner: What decided.
        old: The structure before.
        new: The structure after.
        first: The first event.
        event: The last event.
        plan: All events.
        progress: The share of training that is spent.
        measured: The measured latency of `new` as a fraction of the dense model's; None where it was not measured.

    Returns:
        Parameters before, parameters after, one sentence, and the readings.
    """
    table = pruner.table
    assert table is not None
    before, after = structures.widths(old), structures.widths(new)
    params = round(table.total(before)["params"]), round(table.total(after)["params"])
    removed = {kind: sum(b[kind] - a[kind] for b, a in zip(before, after, strict=True)) for kind in pruner.kinds}
    fractions = table.fractions(after)
    if measured is not None:
        fractions["latency"] = measured
    grouped = any(size["queries"] > 1 for size in structures.dimensions(pruner.match))
    names = {"heads": "KV groups" if grouped else "heads", "ffn": "FFN neurons"}
    if pruner.layers:
        removed["layers"] = sum(map(structures.is_dropped, new)) - sum(map(structures.is_dropped, old))
        names["layers"] = "whole layers"
    parts = " and ".join(f"{count} {names[kind].removesuffix('s' * (count == 1))}" for kind, count in removed.items())
    which = f"event {event}" if event == first else f"events {first} to {event}"
    limits = pruner.limits(plan[event - 1].share)
    reached = []
    for name in pruner.target:
        dense = table.dense[cost_name(name)]
        value = in_given_unit(name, fractions[cost_name(name)] * dense, dense)
        due = in_given_unit(name, limits.get(cost_name(name), dense), dense)
        of_dense = " of dense" if name == cost_name(name) else ""
        reached.append(f"{name} {value:.2f}{of_dense} (target at this point {due:.2f})")
    reason = f"{which} of {len(plan)} at {progress:.0%} of training: {parts} removed, {', '.join(reached)}"
    readings: dict[str, Any] = {
        "removed": (params[0] - params[1]) / params[0],
        "event": event,
        "events": len(plan),
        "progress": progress,
        **{f"{kind}_removed": count for kind, count in removed.items()},
        **fractions,
        "latency_measured": measured is not None,
    }
    return *params, reason, readings
