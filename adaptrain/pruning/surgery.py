"""Taking units out of a model in place: every Parameter stays the same object, in the model and in its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adaptrain.pruning import optimizer_state
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import KINDS, Attention, Match
from adaptrain.pruning.projections import Projection, Slice, projection, submodule
from adaptrain.pruning.standins import (
    DroppedLayer,
    EmptyAttention,
    SlicedMultiheadAttention,
    stand_in_for_projections,
)
from adaptrain.pruning.structure import Structure

_STAND_INS = (EmptyAttention, SlicedMultiheadAttention)


def slices(match: Match, layer: int, kind: str) -> list[Slice]:
    """Returns where a layer holds its units of one kind; the last entry is the output projection."""
    output = output_slice(match, layer, kind)
    if output is None:
        return []
    module, inputs = match.layers[layer], dict[str, list[int]]()  # by path, which is named once for each fused into it
    if kind == "heads" and (attention := match.family.attention) is not None:
        size = structures.layer_dimensions(match, layer)["head_size"]
        for path, lines in ((attention.query, output.size), (attention.key, size), (attention.value, size)):
            inputs.setdefault(path, []).append(lines)
    elif (ffn := match.family.ffn) is not None:
        for path in ffn.inputs:
            inputs.setdefault(path, []).append(output.size)
    return [*(Slice(_projection(module, path), True, own[0], len(own)) for path, own in inputs.items()), output]


def output_slice(match: Match, layer: int, kind: str) -> Slice | None:
    """Returns where a layer's output projection holds its units of one kind; None where the family has none."""
    if kind == "heads" and (attention := match.family.attention) is not None:
        sizes, path = structures.layer_dimensions(match, layer), attention.output
        wide = sizes["head_size"] * sizes["queries"]
    elif kind == "ffn" and (ffn := match.family.ffn) is not None:
        wide, path = 1, ffn.output
    else:
        return None
    return Slice(_projection(match.layers[layer], path), False, wide)


def _projection(layer: nn.Module, path: str) -> Projection:
    found = projection(layer, path)
    assert found is not None, path  # checked where the family was found
    return found


def shrink(match: Match, keep: Structure, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Cuts the model down to `keep`, with its gradients and optimizer state.

    Each Parameter stays the same object with smaller data, so ties, hooks and parameter groups go on; training
    continues as if the units had been held at zero from now on.

    Args:
        match: The model.
        keep: The units to keep, a subset of those that are left.
        optimizers: The optimizers that hold the parameters.

    Raises:
        ConfigurationError: An optimizer keeps state that cannot be cut. Nothing was changed.
    """
    check_optimizers(match, optimizers)
    have = structures.current(match)
    for layer, kept in enumerate(keep):
        if structures.is_dropped(kept):
            optimizer_state.check(optimizers, _besides(match, layer).values())
    structures.remember(match, have)  # the dense dimensions, while they can still be read off
    for layer, (old, new) in enumerate(zip(have, keep, strict=True)):
        for kind in KINDS:
            if new[kind] == old[kind]:
                continue
            place = {unit: position for position, unit in enumerate(old[kind])}
            positions = [place[unit] for unit in new[kind]]
            for part in slices(match, layer, kind):
                index = part.index(positions)
                for parameter in part.parameters():
                    _select(parameter, part.dim_of(parameter), index, optimizers)
        if structures.is_dropped(new) and not structures.is_dropped(old):
            _drop(match, layer, optimizers)
    _finish(match, keep)


def permute(
    match: Match, order: Sequence[Mapping[str, Sequence[int]]], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Puts the units of each layer into another order, with their gradients and optimizer state.

    The model computes what it did, up to the rounding of sums; each Parameter stays the same object.

    Args:
        match: The model.
        order: For each layer and kind the positions of the units as they are now, in their new order; a kind that is
            left out stays.
        optimizers: The optimizers that hold the parameters.

    Raises:
        ConfigurationError: An optimizer keeps state that cannot follow. Nothing was changed.
    """
    check_optimizers(match, optimizers)
    for layer, kinds in enumerate(order):
        for kind, positions in kinds.items():
            for part in slices(match, layer, kind):
                index = part.index(list(positions))
                for parameter in part.parameters():
                    dim = part.dim_of(parameter)
                    for optimizer in optimizers:
                        optimizer_state.cut(optimizer, parameter, dim, index)
                    # In place: the shape stays, and so does what distributed training has hooked on the Parameter.
                    for tensor in (parameter.data, parameter.grad):
                        if tensor is not None:
                            tensor.copy_(tensor.index_select(dim, index))


def resize(match: Match, structure: Structure) -> None:
    """Gives the model the shapes of `structure`, smaller or larger. Its values are lost where the shape changes."""
    have = structures.current(match)
    structures.remember(match, have)  # the dense dimensions, while they can still be read off
    for layer, (old, new) in enumerate(zip(have, structure, strict=True)):
        if structures.is_dropped(old) and not structures.is_dropped(new):
            _restore(match, layer)
        for kind in KINDS:
            if new[kind] != old[kind]:
                for part in slices(match, layer, kind):
                    for parameter in part.parameters():
                        shape = list(parameter.shape)
                        shape[part.dim_of(parameter)] = len(new[kind]) * part.size * part.fused
                        _replace(parameter, parameter.data.new_zeros(shape))
        if structures.is_dropped(new) and not structures.is_dropped(old):
            _drop(match, layer, ())
    _finish(match, structure)


def check_optimizers(match: Match, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Refuses optimizers whose state cannot be cut with the parameters.

    Raises:
        ConfigurationError: State of a parameter that pruning cuts is of a layout that is not known.
    """
    prunable = [
        parameter
        for layer in range(len(match.layers))
        for kind in KINDS
        for part in slices(match, layer, kind)
        for parameter in part.parameters()
    ]
    optimizer_state.check(optimizers, prunable)


def _select(parameter: nn.Parameter, dim: int, index: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    gradient = parameter.grad
    for optimizer in optimizers:
        optimizer_state.cut(optimizer, parameter, dim, index)
    _replace(parameter, parameter.data.index_select(dim, index))
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, index)


def _besides(match: Match, layer: int) -> dict[str, nn.Parameter]:
    """Returns the parameters of a layer that hold no units, by name: norms, and biases of outputs."""
    held = {id(p) for kind in KINDS for part in slices(match, layer, kind) for p in part.parameters()}
    return {name: p for name, p in match.layers[layer].named_parameters() if id(p) not in held}


def _drop(match: Match, index: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Empties what is left of a layer without units, and lets another module stand in for it."""
    layer, rest = match.layers[index], _besides(match, index)
    shapes = {name: parameter.shape for name, parameter in rest.items()}
    for parameter in rest.values():
        _select(parameter, 0, torch.empty(0, dtype=torch.long, device=parameter.device), optimizers)
    attention = match.family.attention
    place = None
    if attention is not None:
        module = submodule(layer, attention.module)
        place = getattr(module.replaced if isinstance(module, _STAND_INS) else module, "layer_idx", None)
    match.put_layer(index, DroppedLayer(layer, shapes, place).train(layer.training))


def _restore(match: Match, index: int) -> None:
    """Puts a layer back that was dropped; its values are lost."""
    dropped = [layer for stack in match.stacks for layer in stack][index]
    assert isinstance(dropped, DroppedLayer)
    for name, shape in dropped.shapes.items():
        parameter = dropped.replaced.get_parameter(name)
        _replace(parameter, parameter.data.new_zeros(shape))
    match.put_layer(index, dropped.replaced.train(dropped.training))


def _replace(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a Parameter data of another shape.

    Autograd remembers a leaf's old shape for as long as any graph that used it lives (a loss that someone kept is
    enough) and would refuse the new gradient. It forgets when the dtype changes, so that changes for a moment.
    """
    parameter.grad = None
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


def _finish(match: Match, structure: Structure) -> None:
    """Brings module attributes in line with the new shapes and notes the structure on the model."""
    sizes = structures.dimensions(match)
    attention = match.family.attention
    for index, (layer, kept) in enumerate(zip(match.layers, structure, strict=True)):
        for kind in KINDS:
            for part in slices(match, index, kind):
                part.projection.sync()
        if attention is not None:
            module = submodule(layer, attention.module)
            original = module.replaced if isinstance(module, _STAND_INS) else module
            heads = len(kept["heads"]) * sizes[index]["queries"]
            for names, value in ((attention.counts, heads), (attention.widths, heads * sizes[index]["head_size"])):
                for name in names:
                    if hasattr(original, name):  # versions of transformers differ in what they keep
                        setattr(original, name, value)
            fitting = _fitting(original, attention, len(kept["heads"]), sizes[index]["heads"])
            if type(fitting) is not type(module):
                _put(layer, attention.module, fitting.train(module.training))
        stand_in_for_projections(layer)
    structures.remember(match, structure)


def _fitting(original: nn.Module, attention: Attention, heads: int, dense: int) -> nn.Module:
    """Returns what computes with that many heads: the attention module itself, or one that stands in for it."""
    if isinstance(original, nn.MultiheadAttention):
        return original if heads == dense else SlicedMultiheadAttention(original)
    return original if heads else EmptyAttention(original, attention)


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(submodule(layer, parent) if parent else layer, name, module)
