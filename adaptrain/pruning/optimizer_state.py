"""What optimizers keep for a parameter, cut along with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError

# The factors of a second moment that Adafactor keeps in place of the whole: one value for each row or each column,
# averaged over the dimension given here, which stays as one of size 1 or goes. By torch, and by transformers.
_FACTORS = {
    "row_var": (-1, True),
    "col_var": (-2, True),
    "exp_avg_sq_row": (-1, False),
    "exp_avg_sq_col": (-2, False),
}


def cut(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dim: int, index: Tensor) -> None:
    """Keeps of an optimizer's state for a parameter what belongs to some of its lines. Call it before these are cut.

    State of the parameter's shape is cut exactly. A factor of Adafactor that is averaged over the lines stays as it
    is: it forgets those that are gone as its running average moves on.

    Args:
        optimizer: The optimizer.
        parameter: The parameter, not cut yet.
        dim: The dimension that is cut.
        index: The lines to keep.
    """
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        own = _dim_in(name, value, parameter.shape, dim)
        if own is not None:
            state[name] = value.index_select(own, index)


def skip_empty(optimizer: torch.optim.Optimizer) -> None:
    """Keeps an optimizer's next step from parameters of which nothing is left: Adafactor divides by their size."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.numel() == 0:
                parameter.grad = None


def check(optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Refuses optimizers whose state cannot be cut.

    Raises:
        ConfigurationError: State of one of the parameters is neither a scalar, nor of the parameter's shape, nor a
            factor of Adafactor.
    """
    held = list(parameters)
    for optimizer in optimizers:
        for parameter in held:
            for name, value in optimizer.state.get(parameter, {}).items():
                if not _known(name, value, parameter.shape):
                    seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ConfigurationError(
                        f"Pruning cannot cut the state of {type(optimizer).__name__}: '{name}' is {seen} for a"
                        f" parameter of shape {tuple(parameter.shape)}. Use an optimizer whose state has the"
                        " parameter's shape, such as AdamW, Adam, SGD or RMSprop, or Adafactor."
                    )


def _known(name: str, value: Any, shape: torch.Size) -> bool:
    if not isinstance(value, Tensor):
        return not isinstance(value, (list, tuple, dict))
    return value.numel() == 1 or value.shape == shape or value.shape == _factor_shape(name, shape)


def _dim_in(name: str, value: Any, shape: torch.Size, dim: int) -> int | None:
    """Returns the dimension of a state along which the lines of a parameter's dimension lie; None where none does."""
    if not isinstance(value, Tensor):
        return None
    if value.shape == _factor_shape(name, shape):
        averaged, stays = _FACTORS[name]
        averaged += len(shape)
        if dim == averaged:
            return None
        return dim if stays or dim < averaged else dim - 1
    return dim if value.shape == shape else None


def _factor_shape(name: str, shape: torch.Size) -> torch.Size | None:
    if name not in _FACTORS or len(shape) < 2:
        return None
    averaged, stays = _FACTORS[name]
    sizes = list(shape)
    sizes[averaged : averaged + 1 or None] = [1] if stays else []
    return torch.Size(sizes)
