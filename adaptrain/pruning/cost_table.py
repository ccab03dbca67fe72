"""What any structure of a model would cost, from one table: no structure has to be built to be judged."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import nn

from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import KINDS, Match
from adaptrain.pruning.hollow import hollow, is_hollow
from adaptrain.pruning.structure import Structure
from adaptrain.pruning.surgery import resize, slices
from adaptrain.resources.heap import LEAST_OUTSIDE, blocks_outside_of_heap

COSTS = ("params", "flops", "memory", "latency")
_PROBED_LAYERS = 2  # layers of a probe: enough to tell a layer from the rest, and independent of the model's depth

Widths = Sequence[Mapping[str, int]]


class CostTable:
    """Costs by layer, kind and width: parameters and FLOPs computed, memory traced, latency measured and interpolated.

    A structure's cost is a fixed part plus a part for each layer and kind. Memory is the weights and the largest
    working set of any layer. All numbers are absolute: parameters, FLOPs and bytes of one forward pass, milliseconds.

    Args:
        state: What `build` made: plain Python, so that a resumed run decides by the same numbers.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)
        self.kinds: tuple[str, ...] = tuple(state["kinds"])
        self.dense_widths: list[dict[str, int]] = state["widths"]
        self.costs: tuple[str, ...] = tuple(name for name in COSTS if name in state["fixed"])
        self.floor: float = state["floor"]
        self.dense = self.total(self.dense_widths)
        gone = dict.fromkeys(self.kinds, 0) | ({"layers": 0} if "rest" in state else {})
        self.least = self.total([{**layer, **gone} for layer in self.dense_widths])

    @classmethod
    def build(
        cls, match: Match, kinds: tuple[str, ...], shape: tuple[int, int], *, latency: bool, layers: bool = False
    ) -> CostTable:
        """Computes the table of a model, and measures where latency is asked for.

        Args:
            match: The model; it is only read, also where it was cut already.
            kinds: The kinds of units that may go.
            shape: The (batch, sequence) of the forward pass.
            latency: Whether to measure.
            layers: Whether layers may go as a whole.

        Returns:
            The table.
        """
        # Only what is timed needs weights: a model that fills the device is counted without another beside it.
        twin = Match(match.dense_twin() if latency else match.hollow_twin(), match.family)
        inputs = twin.example_inputs(*shape)
        sizes = structures.dimensions(twin)
        dense = structures.dense(twin)
        units = [_unit_costs(twin, layer, shape) for layer in range(len(sizes))]
        weights = sum(
            tensor.numel() * tensor.element_size() for tensor in (*twin.model.parameters(), *twin.model.buffers())
        )
        totals = {
            "params": cost.count_params(twin.model),
            "flops": cost.count_flops(twin.model, inputs),
            "memory": weights,
        }
        fixed: dict[str, float] = {
            name: total
            - sum(unit[kind][name] * layer[kind] for unit, layer in zip(units, sizes, strict=True) for kind in unit)
            for name, total in totals.items()
        }
        state: dict[str, Any] = {
            "shape": list(shape),
            "kinds": list(kinds),
            "widths": structures.widths(dense),
            "units": units,
            "fixed": fixed,
        }
        empty = _with_widths(dense, dict.fromkeys(kinds, 0))
        least = _variant(twin, empty)
        state["working_sets"] = _working_sets(twin, dense, inputs)
        for unit, sets in zip(units, state["working_sets"], strict=True):
            for kind in unit:
                unit[kind]["memory"] += sets[kind][2]  # after `fixed`: it is not of the weights
        state["floor"] = cost.peak_activation_bytes(least.model, inputs)
        if latency:
            state["latency"], fixed["latency"] = _measure(twin, least, dense, kinds, inputs)
        if layers:
            state["rest"] = _rest(twin, dense, inputs, latency=latency)
        return cls(state)

    def piece(self, name: str, layer: int, kind: str, width: int) -> float:
        """Returns what one layer's units of one kind add to a cost, at a width."""
        if kind == "layers":  # what a layer costs besides its units is in the fixed part, unless the layer is gone
            return 0.0 if width else -self.state["rest"][layer].get(name, 0.0)
        if name != "latency":
            costs = self.state["units"][layer].get(kind)  # none where the family has no units of this kind
            return costs[name] * width if costs else 0.0
        points = self.state["latency"][layer].get(kind)
        return _interpolate(points, width) if points else 0.0

    def working_set(self, layer: int, kind: str, width: int) -> float:
        """Returns the bytes of activations that live at once while a layer's units of one kind compute."""
        each, besides, _ = self.state["working_sets"][layer].get(kind, (0.0, 0.0, 0.0))
        return each * width + besides

    def total(self, widths: Widths) -> dict[str, float]:
        """Returns every cost of a structure, given its widths by layer and kind."""
        return {name: self.cost(name, widths) for name in self.costs}

    def cost(self, name: str, widths: Widths) -> float:
        """Returns one cost of a structure."""
        found = self.state["fixed"][name] + sum(
            self.piece(name, index, kind, width) for index, layer in enumerate(widths) for kind, width in layer.items()
        )
        return found + self.peak(widths) if name == "memory" else found

    def peak(self, widths: Widths) -> float:
        """Returns the largest working set of any layer, and at least that of the model without its layers' units."""
        return max(
            self.floor,
            *(self.working_set(index, kind, w) for index, layer in enumerate(widths) for kind, w in layer.items()),
        )

    def fractions(self, widths: Widths) -> dict[str, float]:
        """Returns every cost of a structure as a fraction of the dense model's."""
        return {name: value / self.dense[name] for name, value in self.total(widths).items()}


def _unit_costs(match: Match, layer: int, shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Costs of one unit of each kind. A product with a matrix costs two FLOPs for each of its entries and tokens."""
    batch, sequence = shape
    tokens = batch * sequence
    sizes = structures.layer_dimensions(match, layer)
    item = next(match.model.parameters()).element_size()
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        parts = slices(match, layer, kind)
        if not parts:
            continue
        count = sizes[kind]
        params = sum(parameter.numel() for part in parts for parameter in part.parameters()) / count
        matrices = sum(part.weight.numel() for part in parts) / count
        flops = 2.0 * tokens * matrices
        if kind == "heads":
            flops += 4.0 * tokens * sequence * sizes["queries"] * sizes["head_size"]  # scores, weighted sum of values
        found[kind] = {"params": params, "flops": flops, "memory": params * item}
    return found


def _rest(twin: Match, dense: Structure, inputs: Mapping[str, Any], *, latency: bool) -> list[dict[str, float]]:
    """Returns what each layer costs besides its units: norms and biases, and the time of a layer that does nothing."""
    item = next(twin.model.parameters()).element_size()
    empty: Structure = [{kind: [] for kind in layer} for layer in dense]
    gone = _variant(twin, [{**layer, "layers": []} for layer in empty])
    least = _variant(twin, empty)
    found: list[dict[str, float]] = []
    for layer in least.layers:
        params = float(sum(parameter.numel() for parameter in layer.parameters()))
        found.append({"params": params, "memory": params * item})
    if latency:
        models = {"least": least.model, "gone": gone.model}
        rough = cost.measure_latency(models, inputs, repeats=3)["least"]
        times = cost.measure_latency(models, inputs, repeats=cost.repeats_for(rough))
        each = max(0.0, times["least"] - times["gone"]) / len(dense)
        found = [{**layer, "latency": each} for layer in found]
    return found


def _working_sets(twin: Match, dense: Structure, inputs: Mapping[str, Any]) -> list[dict[str, list[float]]]:
    """Traces probes of few layers at two widths of each kind, the other kind empty.

    The bytes alive at once are linear in the width of the layer that computes, and in that of every layer that left
    something behind, as keys and values in a cache.

    Returns:
        For each layer [bytes of each unit, bytes besides, bytes that each unit leaves behind] by kind.
    """
    sizes = structures.dimensions(twin)
    shapes = [tuple(sorted(size.items())) for size in sizes]
    traced: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for shape in dict.fromkeys(shapes):
        traced[shape] = {}
        layers = [index for index, other in enumerate(shapes) if other == shape][: _PROBED_LAYERS + 1]
        few = layers[:_PROBED_LAYERS]
        for kind in (kind for kind in KINDS if dict(shape)[kind] > 0):
            count = dict(shape)[kind]

            def peak(width: int, layers: list[int], kind: str = kind) -> int:
                structure = _with_widths(dense, {**dict.fromkeys(KINDS, 0), kind: width})
                return cost.peak_activation_bytes(_variant(twin, structure, layers).model, inputs)

            wide = peak(count, few)
            left = (peak(count, layers) - wide) / count if len(layers) > len(few) else 0.0
            each = (wide - peak(count // 2, few)) / (count - count // 2)
            traced[shape][kind] = [each - left * len(few), wide - each * count, left]
    return [traced[shape] for shape in shapes]


def _measure(
    twin: Match, least: Match, dense: Structure, kinds: tuple[str, ...], inputs: Mapping[str, Any]
) -> tuple[list[dict[str, list[list[float]]]], float]:
    """Measures probes of a few layers at a few widths of one kind, and the whole model dense and empty to scale them.

    Of the other kinds a probe has nothing: what few units take is not told from the noise of a large layer.

    Returns:
        For each layer the points [width, milliseconds above empty] by kind, and the milliseconds of the empty model.
    """
    sizes = structures.dimensions(twin)
    shapes = [tuple(sorted(size.items())) for size in sizes]
    models: dict[str, nn.Module] = {"dense": twin.model, "least": least.model}
    probed: dict[tuple[Any, ...], list[int]] = {
        shape: [index for index, other in enumerate(shapes) if other == shape][:_PROBED_LAYERS] for shape in shapes
    }
    names: dict[tuple[Any, ...], dict[str, dict[int, str]]] = {}
    for number, (shape, layers) in enumerate(probed.items()):
        names[shape] = {}
        for kind in kinds:
            for width in _knots(dict(shape)[kind]):
                name = f"{number}-{kind}-{width}" if width else f"{number}"
                if name not in models:
                    widths = {**dict.fromkeys(kinds, 0), kind: width}
                    models[name] = _variant(twin, _with_widths(dense, widths), layers).model
                names[shape].setdefault(kind, {})[width] = name
    rough = cost.measure_latency({"dense": twin.model}, inputs, repeats=3)["dense"]
    times = cost.measure_latency(models, inputs, repeats=max(5, cost.repeats_for(rough) // 2))
    points: dict[tuple[Any, ...], dict[str, list[list[float]]]] = {}
    for shape, layers in probed.items():
        points[shape] = {}
        for kind, by_width in names[shape].items():
            above = [(times[name] - times[by_width[0]]) / len(layers) for _, name in sorted(by_width.items())]
            rising = isotonic([max(0.0, ms) for ms in above])
            points[shape][kind] = [[width, ms] for width, ms in zip(sorted(by_width), rising, strict=True)]
    table = [points[shape] for shape in shapes]
    whole = sum(rows[-1][1] for layer in table for rows in layer.values())
    scale = max(0.0, times["dense"] - times["least"]) / whole if whole > 0 else 0.0
    scaled = [{kind: [[w, ms * scale] for w, ms in rows] for kind, rows in layer.items()} for layer in table]
    return scaled, min(times["least"], times["dense"])


def _knots(count: int) -> list[int]:
    """The widths to measure: none, a 64th, a 32nd, ..., a half, and all, and some of those in between."""
    parts = (3, 6, 12, 24, 36, 48, 72, 96, 192)
    return sorted({0, *(min(count, max(1, count * part // 192)) for part in parts)})


def isotonic(values: Sequence[float]) -> list[float]:
    """Returns the non-decreasing sequence that is nearest to the values in squares: noise must not make more cost less.

    By pooling adjacent violators (Ayer et al. 1955, "An Empirical Distribution Function for Sampling with Incomplete
    Information").
    """
    pools: list[tuple[float, int]] = []  # mean, how many
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _with_widths(dense: Structure, widths: Mapping[str, int]) -> Structure:
    return [{kind: list(range(widths.get(kind, len(units)))) for kind, units in layer.items()} for layer in dense]


def _variant(twin: Match, structure: Structure, layers: Sequence[int] | None = None) -> Match:
    """A copy of the twin with another structure, and only some of its layers; all outside the layers is shared.

    Of a large model there is never more than the twin and what the copy keeps; of a hollow one, what was cut.
    """
    inside = [parameter for layer in twin.layers for parameter in layer.parameters()]
    emptied = {id(parameter): hollow(parameter) for parameter in inside}
    shared = {id(p): p for p in (*twin.model.parameters(), *twin.model.buffers()) if id(p) not in emptied}
    full = {emptied[id(parameter)]: parameter for parameter in inside}
    with blocks_outside_of_heap(LEAST_OUTSIDE):
        variant = Match(copy.deepcopy(twin.model, {**shared, **emptied}), twin.family)
        if layers is not None:
            variant.keep_layers(layers)
            structure = [structure[layer] for layer in layers]
        resize(variant, structure)
        for parameter in variant.model.parameters():
            if parameter in full and is_hollow(parameter) and not is_hollow(full[parameter]):
                parameter.data = full[parameter].data.clone()
    return variant


def measuring_twin(match: Match) -> Match:
    """Returns a dense model to measure a model beside.

    What is outside of the layers, embeddings above all, is the model's own, so that it is not held twice.
    """
    twin = Match(match.dense_twin(), match.family)
    inside = {id(parameter) for layer in twin.layers for parameter in layer.parameters()}
    own = dict(match.model.named_parameters())
    for name, parameter in twin.model.named_parameters():
        held = own.get(name, parameter)
        if id(parameter) not in inside and (held.dtype, held.shape) == (parameter.dtype, parameter.shape):
            parameter.data = held.data
    return twin


def with_structure(twin: Match, structure: Structure) -> nn.Module:
    """Returns a copy of a dense twin with another structure, for measuring."""
    return _variant(twin, structure).model


def _interpolate(points: Sequence[Sequence[float]], width: int) -> float:
    right = bisect_left(points, width, key=itemgetter(0))
    if points[right][0] == width:
        return points[right][1]
    (w0, ms0), (w1, ms1) = points[right - 1], points[right]
    return ms0 + (ms1 - ms0) * (width - w0) / (w1 - w0)
