"""A copy in host memory of everything a training step changes, to go back to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class HostSnapshot:
    """Weights, buffers and optimizer state in host memory; restored in place, so that every tensor keeps its identity.

    It takes as much host memory as the three together (for Adam three times the weights in float32) and is written
    over at the next `take`. It holds no learning rate: that is the scheduler's.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._state: list[dict[str, Any]] = []
        self._scaler: dict[str, Any] | None = None

    @torch.no_grad()
    def take(self, module: nn.Module, optimizer: Optimizer, scaler: Any = None) -> None:
        """Copies the present state.

        Args:
            module: Its parameters and buffers are kept.
            optimizer: Its state is kept.
            scaler: A gradient scaler, or None.
        """
        old = self._tensors
        self._tensors = {name: _copy(tensor, old.get(name)) for name, tensor in _named(module)}
        previous = self._state
        self._state = []
        for index, parameter in enumerate(_parameters(optimizer)):
            before = previous[index] if index < len(previous) else {}
            state = optimizer.state.get(parameter) or {}
            self._state.append({k: _copy(v, before.get(k)) if isinstance(v, Tensor) else v for k, v in state.items()})
        self._scaler = None if scaler is None else dict(scaler.state_dict())

    def fits(self, module: nn.Module, optimizer: Optimizer) -> bool:
        """Whether the copy has the shapes of what stands: after a structural change it has not.

        The optimizer may have been given more parameters since; `restore` leaves those without state.
        """
        current = dict(_named(module))
        return (
            current.keys() == self._tensors.keys()
            and all(tensor.shape == self._tensors[name].shape for name, tensor in current.items())
            and len(self._state) <= sum(1 for _ in _parameters(optimizer))
        )

    @torch.no_grad()
    def restore(self, module: nn.Module, optimizer: Optimizer, scaler: Any = None) -> None:
        """Puts the copy back."""
        for name, tensor in _named(module):
            tensor.copy_(self._tensors[name])
        parameters = list(_parameters(optimizer))
        joined_later: list[dict[str, Any]] = [{}] * (len(parameters) - len(self._state))
        for parameter, saved in zip(parameters, self._state + joined_later, strict=True):
            state = optimizer.state[parameter]
            for key in [key for key in state if key not in saved]:
                del state[key]
            for key, value in saved.items():
                if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                    state[key].copy_(value)
                elif isinstance(value, Tensor):
                    state[key] = value.clone()
                else:
                    state[key] = value
        if scaler is not None and self._scaler is not None:
            scaler.load_state_dict(self._scaler)

    @torch.no_grad()
    def restore_buffers(self, module: nn.Module) -> None:
        """Puts back the buffers that hold a value that is not finite, as a NaN in the data leaves in batch norm."""
        for name, buffer in module.named_buffers():
            kept = self._tensors.get(name)
            bad = buffer.is_floating_point() and not bool(torch.isfinite(buffer).all())
            if bad and kept is not None and kept.shape == buffer.shape:
                buffer.copy_(kept)


def _named(module: nn.Module) -> Any:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _parameters(optimizer: Optimizer) -> Any:
    return (p for group in optimizer.param_groups for p in group["params"])


def _copy(tensor: Tensor, into: Any) -> Tensor:
    """Copies to the host, into the memory of the last copy where it fits."""
    if isinstance(into, Tensor) and into.shape == tensor.shape and into.dtype == tensor.dtype:
        return into.copy_(tensor)
    return tensor.detach().to("cpu", copy=True)
