"""Sets single weights to zero while the model trains."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain import _lightning
from adaptrain._lightning.structure import averaged_copies
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.decisions import Decision
from adaptrain.errors import ConfigurationError
from adaptrain.execution.oom import attempt, weights_on_host
from adaptrain.policies.sparsity import read_schedule
from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.cost_table import with_structure
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match
from adaptrain.pruning.shape import read_shape, typical_shape
from adaptrain.pruning.weight_masks import (
    masked_projections,
    pattern_mask,
    sizes_on_disk,
    unstructured_masks,
    zero_share,
)

_log = logging.getLogger(__name__)


class WeightPruning(AdaptiveCallback):
    """Sets the smallest weights of attention and feed-forward matrices to zero, in a few events, and keeps them there.

    What it buys is files that compress, and on GPUs with sparse tensor cores a model that
    `torch.sparse.to_sparse_semi_structured` can speed up ("2:4"). It makes no model faster by itself, and none
    smaller in memory: kernels multiply by zeros as by any number. `report` says so in measured numbers.
    For a model that is faster and smaller use `ProgressivePruning`.

    Weights stay plain parameters: no reparametrization, checkpoints load without the callback, and the zeros in them
    are all that a resumed run needs. It goes with `ProgressivePruning`.

    Args:
        sparsity: The share of these weights that is zero at the end, in (0, 1), for `"unstructured"`; None with a
            pattern, which says it itself.
        granularity: `"unstructured"`: single weights, ranked over all matrices. Or a pattern n:m, such as `"2:4"`: of
            every m weights along a matrix's inputs the n largest stay.
        schedule: When events come and how far each goes: an object with `plan()`, such as `CubicSchedule`, or its
            arguments as a mapping. None: `CubicSchedule()`.
        latency_input: The (batch, sequence) that `report` measures at; None: the training data's median.
        dry_run: Record what would become zero, and change nothing.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, the model is of no known family, or
            a matrix cannot hold the pattern, or the data does not show its shape.
    """

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        granularity: str = "unstructured",
        schedule: Any = None,
        latency_input: Sequence[int] | None = None,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        self.pattern = _read_granularity(granularity)
        self.granularity = granularity
        self.sparsity = _read_sparsity(sparsity, self.pattern)
        self.schedule = read_schedule(schedule)
        self.latency_input = None if latency_input is None else read_shape(latency_input)
        self._reset()

    def _reset(self) -> None:
        self._match: Match | None = None
        self._masks: list[tuple[nn.Parameter, Tensor]] = []
        self._done = 0
        self._shape = (1, 1)  # as found when training starts
        self._zeros = 0.0  # recorded, in a dry run too
        self._report: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage == "fit":
            self._reset()
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses, before training, models of no known family and matrices that cannot hold the pattern."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        self._match = find_family(pl_module)
        if self.pattern is not None:
            for name, part in masked_projections(self._match).items():
                if part.inputs % self.pattern[1]:
                    raise ConfigurationError(
                        f"granularity={self.granularity!r} needs inputs in multiples of {self.pattern[1]}, but {name}"
                        f" has {part.inputs}. Use granularity='unstructured', or another width."
                    )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the zeros of a run that is resumed, and hooks into the optimizer's step."""
        _lightning.refuse_endless(trainer, user=type(self).__name__)
        self._shape = self.latency_input or typical_shape(trainer.train_dataloader)
        if self._done and not self.dry_run:
            self._follow_zeros()
        for optimizer in trainer.optimizers:
            self.on_exit(optimizer.register_step_post_hook(lambda *_: self._apply()).remove)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Leaves zeros out of the gradient, so that its norm is that of the weights there are."""
        for parameter, mask in self._masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sets weights to zero where an event is due, after a complete optimizer step."""
        if not _lightning.at_step_boundary(trainer):
            return
        progress = _lightning.progress(trainer)
        due = sum(event.position <= progress + 1e-9 for event in self.schedule.plan())
        if due > self._done:
            self._prune(trainer, pl_module, due)

    def on_decision(self, trainer: Any, pl_module: Any, decision: Decision) -> None:
        """Follows matrices that were cut."""
        if decision.knob == "structure" and self._done and not self.dry_run:
            self._follow_zeros()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Sets the rest to zero where training ended early, and measures what the zeros buy."""
        events = len(self.schedule.plan())
        if self._done < events:
            _log.warning(
                "Training ended before event %d of %d; the rest is set to zero now, without training to recover.",
                self._done + 1,
                events,
            )
            self._prune(trainer, pl_module, events)
        report = self._measure(trainer) if _lightning.is_rank_zero(trainer) else None
        self._report = _lightning.broadcast(trainer, report)
        latency = self._report["latency"]
        _log.info(
            "%.0f%% of the weights in attention and feed-forward matrices are zero. Compressed, its file takes %.2f of"
            " its size; a forward pass takes %s, and the memory is the same.",
            100 * self._report["zeros"],
            self._report["compressed_bytes"] / self._report["size_bytes"],
            "a time that there was no memory to measure"
            if latency is None
            else f"{latency:.2f} of the time it takes without zeros",
        )

    def report(self) -> dict[str, Any]:
        """Returns what the zeros buy, after fit.

        Returns:
            `zeros`, the share of the matrices' weights; `latency`, measured, as a fraction of a dense model's of the
            same shape, at `latency_input` (batch, sequence), None where there was no memory for that; `size_bytes` of
            the weights and their `compressed_bytes` in a compressing format. Empty before the end of fit.
        """
        return self._report

    def state_dict(self) -> dict[str, Any]:
        """Returns how many events are over; the zeros are in the weights."""
        return {"done": self._done, "zeros": self._zeros}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over where a run stood."""
        self._done, self._zeros = state_dict["done"], state_dict["zeros"]

    def _prune(self, trainer: Any, pl_module: Any, due: int) -> None:
        assert self._match is not None
        share = self.schedule.plan()[due - 1].share
        parts = list(masked_projections(self._match).values())
        if self.pattern is None:
            masks = unstructured_masks([part.weight for part in parts], share * self.sparsity)
        else:
            n, m = self.pattern
            masks = [
                pattern_mask(part.weight, n, m, share=share, inputs_dim=int(not part.transposed)) for part in parts
            ]
        first, self._done = self._done + 1, due
        old, self._zeros = self._zeros, zero_share(masks)
        if not self.dry_run:
            self._masks = [(part.weight, mask) for part, mask in zip(parts, masks, strict=True)]
            self._apply()
            for copied in averaged_copies(trainer, pl_module):  # an average of zeros stays zero
                for part, mask in zip(masked_projections(find_family(copied)).values(), masks, strict=True):
                    part.weight.data.mul_(mask)
        which = f"event {due}" if due == first else f"events {first} to {due}"
        kind = "the smallest weights" if self.pattern is None else f"the {self.granularity} pattern"
        self.record(
            trainer,
            "weight_sparsity",
            old=old,
            new=self._zeros,
            reason=f"{which} of {len(self.schedule.plan())} at {_lightning.progress(trainer):.0%} of training:"
            f" {self._zeros:.0%} of the weights are zero by {kind}",
            readings={"event": due, "events": len(self.schedule.plan())},
        )

    @torch.no_grad()
    def _apply(self) -> None:
        for parameter, mask in self._masks:
            parameter.mul_(mask)

    def _follow_zeros(self) -> None:
        assert self._match is not None
        weights = [part.weight for part in masked_projections(self._match).values()]
        self._masks = [(weight, weight.detach() != 0) for weight in weights]

    def _measure(self, trainer: Any) -> dict[str, Any]:
        assert self._match is not None
        match, shape = self._match, self._shape

        def time() -> dict[str, float]:
            dense = with_structure(Match(match.dense_twin(), match.family), structures.current(match))
            masked = copy.deepcopy(dense)  # and not the model itself, which may carry hooks
            masked.load_state_dict(match.model.state_dict())
            models = {"masked": masked, "dense": dense}
            return cost.measure_latency(models, match.example_inputs(*shape), copies=cost.COPIES)

        times, _ = attempt(time, host_bytes=4 * weights_on_host(match.model))  # both, and a copy of each
        return {
            "zeros": zero_share(part.weight for part in masked_projections(match).values()),
            "latency": None if times is None else times["masked"] / times["dense"],
            "latency_input": list(shape),
            **sizes_on_disk(match.model),
        }


def _read_granularity(granularity: Any) -> tuple[int, int] | None:
    if granularity == "unstructured":
        return None
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", granularity) if isinstance(granularity, str) else None
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigurationError(
            f"granularity must be 'unstructured', or a pattern n:m with n < m such as '2:4', got {granularity!r}."
        )
    return int(found[1]), int(found[2])


def _read_sparsity(sparsity: Any, pattern: tuple[int, int] | None) -> float:
    if pattern is not None:
        if sparsity is not None:
            raise ConfigurationError(
                f"granularity='{pattern[0]}:{pattern[1]}' says itself how much goes: leave out sparsity={sparsity!r}."
            )
        return 1 - pattern[0] / pattern[1]
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ConfigurationError(
            f"sparsity is the share of weights that become zero, in (0, 1), such as 0.5; got {sparsity!r}."
        )
    return float(sparsity)
