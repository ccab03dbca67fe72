"""Taking units out of a model in place: every Parameter stays the same object, in the model and in its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import KINDS, Attention, Match
from adaptrain.pruning.structure import Structure


@dataclass(frozen=True)
class Slice:
    """Where one projection holds the units of a layer.

    Args:
        linear: The projection.
        dim: 0 where the units are its rows (outputs), 1 where they are its columns (inputs).
        size: Rows or columns of each unit.
    """

    linear: nn.Linear
    dim: int
    size: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that hold the units: the weight, and the bias where the units are rows."""
        for name, parameter in self.linear.named_parameters(recurse=False):
            if name == "weight" or self.dim == 0:
                yield parameter


class EmptyAttention(nn.Module):
    """An attention module whose heads are all gone: the layer keeps its output bias and the residual around it.

    It holds the same parameters under the same names, now empty, so that state dicts, optimizers and distributed
    training see a module like any other; computing with them costs nothing.

    Args:
        replaced: The attention module that it stands in for.
        attention: The family's declaration of it.
    """

    def __init__(self, replaced: nn.Module, attention: Attention) -> None:
        super().__init__()
        for name, child in replaced.named_children():
            self.add_module(name, child)
        self._paths = {
            role: path.removeprefix(f"{attention.module}.")
            for role in ("query", "key", "value", "output")
            if (path := getattr(attention, role)).startswith(f"{attention.module}.")
        }
        self._replaced = (replaced,)  # in a tuple: kept to be put back, not a submodule

    @property
    def replaced(self) -> nn.Module:
        """The attention module that it stands in for."""
        return self._replaced[0]

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Returns the attention output of no heads, and no attention weights."""
        if past_key_values is not None:
            # The cache counts positions by what its layers were given: one dummy head, one wide.
            seen = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(seen, seen, self.replaced.layer_idx)
        # Every parameter, and the norm before them, takes part, if only with a gradient that is empty or zero:
        # distributed training waits for each of them. One path back to the input is enough.
        query, key, value = (self.get_submodule(self._paths[role]) for role in ("query", "key", "value"))
        empty = query(hidden_states) + key(hidden_states.detach()) + value(hidden_states.detach())
        return (self.get_submodule(self._paths["output"])(empty) if "output" in self._paths else empty), None


def slices(match: Match, layer: int, kind: str) -> list[Slice]:
    """Returns where a layer holds its units of one kind; the last entry is the output projection."""
    module, sizes = match.layers[layer], structures.dimensions(match)[layer]
    found: list[tuple[str, int, int]] = []
    if kind == "heads" and (attention := match.family.attention) is not None:
        wide = sizes["head_size"] * sizes["queries"]
        found = [
            (attention.query, 0, wide),
            (attention.key, 0, sizes["head_size"]),
            (attention.value, 0, sizes["head_size"]),
            (attention.output, 1, wide),
        ]
    elif kind == "ffn" and (ffn := match.family.ffn) is not None:
        found = [*((path, 0, 1) for path in ffn.inputs), (ffn.output, 1, 1)]
    return [Slice(module.get_submodule(path), dim, size) for path, dim, size in found]  # type: ignore[arg-type]


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
    structures.remember(match, have)  # the dense dimensions, while they can still be read off
    for layer, (old, new) in enumerate(zip(have, keep, strict=True)):
        for kind in KINDS:
            if new[kind] == old[kind]:
                continue
            place = {unit: position for position, unit in enumerate(old[kind])}
            positions = [place[unit] for unit in new[kind]]
            for part in slices(match, layer, kind):
                for parameter in part.parameters():
                    _select(parameter, part, positions, optimizers)
    _finish(match, keep)


def resize(match: Match, structure: Structure) -> None:
    """Gives the model the shapes of `structure`, smaller or larger. Its values are lost where the shape changes."""
    have = structures.current(match)
    structures.remember(match, have)  # the dense dimensions, while they can still be read off
    for layer, (old, new) in enumerate(zip(have, structure, strict=True)):
        for kind in KINDS:
            if new[kind] != old[kind]:
                for part in slices(match, layer, kind):
                    for parameter in part.parameters():
                        shape = list(parameter.shape)
                        shape[part.dim] = len(new[kind]) * part.size
                        _replace(parameter, parameter.data.new_zeros(shape))
    _finish(match, structure)


def check_optimizers(match: Match, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Refuses optimizers whose state does not follow the parameter's shape.

    Raises:
        ConfigurationError: State of a parameter that pruning cuts is neither a scalar nor of the parameter's shape.
    """
    prunable = [
        parameter
        for layer in range(len(match.layers))
        for kind in KINDS
        for part in slices(match, layer, kind)
        for parameter in part.parameters()
    ]
    for optimizer in optimizers:
        for parameter in prunable:
            for name, value in optimizer.state.get(parameter, {}).items():
                scalar = not isinstance(value, (Tensor, list, tuple, dict)) or (
                    isinstance(value, Tensor) and value.numel() == 1
                )
                if not scalar and not (isinstance(value, Tensor) and value.shape == parameter.shape):
                    seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ConfigurationError(
                        f"Pruning cannot cut the state of {type(optimizer).__name__}: '{name}' is {seen} for a"
                        f" parameter of shape {tuple(parameter.shape)}. Use an optimizer whose state has the"
                        " parameter's shape, such as AdamW, Adam, SGD or RMSprop."
                    )


def _select(
    parameter: nn.Parameter, part: Slice, positions: list[int], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    units = torch.tensor(positions, dtype=torch.long, device=parameter.device)
    index = (units[:, None] * part.size + torch.arange(part.size, device=parameter.device)).flatten()
    shape, gradient = parameter.shape, parameter.grad
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[name] = value.index_select(part.dim, index)
    _replace(parameter, parameter.data.index_select(part.dim, index))
    if gradient is not None:
        parameter.grad = gradient.index_select(part.dim, index)


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
                part.linear.out_features, part.linear.in_features = part.linear.weight.shape
        if attention is None:
            continue
        module = layer.get_submodule(attention.module)
        original = module.replaced if isinstance(module, EmptyAttention) else module
        heads = len(kept["heads"]) * sizes[index]["queries"]
        for name in attention.counts:
            setattr(original, name, heads)
        for name in attention.widths:
            setattr(original, name, heads * sizes[index]["head_size"])
        if kept["heads"] and module is not original:
            _put(layer, attention.module, original.train(module.training))
        elif not kept["heads"] and module is original:
            _put(layer, attention.module, EmptyAttention(original, attention).train(original.training))
    structures.remember(match, structure)


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)
