"""The closure seam: what Lightning runs for one batch, opened so that it can be run in parts and again.

Lightning's automatic optimization makes a closure per batch (training_step, zero_grad, backward) and updates the
parameters after it, so everything inside can be replayed. `wrap_closure` puts a function in its place.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pytorch_lightning.overrides.distributed import prepare_for_backward
from torch import Tensor


class ClosureStep:
    """One batch on its way through Lightning's closure.

    Attributes:
        batch: What the loader yielded, on the device.
        zeroes_gradients: Whether this batch begins an accumulation window.
        ends_window: Whether the optimizer steps after it.
    """

    def __init__(self, trainer: Any, loop: Any, closure: Any, kwargs: OrderedDict[str, Any]) -> None:
        self._trainer = trainer
        self._loop = loop
        self._closure = closure
        self._kwargs = kwargs
        self.batch = kwargs["batch"]
        self.zeroes_gradients = closure._zero_grad_fn is not None
        self.ends_window = not trainer.fit_loop._should_accumulate()

    def run_unsplit(self) -> Any:
        """Runs Lightning's own closure, untouched."""
        return type(self._closure).closure(self._closure)

    def forward(self, batch: Any) -> Any:
        """Runs `training_step` on a micro-batch.

        Returns:
            Lightning's result: `closure_loss` (with its graph, divided by `accumulate_grad_batches`, or None where
            the step returned None) and `extra` (the other keys of a returned dict).
        """
        return self._loop._make_step_fn(OrderedDict(self._kwargs, batch=batch))()

    def zero_grad(self) -> None:
        """Zeroes the gradients with Lightning's hooks, where this batch begins a window."""
        if self._closure._zero_grad_fn is not None:
            self._closure._zero_grad_fn()

    def backward(self, loss: Tensor) -> None:
        """Runs backward with the precision plugin (a GradScaler scales it) and Lightning's hooks."""
        self._closure._backward_fn(loss)

    def backward_and_reduce(self, loss: Tensor) -> None:
        """Runs backward with DDP averaging the gradients, those there are and those to come, as they become ready.

        `forward` ran the plain module, so that DDP is told here, as Lightning does in manual optimization. All ranks
        must come here, and none may fail.

        Raises:
            RuntimeError: A parameter got no gradient, and DDP does not look for such.
        """
        wrapper = self._trainer.strategy.model
        assert wrapper.require_backward_grad_sync
        prepare_for_backward(wrapper, loss)
        self.backward(loss)
        try:
            wrapper.reducer._check_reducer_finalized()
        except RuntimeError as error:
            raise RuntimeError(
                "A parameter got no gradient in the last micro-batch of a step, so that DDP did not finish reducing."
                " overlap=True then needs strategy='ddp_find_unused_parameters_true'; overlap=False does not."
            ) from error

    def reduced_without_ddp(self) -> None:
        """Makes DDP forget which parameters a window used whose gradients it did not reduce."""
        wrapper = self._trainer.strategy.model
        if wrapper.find_unused_parameters:
            wrapper.reducer._reset_state()

    def result(self, loss: Tensor | None, extra: dict[str, Any]) -> Any:
        """Returns what the closure hands back to Lightning: it becomes `outputs` of `on_train_batch_end`."""
        return self._loop.output_result_cls(closure_loss=loss, extra=extra)

    def logged(self) -> LogBuffer:
        """Returns a buffer for what `self.log` is called with during this step."""
        return LogBuffer(self._trainer._results)

    @contextlib.contextmanager
    def local(self) -> Iterator[None]:
        """Runs the plain module instead of DDP's wrapper: no collective runs inside, so a rank may fail alone."""
        strategy = self._trainer.strategy
        wrapper = strategy.model
        strategy.model = strategy.lightning_module
        try:
            yield
        finally:
            strategy.model = wrapper


class LogBuffer:
    """Holds the calls of `self.log` of a step's micro-batches and logs each name once, as the unsplit step would.

    A value is combined over the micro-batches by its `reduce_fx`: a mean weighs them like the loss, `sum` adds,
    `max` and `min` take the extreme. A torchmetrics metric has counted every sample itself; its step value is the
    weighted mean of the micro-batches'.

    Args:
        results: Lightning's result collection of the loop that runs; None in prediction, where nothing is logged.
    """

    def __init__(self, results: Any) -> None:
        self._results = results
        self._calls: dict[tuple[str, str, int], list[tuple[Tensor | Any, float, dict[str, Any]]]] = {}
        self._seen: dict[tuple[str, str], int] = {}
        self._weight = 1.0

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Takes every call of `self.log` inside the block."""
        if self._results is None:
            yield
            return
        self._results.log = self._log
        try:
            yield
        finally:
            del self._results.log

    def next_piece(self, weight: float) -> None:
        """Begins a micro-batch that counts `weight`."""
        self._weight = weight
        self._seen = {}

    def drop_piece(self) -> None:
        """Forgets what the micro-batch begun last has logged: it failed."""
        for (fx, name), count in self._seen.items():
            for occurrence in range(count):
                calls = self._calls[fx, name, occurrence]
                calls.pop()
                if not calls:
                    del self._calls[fx, name, occurrence]
        self._seen = {}

    def clear(self) -> None:
        """Forgets a failed attempt."""
        self._calls = {}

    def flush(self) -> None:
        """Logs what was held."""
        for (fx, name, _), calls in self._calls.items():
            values = [value for value, _, _ in calls]
            weights = [weight for _, weight, _ in calls]
            kwargs = dict(calls[-1][2])
            if kwargs.get("batch_size") is not None:
                kwargs["batch_size"] = sum(call[2]["batch_size"] for call in calls)
            if isinstance(values[0], Tensor):
                value = _combine(values, weights, _reduction(kwargs))
            else:
                value, caches = values[0][0], [cache for _, cache in values]
                if all(isinstance(cache, Tensor) for cache in caches):
                    value._forward_cache = _combine(caches, weights, "mean")
            self._results.log(fx, name, value, **kwargs)
        self.clear()

    def _log(self, fx: str, name: str, value: Any, **kwargs: Any) -> None:
        occurrence = self._seen.get((fx, name), 0)
        self._seen[fx, name] = occurrence + 1
        if isinstance(value, Tensor):
            kept: Any = value if kwargs.get("enable_graph") else value.detach()
        else:
            kept = (value, value._forward_cache)
        self._calls.setdefault((fx, name, occurrence), []).append((kept, self._weight, kwargs))


def _reduction(kwargs: dict[str, Any]) -> str:
    reduce_fx = kwargs.get("reduce_fx", "mean")
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
    return {"avg": "mean"}.get(name.lower(), name.lower())


def _combine(values: list[Tensor], weights: list[float], reduction: str) -> Tensor:
    if len(values) == 1:
        return values[0]
    stacked = torch.stack([value if value.is_floating_point() else value.float() for value in values])
    if reduction in ("max", "min", "sum"):
        return getattr(torch, f"a{reduction}" if reduction != "sum" else "sum")(stacked, dim=0)
    if not all(weights):  # nothing counts there: the mean may be 0/0
        counted = [place for place, weight in enumerate(weights) if weight] or list(range(len(weights)))
        values, stacked = [values[place] for place in counted], stacked[counted]
        weights = [weights[place] or 1.0 for place in counted]
    # As differences from the first, so that a constant (a rate, a count) stays exactly what it is.
    share = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device) / sum(weights)
    return values[0] + ((stacked - stacked[0]) * share.reshape(-1, *[1] * (stacked.ndim - 1))).sum(0)


def wrap_closure(trainer: Any, run: Callable[[ClosureStep], Any]) -> Callable[[], None]:
    """Puts `run` in the place of Lightning's closure for every training batch.

    Args:
        trainer: A trainer of either namespace, in `on_fit_start`.
        run: Runs a step and returns `step.result(...)` or `step.run_unsplit()`. Gradients are enabled.

    Returns:
        A function that takes the wrapper off again.

    Raises:
        RuntimeError: Lightning has moved the seam.
    """
    loop = getattr(trainer.fit_loop.epoch_loop, "automatic_optimization", None)
    make_closure = getattr(loop, "_make_closure", None)
    if loop is None or make_closure is None:
        raise RuntimeError("This version of Lightning has no automatic_optimization._make_closure to wrap.")

    def make_wrapped(kwargs: OrderedDict[str, Any], optimizer: Any, batch_idx: int) -> Any:
        closure = make_closure(kwargs, optimizer, batch_idx)
        # Where backward is skipped (stochastic weight averaging) or the module iterates the loader, nothing is split.
        if closure._backward_fn is not None and "batch" in kwargs:
            # Weak: a cycle would keep every batch until the garbage collector comes by.
            closure_ref = weakref.ref(closure)

            @torch.enable_grad()
            def run_step(*_: Any, **__: Any) -> Any:
                return run(ClosureStep(trainer, loop, closure_ref(), kwargs))

            closure.closure = run_step
        return closure

    before = loop.__dict__.get("_make_closure")
    loop._make_closure = make_wrapped

    def undo() -> None:
        if loop.__dict__.get("_make_closure") is not make_wrapped:
            return
        if before is None:
            del loop._make_closure
        else:
            loop._make_closure = before

    return undo
