"""Taking a failed attempt back: what a forward and backward pass changes, kept and restored."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

# What torchmetrics keeps beside a metric's states, and leaves half-changed when an update fails.
_METRIC_FIELDS = (
    "_update_count",
    "_computed",
    "_forward_cache",
    "_to_sync",
    "_should_unsync",
    "_is_synced",
    "_enable_grad",
    "_cache",
    "compute_on_cpu",
)

_LARGE_BYTES = 2**20


class Transaction:
    """Keeps what one training step may change, so that it can be run again on the same samples.

    Kept are the random states (PyTorch's CPU and CUDA, Python's, NumPy's), buffers, torchmetrics inside the module,
    and gradients accumulated by earlier batches. Not kept: other attributes that a `training_step` changes.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers: dict[int, tuple[Tensor, int | None, Tensor]] = {}
        self._random: Any = None
        self._metrics: list[tuple[Metric, dict[str, Any], dict[str, Any]]] = []
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._with_buffers: list[nn.Module] = []
        self._with_state: list[Metric] = []

    def begin(self, *, hold_gradients: bool) -> None:
        """Keeps the state before the first attempt.

        Args:
            hold_gradients: Gradients of earlier batches of the accumulation window are put aside until `commit`;
                False where the step zeroes them anyway.
        """
        self.look()
        self.keep()
        self._held = []
        if hold_gradients:
            self._held = [(p, p.grad) for p in self._module.parameters() if p.grad is not None]
            self._drop_gradients()

    def rollback(self) -> None:
        """Restores the state that `begin` kept, with no gradient of the failed attempt left."""
        self._drop_gradients()
        self.restore()

    def look(self) -> None:
        """Finds the module's buffers and metrics. Call it where they may have changed, before `keep`."""
        modules = list(self._module.modules())
        self._with_buffers = [module for module in modules if module._buffers]
        self._with_state = [module for module in modules if isinstance(module, Metric)]

    def keep(self) -> None:
        """Keeps the state but for gradients, where a step computes none."""
        self._random = _random_states()
        # Evaluation runs in inference mode, whose copies could not be changed in training.
        with torch.inference_mode(False):
            self._keep_buffers()
            self._metrics = [_metric_state(metric) for metric in self._with_state]

    def commit(self) -> None:
        """Adds the gradients put aside to the new ones. The attempt succeeded."""
        for parameter, gradient in self._held:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        self._held = []

    def abort(self) -> None:
        """Brings the gradients put aside back: the step is given up."""
        if self._held:
            self._drop_gradients()
        self.commit()

    def _drop_gradients(self) -> None:
        for parameter in self._module.parameters():
            parameter.grad = None

    def _keep_buffers(self) -> None:
        # A large buffer is copied again only when its version counter moved. Small ones always: batch norm's kernels
        # write running statistics without counting.
        kept = {}
        self._owners = [
            (module, name, buffer)
            for module in self._with_buffers
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        for _, _, buffer in self._owners:
            known = self._buffers.get(id(buffer))
            if known is None or known[0] is not buffer or _changed(*known[:2]):
                known = (buffer, _version(buffer), buffer.detach().clone())
            kept[id(buffer)] = known
        self._buffers = kept

    def restore(self) -> None:
        """Restores what `keep` kept; gradients stay."""
        _set_random_states(self._random)
        for owner, name, buffer in self._owners:
            owner._buffers[name] = buffer  # a step may have put another tensor in its place
            _, version, copied = self._buffers[id(buffer)]
            if _changed(buffer, version):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(copied)
                self._buffers[id(buffer)] = (buffer, _version(buffer), copied)
        with torch.inference_mode(False):
            self._restore_metrics()

    def _restore_metrics(self) -> None:
        for metric, states, fields in self._metrics:
            for name, value in states.items():
                # Metrics of one collection share state tensors only until the next read, which shares them anew.
                setattr(metric, name, list(value) if isinstance(value, list) else value.clone())
            vars(metric).update(fields)


def _version(buffer: Tensor) -> int | None:
    return None if buffer.is_inference() else buffer._version  # tensors made in inference mode do not count


def _changed(buffer: Tensor, version: int | None) -> bool:
    return buffer.nbytes < _LARGE_BYTES or version is None or _version(buffer) != version


def _metric_state(metric: Metric) -> tuple[Metric, dict[str, Any], dict[str, Any]]:
    states = {}
    for name in metric._defaults:
        value = getattr(metric, name)
        # A list state is only appended to, so that its tensors need no copy; a tensor state is added to in place.
        states[name] = list(value) if isinstance(value, list) else value.detach().clone()
    fields = {name: metric.__dict__[name] for name in _METRIC_FIELDS if name in metric.__dict__}
    return metric, states, fields


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state() if numpy is not None else None


def _set_random_states(states: tuple[Any, ...]) -> None:
    cpu, cuda, python, numpy_state = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)
