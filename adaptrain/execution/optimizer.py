"""Running out of memory in the optimizer's update: again where nothing was changed, else a clear error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from adaptrain.execution.oom import is_out_of_memory, release_memory


class HalfUpdatedError(RuntimeError):
    """Memory ran out in the middle of an optimizer's update: some parameters or moments are already changed."""


def guard_step(optimizer: Optimizer) -> Callable[[], None]:
    """Makes `optimizer.step` try its update once more when memory runs out before it changed anything.

    What was computed in the closure (forward and backward) is not computed again. An update that had already changed
    a parameter or a moment, which their version counters tell, cannot be repeated: foreach implementations update
    all moments before any parameter.

    Args:
        optimizer: The optimizer; its class is left alone.

    Returns:
        A function that takes the guard off.
    """
    before = vars(optimizer).get("step")
    step = optimizer.step

    on = True

    @functools.wraps(step)
    def guarded(_: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        computed: list[Any] = []
        versions: list[dict[int, int]] = [] if closure is not None else [_versions(optimizer)]

        def once() -> Any:
            if not computed:
                assert closure is not None
                computed.append(closure())
                versions.append(_versions(optimizer))
            return computed[0]

        arguments = {} if closure is None else {"closure": once}
        try:
            return step(**arguments, **kwargs)
        except Exception as error:
            if not on or not versions or not is_out_of_memory(error):
                raise  # in the closure, or another error
            if _has_moved(optimizer, versions[0]):
                raise HalfUpdatedError(
                    "Memory ran out in the middle of the optimizer's update, so that it can be neither finished nor"
                    " repeated. Resume from the last checkpoint, with more memory for the update: foreach=False in"
                    " the optimizer, or an optimizer with less state."
                ) from error
        release_memory()
        return step(**arguments, **kwargs)

    # A method, as torch's schedulers expect where they are made in the middle of training.
    method = MethodType(guarded, optimizer)
    optimizer.step = method  # pyright: ignore[reportAttributeAccessIssue]

    def undo() -> None:
        nonlocal on
        on = False
        if vars(optimizer).get("step") is not method:
            return
        if before is None:
            del optimizer.step
        else:
            optimizer.step = before

    return undo


def _tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _versions(optimizer: Optimizer) -> dict[int, int]:
    return {id(tensor): tensor._version for tensor in _tensors(optimizer)}


def _has_moved(optimizer: Optimizer, versions: dict[int, int]) -> bool:
    # State allocated in the failed update begins at version 0 and holds its initial value.
    return any(tensor._version != versions.get(id(tensor), 0) for tensor in _tensors(optimizer))
