"""Trains low-rank adapters within a number of parameters, with ranks where the task needs them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrain import _lightning
from adaptrain._lightning.before_training import loss_of, train_dataloader
from adaptrain._lightning.structure import averaged_copies, before_hook, unwrapped
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.errors import ConfigurationError
from adaptrain.execution.adapters import (
    CHECKPOINT_KEY,
    adapted_matrices,
    adapters_in,
    head_parameters,
    import_peft,
    insert_adapters,
    merge_adapters,
    rank_cost,
    rank_gains,
    replay_adapters,
)
from adaptrain.policies.adapter_ranks import allocate_ranks
from adaptrain.pruning.cost import count_params
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match
from adaptrain.pruning.shape import sample_batches

_log = logging.getLogger(__name__)

_TARGETS = ("trainable_params", "trainable_params_m")
_NOT_WITH = (
    *("ProgressivePruning", "ElasticTraining", "FamilyCheckpoint"),
    *("LayerFreezing", "WeightPruning", "WeightSoup"),
)
_PIECE = 8  # samples at once where ranks are scored


class LowRankAdapters(AdaptiveCallback):
    """Trains low-rank adapters and the head, and leaves the rest of a pretrained model as it is.

    Gradients and optimizer state are those of few parameters, so training takes less memory; a checkpoint holds the
    whole model. Each linear layer inside the model's layers can have an adapter (LoRA: Hu et al. 2021,
    arXiv:2106.09685, by peft). How large each one is, is decided once, before training, by gradients of a few samples:
    the next rank goes where the gradient has most left of it for the parameters that a rank costs, until the budget is
    spent. At the end of fit the adapters are merged into the weights, so that the model is a plain one again.

    Adapters take a higher learning rate than the weights themselves, mostly 3 to 10 times as high.

    Args:
        target: What may train, head included: `{"trainable_params_m": 0.3}` in millions, or
            `{"trainable_params": 0.02}` as a share of all parameters, in (0, 1). Both hold where both are given; None
            entries are no limit, and with none at all nothing is done.
        importance: `"gradient"`: ranks by the gradient; `"uniform"`: the same rank for all.
        max_rank: The largest rank of an adapter.
        rank_step: Ranks by the gradient are multiples of this, or of the largest power of two that all could have as
            their rank where that is less: with few different shapes kernels are faster.
        scale: alpha/r, what an adapter's output is multiplied by.
        samples: Training samples that ranks are decided by, 8 at once.
        dry_run: Decide and record, put nothing in.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, peft is not there, the model is of no
            known family, the budget is below what the head and one rank take, or another callback needs all gradients.
    """

    def __init__(
        self,
        *,
        target: Mapping[str, Any],
        importance: Literal["gradient", "uniform"] = "gradient",
        max_rank: int = 64,
        rank_step: int = 8,
        scale: float = 2.0,
        samples: int = 64,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        self.target = _read_target(target)
        if importance not in ("gradient", "uniform"):
            raise ConfigurationError(f"importance must be gradient or uniform, got {importance!r}.")
        for argument, value in (("max_rank", max_rank), ("rank_step", rank_step), ("samples", samples)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{argument} must be a whole number of at least 1, got {value!r}.")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ConfigurationError(f"scale must be a number above 0, got {scale!r}.")
        self.importance: Literal["gradient", "uniform"] = importance
        self.max_rank = max_rank
        self.rank_step = rank_step
        self.scale = scale
        self.samples = samples
        self._reset()

    def _reset(self) -> None:
        self._match: Match | None = None
        self._ranks: dict[str, int] = {}
        self._total = 0
        self._trainable = 0
        self._is_new = False
        self._frozen: list[nn.Parameter] = []  # by the user, before this callback

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every matrix by its name in the model; 0: it has no adapter. Empty before fit."""
        return dict(self._ranks)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Waits for the module's optimizers, and prepares the model to follow checkpoints."""
        if stage == "fit":
            self._reset()
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.target:
            undo = before_hook(pl_module, "configure_optimizers", lambda: self._insert(trainer, pl_module))
            self.on_exit(undo)
        self.on_exit(before_hook(pl_module, "on_load_checkpoint", lambda saved: self._follow(pl_module, saved, stage)))
        self.on_exit(before_hook(pl_module, "on_save_checkpoint", self._note))

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses, before training, what cannot be served."""
        if not self.target:
            _log.info("LowRankAdapters has no target, so all parameters train.")
            return
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        import_peft()
        for other in trainer.callbacks:
            named = next((kind.__name__ for kind in type(other).__mro__ if kind.__name__ in _NOT_WITH), None)
            if named is not None and getattr(other, "target", True):
                raise ConfigurationError(
                    f"LowRankAdapters does not go with {named}, which works on the weights that adapters"
                    " leave as they are. Leave one of the two out."
                )
        self._match = match = find_family(pl_module)
        self._frozen = [p for p in match.model.parameters() if not p.requires_grad]
        matrices = adapted_matrices(match)
        if not matrices:
            raise ConfigurationError(f"{type(match.model).__name__} has no linear layers that adapters could go to.")
        head = sum(p.numel() for p in head_parameters(match))
        least, budget = head + min(map(rank_cost, matrices.values())), self._budget(match)
        if budget < least:
            total = count_params(match.model)
            raise ConfigurationError(
                f"{_said(self.target)} lets {budget:,} parameters train, but the head alone has {head:,} and the"
                f" smallest adapter {least - head:,}. Give at least trainable_params_m={least / 1e6:.6g}, or"
                f" trainable_params={math.ceil(1e4 * least / total) / 1e4:g}."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Records what was decided, once the run counts its steps."""
        if not self._is_new:
            return
        self._is_new = False
        used = {name: rank for name, rank in self._ranks.items() if rank}
        how = "where the gradient has most of it" if self.importance == "gradient" else "the same for all"
        self.record(
            trainer,
            "trainable_params",
            old=self._total,
            new=self._trainable,
            reason=f"{_said(self.target)}: adapters for {len(used)} of {len(self._ranks)} matrices, of rank"
            f" {min(used.values(), default=0)} to {max(used.values(), default=0)}, {how}",
            readings={name: float(rank) for name, rank in self._ranks.items()},
        )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Merges the adapters into the weights."""
        if self._match is None or not merge_adapters(self._match.model):
            return
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def report(self) -> dict[str, Any]:
        """Returns what came of it: `total_params`, `trainable_params` and `ranks`. Empty without a target."""
        if not self._ranks:
            return {}
        return {"total_params": self._total, "trainable_params": self._trainable, "ranks": self.ranks}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Notes the adapters beside the weights."""
        self._note(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Returns what was decided, as plain Python."""
        return {"ranks": self._ranks, "total": self._total, "trainable": self._trainable}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was decided; the adapters themselves came with the weights."""
        self._ranks = dict(state_dict["ranks"])
        self._total, self._trainable = state_dict["total"], state_dict["trainable"]
        self._is_new = False

    # Before training --------------------------------------------------------------------------------------------

    def _note(self, checkpoint: dict[str, Any]) -> None:
        if self._match is not None and adapters_in(self._match.model):
            checkpoint[CHECKPOINT_KEY] = {"ranks": self._ranks, "scale": self.scale}

    def _follow(self, pl_module: Any, saved: Mapping[str, Any], stage: str) -> None:
        adapters = saved.get(CHECKPOINT_KEY)
        if stage == "fit" and self.target and not self.dry_run and adapters is None:
            raise ConfigurationError(
                "The checkpoint to resume from has no adapters: its run trained all parameters, or had ended and merged"
                " them. Resume from one in the middle of a run with LowRankAdapters, or begin a new run from its"
                " weights."
            )
        replay_adapters(pl_module, adapters)
        if adapters is not None:
            self._ranks = dict(adapters["ranks"])

    def _budget(self, match: Match) -> int:
        total = count_params(match.model)
        limits = {"trainable_params": total, "trainable_params_m": 1e6}
        return min(int(value * limits[name]) for name, value in self.target.items())

    def _insert(self, trainer: Any, pl_module: Any) -> None:
        """Decides on the ranks and puts the adapters in; a resumed run has them already."""
        match = self._match
        assert match is not None
        if averaged_copies(trainer, pl_module):
            raise ConfigurationError(
                "LowRankAdapters does not go with a running average of the model, which was copied before the adapters"
                " were put in. Leave one of the two out."
            )
        if adapters_in(match.model):
            return
        self._total = count_params(match.model)
        matrices = adapted_matrices(match)
        costs = [rank_cost(matrix) for matrix in matrices.values()]
        head = sum(p.numel() for p in head_parameters(match))
        left = self._budget(match) - head
        if self.importance == "uniform":
            rank = min(self.max_rank, left // sum(costs))
            if not rank:
                raise ConfigurationError(
                    f"{_said(self.target)} is too little for a rank of 1 everywhere, which with the head takes"
                    f" {(head + sum(costs)) / 1e6:.6g} million. Raise it, or use importance='gradient'."
                )
            ranks = [min(rank, *_shape(matrix)) for matrix in matrices.values()]
        else:
            whole = self._gains(trainer, pl_module, list(matrices.values()))
            step = _rank_step(min(self.rank_step, self.max_rank), left // sum(costs))
            gains = [[sum(own[first : first + step]) for first in range(0, len(own), step)] for own in whole]
            blocks = allocate_ranks(gains, [step * cost for cost in costs], left)
            ranks = [min(step * count, len(own)) for count, own in zip(blocks, whole, strict=True)]
        # One rank's numbers for all of them: they may differ in the last digits.
        ranks = _lightning.broadcast(trainer, ranks)
        self._ranks = dict(zip(matrices, ranks, strict=True))
        self._trainable = head + sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        self._is_new = True
        if not self.dry_run:
            with unwrapped(trainer):
                insert_adapters(match, self._ranks, scale=self.scale)

    def _gains(self, trainer: Any, pl_module: Any, matrices: list[nn.Module]) -> list[list[float]]:
        hint = "Use importance='uniform', which needs no data."
        loader = train_dataloader(trainer)
        batches = sample_batches(loader, max(1, self.samples // _PIECE), size=_PIECE, hint=hint)
        weights: list[Any] = [matrix.weight for matrix in matrices]
        with _only_gradients_of(pl_module, weights):
            for batch in batches:
                loss = loss_of(trainer, pl_module, batch)
                if loss is None:
                    continue
                (loss / len(batches)).backward()
            gradients = [weight.grad for weight in weights]
        for metric in pl_module.modules():  # what training_step counts begins with training
            if callable(reset := getattr(metric, "reset", None)) and hasattr(metric, "compute"):
                reset()
        return [[] if g is None else rank_gains(g, self.max_rank) for g in gradients]


@contextmanager
def _only_gradients_of(pl_module: Any, weights: list[Any]) -> Iterator[None]:
    """Lets only some weights have gradients, without dropout; leaves no trace in random state, modes or gradients."""
    chosen = {id(weight) for weight in weights}
    before = [(p, p.requires_grad) for p in pl_module.parameters()]
    modes = [(module, module.training) for module in pl_module.modules()]
    devices = sorted({p.device.index for p, _ in before if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        try:
            pl_module.eval()
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, required in before:
                parameter.grad = None
                parameter.requires_grad_(required)
            for module, mode in modes:
                module.training = mode


def _shape(matrix: nn.Module) -> tuple[int, ...]:
    assert isinstance(matrix.weight, Tensor)
    return tuple(matrix.weight.shape)


def _rank_step(wanted: int, affordable: int) -> int:
    """Returns `wanted`, or less where all matrices could not have it: the largest power of two they could have."""
    return wanted if wanted <= affordable else 1 << max(0, affordable.bit_length() - 1)


def _read_target(target: Mapping[str, Any]) -> dict[str, float]:
    if not isinstance(target, Mapping):
        raise ConfigurationError(f"target must be a mapping such as {{'trainable_params_m': 0.3}}, got {target!r}.")
    read: dict[str, float] = {}
    for name, value in target.items():
        if name not in _TARGETS:
            raise ConfigurationError(f"target has {name}={value!r}, but can only limit {' and '.join(_TARGETS)}.")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigurationError(f"target {name} must be a number above 0, got {value!r}.")
        if name == "trainable_params" and value >= 1:
            raise ConfigurationError(
                f"target trainable_params is a share of all parameters and must be below 1, got {value!r}. For millions"
                " use trainable_params_m."
            )
        read[name] = float(value)
    return read


def _said(target: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in target.items())
