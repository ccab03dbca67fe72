"""Trains a network and smaller ones inside of it at once, so that one set of weights serves several budgets."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from adaptrain import _lightning
from adaptrain._lightning.training_step import wrap_training_step
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.errors import ConfigurationError
from adaptrain.execution.sandwich import SandwichLoss
from adaptrain.pruning import structure as structures
from adaptrain.pruning.elastic import SubNetwork, as_prefixes, importance_order
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import KINDS, Match
from adaptrain.pruning.importance import Scorer
from adaptrain.pruning.optimizer_state import skip_empty
from adaptrain.pruning.pruner import Pruner
from adaptrain.pruning.scorers import ScoreBy, check_importance, make_scorer
from adaptrain.pruning.shape import typical_shape
from adaptrain.pruning.structure import Structure
from adaptrain.pruning.surgery import check_optimizers, permute
from adaptrain.pruning.teacher import check_teacher

_log = logging.getLogger(__name__)

COSTS = ("latency", "flops", "params", "memory")


class ElasticTraining(AdaptiveCallback):
    """Trains smaller networks inside of the model along with it; they share its weights.

    Once, after `begin` of training, the units of every layer are put into the order of their importance, which leaves
    what the model computes as it is, and for each level a structure is settled, as `ProgressivePruning` would. From
    then on the first units of each layer are a network of their own, and every training step trains the whole model,
    the smallest network and one between, which learn to say what the model says (the sandwich rule with in-place
    distillation; Yu and Huang 2019). A step costs about as much more as those networks cost.

    It needs many steps: the quickstart's 320, from scratch, gave 55.7% (whole) to 52.7% (0.35 of the latency) on
    validation, one run, where `ProgressivePruning` ended at 70.6% at half the latency. What it buys is that the
    networks are close to each other.

    The trained model is not smaller for it. With `FamilyCheckpoint` every network is a member of the family; their
    weights are on disk once, with the model.

    Args:
        levels: What each smaller network may cost, as fractions of the model's cost, in (0, 1).
        cost: Of which cost: `"latency"` (measured), `"flops"`, `"params"` or `"memory"`.
        begin: The share of training before, in [0, 1): units are scored meanwhile.
        importance: How units are scored, as for `ProgressivePruning`.
        latency_input: The (batch, sequence) to count and measure at. None: the loader's batch size and the median of
            padded lengths.
        seed: Of which network between is trained when.
        dry_run: Record what the networks would be, and train the model alone.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, the model cannot be pruned to the
            smallest level, has no logits, or is pruned by another callback.
    """

    def __init__(
        self,
        *,
        levels: Sequence[float] = (0.75, 0.5, 0.35),
        cost: str = "latency",
        begin: float = 0.1,
        importance: ScoreBy = "taylor",
        latency_input: Sequence[int] | None = None,
        seed: int = 0,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        given = [levels] if isinstance(levels, (int, float)) else list(levels)
        if not given or not all(_is_number(level) and 0 < level < 1 for level in given):
            raise ConfigurationError(f"levels must be fractions of the model's cost, in (0, 1), got {levels!r}.")
        if cost not in COSTS:
            raise ConfigurationError(f"cost must be one of {', '.join(COSTS)}, got {cost!r}.")
        if not (_is_number(begin) and 0 <= begin < 1):
            raise ConfigurationError(f"begin must be a share of training in [0, 1), got {begin!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigurationError(f"seed must be a whole number, got {seed!r}.")
        check_importance(importance)
        shape = None if latency_input is None else tuple(latency_input)
        if shape is not None and (len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape)):
            raise ConfigurationError(
                f"latency_input must be (batch, sequence), two whole numbers, got {latency_input!r}."
            )
        self.levels = sorted(set(given), reverse=True)
        self.cost = cost
        self.begin = begin
        self.importance: ScoreBy = importance
        self.latency_input = shape
        self.seed = seed
        self._reset()

    def _reset(self) -> None:
        self._match: Match | None = None
        self._scorer: Scorer | None = None
        self._stop_scoring: Callable[[], None] | None = None
        self._pruner: Pruner | None = None
        self._table: dict[str, Any] | None = None
        self._networks: list[Structure] = []  # from the largest to the smallest
        self._loss: SandwichLoss | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage == "fit":
            self._reset()
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses, before training, what cannot be trained so."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        if any(type(other).__name__ == "ProgressivePruning" and other.target for other in trainer.callbacks):
            raise ConfigurationError(
                "ElasticTraining keeps the whole model, and ProgressivePruning cuts it. Leave one of the two out, or"
                " give no target (no budget of latency, params, flops or memory)."
            )
        match = self._match = find_family(pl_module)
        check_teacher(match.model, match, hidden=False)  # it has logits
        kinds = tuple(kind for kind in KINDS if any(layer[kind] for layer in structures.dimensions(match)))
        self._scorer = make_scorer(self.importance, match, kinds)
        self._scorer.check()
        self._pruner = Pruner(match, kinds, {self.cost: self.levels[-1]}, "auto")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens every `training_step` to the smaller networks."""
        super().on_fit_start(trainer, pl_module)
        if not self.dry_run:
            self.on_exit(self._let_go)
            self.on_exit(wrap_training_step(pl_module, lambda step: self._step(trainer, pl_module, step)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds out what smaller networks cost, and refuses a level that is out of reach."""
        assert self._pruner is not None
        assert self._scorer is not None
        assert self._match is not None
        _lightning.refuse_endless(trainer, user=type(self).__name__)
        check_optimizers(self._match, trainer.optimizers)
        if self._networks:
            self._open()
            return
        self._stop_scoring = self._scorer.start()
        self.on_exit(self._stop_scoring)
        if self._table is None:
            shape = self.latency_input or typical_shape(trainer.train_dataloader)
            table = self._pruner.build_table(shape) if _lightning.is_rank_zero(trainer) else None
            self._table = _lightning.broadcast(trainer, table)
        assert self._table is not None
        self._pruner.use_table(self._table)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Scores the units by this step."""
        skip_empty(optimizer)
        if self._scorer is not None and not self._networks:
            self._scorer.update()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sorts the units and settles the networks, when it is time."""
        if self._networks or not _lightning.at_step_boundary(trainer):
            return
        assert self._scorer is not None
        if _lightning.progress(trainer) + 1e-9 >= self.begin and self._scorer.ready:
            self._settle(trainer, pl_module)

    def family_structures(self) -> list[tuple[str, Structure]]:
        """Returns the smaller networks, from the largest to the smallest, by name; `FamilyCheckpoint` asks for them."""
        if self.dry_run:
            return []
        return [(f"elastic-{number}", structure) for number, structure in enumerate(self._networks, start=1)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the networks, and until there are some what they will be settled by."""
        scores = None if self._scorer is None or self._networks else self._scorer.state_dict()
        return {"networks": self._networks, "table": self._table, "scores": scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them; the checkpoint's weights are in order already."""
        self._networks = state_dict["networks"]
        self._table = state_dict["table"]
        if self._scorer is not None and state_dict["scores"] is not None:
            self._scorer.load_state_dict(state_dict["scores"])

    def _settle(self, trainer: Any, pl_module: Any) -> None:
        match, pruner, scorer = self._match, self._pruner, self._scorer
        assert match is not None
        assert pruner is not None
        assert scorer is not None
        scores = scorer.scores()
        flat = [value for layer in scores for values in layer.values() for value in values]
        shared = iter(_lightning.all_reduce(flat, device=pl_module.device))
        scores = [{kind: [next(shared) for _ in values] for kind, values in layer.items()} for layer in scores]
        wanted: list[Structure] = []
        have = structures.current(match)
        if _lightning.is_rank_zero(trainer):
            for level in self.levels:
                have = pruner.propose(have, scores, (1 - level) / (1 - self.levels[-1]))
                wanted.append(have)
        wanted = _lightning.broadcast(trainer, wanted)
        if not self.dry_run:
            permute(match, importance_order(match, scores), trainer.optimizers)
        self._networks = [as_prefixes(match, structure) for structure in wanted]
        if self._stop_scoring is not None:
            self._stop_scoring()
        assert pruner.table is not None
        reached = [pruner.table.fractions(structures.widths(network))[self.cost] for network in self._networks]
        if not self.dry_run:
            self._open()
        self.record(
            trainer,
            "elastic",
            old=1,
            new=1 + len(self._networks),
            reason=f"the units of every layer are in the order of importance; networks of"
            f" {', '.join(f'{share:.2f}' for share in reached)} of the {self.cost} train along from here on",
            readings={self.cost: reached},
        )

    def _open(self) -> None:
        if self.dry_run:
            return
        assert self._match is not None
        networks = [SubNetwork(self._match, structure) for structure in self._networks]
        self._loss = SandwichLoss(self._match.model, networks, seed=self.seed)

    def _step(self, trainer: Any, pl_module: Any, step: Callable[[], Any]) -> Any:
        if self._loss is None:
            return step()
        result, learned = self._loss(step, int(trainer.global_step))
        if learned is not None and trainer.loggers:
            pl_module.log("adaptrain/elastic_loss", learned, batch_size=self._loss.samples)
        return result

    def _let_go(self) -> None:
        self._loss = None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
