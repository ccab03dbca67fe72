"""The matrices that hold a layer's units: plain or transposed, one projection each or several fused into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)  # the second is what nn.MultiheadAttention projects out with


@dataclass(frozen=True)
class Projection:
    """A matrix and its bias, and how they lie.

    Args:
        module: The module that holds them.
        weight: The matrix.
        bias: The bias of its outputs, if it has one.
        transposed: Whether the weight is (inputs, outputs), as in GPT-2's `Conv1D`, and not (outputs, inputs).
    """

    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return self.weight.shape[self.transposed]

    @property
    def inputs(self) -> int:
        """The number of inputs."""
        return self.weight.shape[not self.transposed]

    def sync(self) -> None:
        """Brings the module's own record of its size in line with the weight."""
        if isinstance(self.module, nn.Linear):
            self.module.out_features, self.module.in_features = self.outputs, self.inputs
        elif self.transposed:
            self.module.nf, self.module.nx = self.outputs, self.inputs  # type: ignore[assignment]


def submodule(layer: nn.Module, path: str) -> nn.Module:
    """Returns a module inside a layer; a negative number in the path counts from the end of a list of modules."""
    found = layer
    for name in path.split("."):
        found = found[int(name)] if isinstance(found, nn.ModuleList) else found.get_submodule(name)
    return found


def projection(layer: nn.Module, path: str) -> Projection | None:
    """Returns a projection inside a layer, or None where there is no plain one.

    Args:
        layer: The layer.
        path: The path to a linear module, or to two parameters up to their `_weight` and `_bias`.
    """
    above, _, name = path.rpartition(".")
    owner = submodule(layer, above) if above else layer
    if name not in owner._modules and isinstance(weight := getattr(owner, f"{name}_weight", None), nn.Parameter):
        return Projection(owner, weight, getattr(owner, f"{name}_bias", None), False)
    module = submodule(layer, path)
    if type(module) in _LINEAR:
        return Projection(module, module.weight, module.bias, False)  # type: ignore[arg-type]
    if is_transposed(module):
        return Projection(module, module.weight, module.bias, True)  # type: ignore[arg-type]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is the `Conv1D` of transformers, told without importing it, or stands in for one."""
    return type(module).__name__ in ("Conv1D", "EmptyConv1D")


@dataclass(frozen=True)
class Slice:
    """Where one projection holds the units of a layer: their lines along one dimension of the weight.

    The lines of a unit lie together; where several projections are fused into one, in each of them.

    Args:
        projection: The projection.
        rows: Whether the units are its outputs, so that the bias holds them as well, and not its inputs.
        size: Lines of each unit, in each of the fused projections.
        fused: How many projections of equal size lie there one after another.
    """

    projection: Projection
    rows: bool
    size: int
    fused: int = 1

    @property
    def linear(self) -> nn.Module:
        """The module that holds the projection."""
        return self.projection.module

    @property
    def weight(self) -> nn.Parameter:
        """The projection's matrix."""
        return self.projection.weight

    @property
    def dim(self) -> int:
        """The dimension of the weight along which the units lie."""
        return int(self.rows == self.projection.transposed)

    @property
    def units(self) -> int:
        """The number of units that are held now."""
        return self.weight.shape[self.dim] // (self.size * self.fused)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that hold the units: the weight, and the bias where the units are outputs."""
        yield self.weight
        if self.rows and self.projection.bias is not None:
            yield self.projection.bias

    def dim_of(self, parameter: Tensor) -> int:
        """Returns the dimension along which the units lie in one of the parameters, or in what has its shape."""
        return self.dim if parameter.dim() > 1 else 0

    def index(self, positions: list[int]) -> Tensor:
        """Returns the lines of the units at these positions among those held now."""
        lines = torch.arange(self.fused * self.units * self.size, device=self.weight.device)
        return lines.view(self.fused, self.units, self.size)[:, positions].flatten()

    def per_unit(self, values: Tensor) -> Tensor:
        """Sums what has the shape of one of the parameters over each unit; of shape (units,)."""
        lines = values.sum(1 - self.dim) if values.dim() > 1 else values
        return lines.view(self.fused, self.units, self.size).sum((0, 2))
