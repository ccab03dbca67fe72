"""Prunes a model's structure while it trains, until it fits a measured budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from adaptrain import _lightning
from adaptrain._lightning.structure import (
    averaged_copies,
    before_hook,
    forget_compiled,
    is_compiled,
    unwrapped,
    validation_follows,
)
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.errors import ConfigurationError
from adaptrain.execution.oom import release_memory
from adaptrain.policies.sparsity import read_schedule
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checkpoint import CHECKPOINT_KEY, replay
from adaptrain.pruning.events import describe_event
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import KINDS, Match
from adaptrain.pruning.importance import Scorer, Scores
from adaptrain.pruning.optimizer_state import skip_empty
from adaptrain.pruning.placement import move_out
from adaptrain.pruning.plain import uniform_kinds
from adaptrain.pruning.pruner import Pruner
from adaptrain.pruning.reconstruction import Reconstruction, Substitute, take_over
from adaptrain.pruning.scorers import ScoreBy, check_importance, make_scorer
from adaptrain.pruning.shape import read_shape, typical_shape
from adaptrain.pruning.structure import Structure
from adaptrain.pruning.surgery import check_optimizers, shrink
from adaptrain.pruning.target import read_target
from adaptrain.pruning.units import read_groups, read_round_to
from adaptrain.resources.heap import release_free_heap
from adaptrain.resources.primitive_cache import limit_primitive_cache

_log = logging.getLogger(__name__)

_WATCHED = 8  # steps before an event, for what stands in for the units that go


class ProgressivePruning(AdaptiveCallback):
    """Shrinks a model in a few events during training, so that it ends within a budget.

    At each event the least important attention heads and feed-forward neurons are cut out: matrices get smaller, and
    gradients, optimizer state, ties, hooks and running averages of the model (as `WeightAveraging` keeps them) go with
    them. What goes is decided over all layers at once, by what it is worth for what it costs; costs are a table of
    parameters, FLOPs and memory, and of latency measured on the training device. The last event measures the real
    structure against the dense one and corrects; the others leave it a tenth of a latency limit. Training that ends
    before its last event is pruned to the target at its end, with a warning. What is cut late recovers better where the
    learning rate is still high, as under warmup-stable-decay (`"wsd"`), than where it falls from the start; so Renda et
    al. 2020, arXiv:2003.02389, who rewind it.

    On a CPU in full precision oneDNN keeps few kernels from then on, in this process, unless the environment says how
    many (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`): those of shapes that hardly come back would leave memory in pieces.

    Checkpoints hold the structure; with this callback a trainer rebuilds the shapes before it loads weights, and
    `adaptrain.load_from_checkpoint` does so without a trainer.

    Args:
        target: What the final model may cost: fractions of the dense model in (0, 1] (`latency`, `params`, `flops`,
            `memory`), or `latency_ms` (milliseconds), `params_m` (millions). Several hold at once; None entries are
            no limit, and with none at all nothing is pruned.
        groups: What may go: `"heads"` (attention heads; key-value heads with their query heads where grouped) and
            `"ffn"` (feed-forward neurons); with them also `"layers"`: whole layers, where that loses less.
        importance: How units are scored: `"taylor"` (from gradients of training), `"magnitude"` (of weights),
            `"activation"` (mean size of a unit's output on tokens that are not padding), `"movement"` (whether training
            moves weights away from zero), `"random"`, or your own `(match, groups) -> scores`: for each layer a mapping
            from each group to one number, 0 or above, per unit of the dense model; called once before training to be
            checked, and at each event.
        schedule: When events come and how far each goes: an object with `plan()`, such as `CubicSchedule`, or its
            arguments as a mapping. None: `CubicSchedule()`, 6 events from 10% to 60% of training.
        round_to: FFN widths become multiples of this: `"auto"` (by device and width), a number, or a mapping by group.
        uniform: Keep all layers equally wide, so that the final model is a plain Hugging Face one that loses nothing by
            export; heads go only where the config can describe fewer (not in BERT's). It costs some quality: each
            layer gives up the same share.
        reconstruct: Let the units that stay take over what those that go have said, by least squares on what they said
            in the 8 steps before the event (see `adaptrain.pruning.reconstruction.Reconstruction`). It takes a matrix
            of inputs by inputs for each output projection, in these steps only. A model that runs through
            torch.compile is cut without, and so are heads of `nn.MultiheadAttention`. Right after the cut the model is
            nearer to what it was; that it ends better is not shown.
        latency_input: The (batch, sequence) to measure and count at. None: the loader's batch size and the median of
            the padded lengths of a few batches.
        dry_run: Record what would be cut, by the scores there are, and cut nothing.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, the model cannot be pruned, or the
            target cannot be met.
    """

    def __init__(
        self,
        *,
        target: Mapping[str, Any],
        groups: Sequence[str] = KINDS,
        importance: ScoreBy = "taylor",
        schedule: Any = None,
        round_to: str | int | Mapping[str, int] = "auto",
        uniform: bool = False,
        reconstruct: bool = False,
        latency_input: Sequence[int] | None = None,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        self.target = read_target(target)
        self.groups = read_groups(groups)
        check_importance(importance)
        self.importance: ScoreBy = importance
        self.schedule = read_schedule(schedule)
        self.round_to = read_round_to(round_to)
        for switch, value in {"uniform": uniform, "reconstruct": reconstruct}.items():
            if not isinstance(value, bool):
                raise ConfigurationError(f"{switch} must be true or false, got {value!r}.")
        if uniform and "layers" in self.groups:
            raise ConfigurationError("uniform=True does not go with 'layers' in groups. Leave one of the two out.")
        self.uniform = uniform
        self.reconstruct = reconstruct
        self.latency_input = None if latency_input is None else read_shape(latency_input)
        self._kinds = tuple(kind for kind in self.groups if kind in KINDS)  # of units, which are scored
        self._reset()

    def _reset(self) -> None:
        self._match: Match | None = None
        self._pruner: Pruner | None = None
        self._scorer: Scorer | None = None
        self._stop_scoring: Callable[[], None] | None = None
        self._reconstruction: Reconstruction | None = None
        self._report: dict[str, Any] = {}
        self._checked = False  # the optimizers' state
        self._done = 0  # events that are over
        self._waited = False  # the event that is due let a validation run first
        self._planned: Structure | None = None  # in a dry run: what would be left
        self._table: dict[str, Any] | None = None
        self._dense_metrics: dict[str, float] = {}
        self._dense_step: int | None = None

    @property
    def needs_gradients(self) -> bool:
        """Until the last event."""
        return self._scorer is not None and self._done < len(self.schedule.plan())

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Finds the model, and prepares its shapes to follow checkpoints."""
        if stage == "fit":
            self._reset()
        super().setup(trainer, pl_module, stage)
        if stage != "fit" and self.target:
            self._match = find_family(pl_module)

        def rebuild(saved: dict[str, Any]) -> None:
            for each in (pl_module, *averaged_copies(trainer, pl_module)):
                replay(each, saved)

        self.on_exit(before_hook(pl_module, "on_load_checkpoint", rebuild))
        self.on_exit(before_hook(pl_module, "on_save_checkpoint", self._note_structure))

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses, before training, models that cannot be pruned and trainers that cannot be served."""
        if not self.target:
            _log.info("ProgressivePruning has no target, so the structure stays as it is.")
            return
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        match = self._match = find_family(pl_module)
        for kind in self.groups:
            if kind == "layers" and kind not in match.family.kept:
                continue
            if kind == "layers" or not any(layer[kind] for layer in structures.dimensions(match)):
                why = f": {match.family.kept[kind]}" if kind in match.family.kept else ""
                others = tuple(other for other in self.groups if other not in (kind, "layers"))
                raise ConfigurationError(
                    f"groups names {kind!r}, but {type(match.model).__name__} has none to prune{why}."
                    + (f" Leave it out: groups={others!r}." if others else "")
                )
        if self.uniform:
            kinds = uniform_kinds(match, self._kinds)
            if kinds != self._kinds:
                _log.info("uniform=True: only %s can go, by what the config can describe.", " and ".join(kinds))
        self._scorer = make_scorer(self.importance, match, self._kinds)
        self._scorer.check()
        if self.reconstruct and is_compiled(pl_module):
            _log.info("The model is compiled, so it is cut without reconstruction.")
        elif self.reconstruct and not self.dry_run:
            self._reconstruction = Reconstruction(match, self._kinds)
            self.on_exit(self._reconstruction.stop)
        if not self.dry_run and trainer.strategy.root_device.type == "cpu" and "16" not in str(trainer.precision):
            limit_primitive_cache()  # in 16 bits matrix products are such kernels too, and slower to build

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Builds the cost table, and refuses a target that cannot be met."""
        if self._match is None or self._scorer is None:
            return
        _lightning.refuse_endless(trainer, user=type(self).__name__)
        if self._done < len(self.schedule.plan()):
            self._stop_scoring = self._scorer.start()
            self.on_exit(self._stop_scoring)
            if self._reconstruction is not None and self._reconstruction.seen:  # before the run was interrupted
                self._reconstruction.start()
        if callable(self.importance):
            self._scorer.scores()  # what is wrong with them is to show now
        self._pruner = Pruner(self._match, self.groups, self.target, self.round_to, uniform=self.uniform)
        if self._table is None:
            shape = self.latency_input or typical_shape(trainer.train_dataloader)
            _log.info("Finding out what smaller structures cost, at %d samples of %d tokens.", *shape)
            # One rank measures, undisturbed by the others, and all decide by its numbers.
            table = self._pruner.build_table(shape) if _lightning.is_rank_zero(trainer) else None
            release_memory()
            self._table = _lightning.broadcast(trainer, table)
        assert self._table is not None
        self._pruner.use_table(self._table)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Scores the units by this step: its gradients are complete and not yet clipped."""
        skip_empty(optimizer)
        if self._scorer is not None and self._done < len(self.schedule.plan()):
            self._scorer.update()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prunes where an event is due, after a complete optimizer step."""
        if self._pruner is None or self._scorer is None or not _lightning.at_step_boundary(trainer):
            return
        if not self._checked:
            assert self._match is not None
            check_optimizers(self._match, trainer.optimizers)
            self._checked = True
            self._tidy_heap(trainer, pl_module)  # before the heap has grown around what the optimizer keeps
            release_free_heap()
        plan = self.schedule.plan()
        progress = _lightning.progress(trainer)
        due = sum(event.position <= progress + 1e-9 for event in plan)
        if due <= self._done or not self._scorer.ready:
            if self._reconstruction is not None and self._done < len(plan):
                per_step = progress / max(1, trainer.global_step)
                if plan[self._done].position - progress <= _WATCHED * per_step:
                    self._reconstruction.start()
            return
        if not self._waited and _anywhere(validation_follows(trainer), pl_module):
            self._waited = True  # validation first: it shows a model that has recovered, not one just cut
            return
        self._prune(trainer, pl_module, due, progress)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Gives back what is free on the host: larger batches do not fit between what a pruned model holds."""
        if self._scatters(pl_module):
            release_free_heap()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the metrics of the dense model: those of the last validation before the first event."""
        if self._pruner is not None and self._done == 0 and not trainer.sanity_checking:
            self._dense_metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._dense_step = int(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Prunes what training ended too early for, and measures the final model against a dense one."""
        if self._pruner is None:
            return
        assert self._scorer is not None
        events = len(self.schedule.plan())
        if self._done < events and self._scorer.ready:
            _log.warning(
                "Training ended before pruning event %d of %d; the rest is pruned now, without training to recover.",
                self._done + 1,
                events,
            )
            self._prune(trainer, pl_module, events, _lightning.progress(trainer), at_end=True)
        release_memory()  # models are built to be measured
        report = self._pruner.report() if _lightning.is_rank_zero(trainer) else None
        self._report = _lightning.broadcast(trainer, report)
        self._report["dense"] |= {"metrics": self._dense_metrics, "step": self._dense_step}
        self._report["events"] = self._done

    def report(self) -> dict[str, Any]:
        """Returns what came of it, after fit.

        Returns:
            `dense` and `final`, each with `params`, `flops`, `latency_ms` (measured in turns at the end of fit, None
            where there was no memory for that) and `size_bytes`; in `dense` also `metrics` of the last validation
            before the first event, empty where there was none, and its `step`. `latency_input`, `constraints` (each
            `name`, `limit`, `value`, `met`) and the number of `events`. Empty without a target, and before it ends.
        """
        return self._report

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Notes the structure beside the weights."""
        self._note_structure(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Returns where pruning stands, and the numbers it decides by: plain Python, and tensors right before a cut."""
        return {
            "done": self._done,
            "waited": self._waited,
            "planned": self._planned,
            "table": self._table,
            "scores": None if self._scorer is None else self._scorer.state_dict(),
            "reconstruction": None if self._reconstruction is None else self._reconstruction.state_dict(),
            "dense_metrics": self._dense_metrics,
            "dense_step": self._dense_step,
            "structure": None if self._match is None else structures.record(self._match),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over where a run stood."""
        self._done = state_dict["done"]
        self._waited = state_dict["waited"]
        self._planned = state_dict["planned"]
        self._table = state_dict["table"]
        self._dense_metrics = state_dict["dense_metrics"]
        self._dense_step = state_dict["dense_step"]
        if self._scorer is not None and state_dict["scores"] is not None:
            self._scorer.load_state_dict(state_dict["scores"])
        if self._reconstruction is not None and state_dict.get("reconstruction") is not None:
            self._reconstruction.load_state_dict(state_dict["reconstruction"])

    def _scatters(self, pl_module: Any) -> bool:
        """Whether training leaves the host's heap in pieces: a pruned model's tensors differ in size in every layer."""
        return self._done > 0 and not self.dry_run and pl_module.device.type == "cpu"

    def _tidy_heap(self, trainer: Any, pl_module: Any) -> None:
        """On the host: moves out of the heap what stays from step to step."""
        if not self.dry_run and pl_module.device.type == "cpu":
            move_out((pl_module, *averaged_copies(trainer, pl_module)), trainer.optimizers)

    def _note_structure(self, checkpoint: dict[str, Any]) -> None:
        if self._match is not None:
            checkpoint[CHECKPOINT_KEY] = structures.record(self._match)

    def _prune(self, trainer: Any, pl_module: Any, due: int, progress: float, *, at_end: bool = False) -> None:
        """Brings the structure to where it is to be after the first `due` events."""
        match, pruner, plan = self._match, self._pruner, self.schedule.plan()
        assert match is not None
        assert pruner is not None
        scores = self._scores(pl_module)
        have = self._planned or structures.current(match)
        reconstruction = self._watched(pl_module)
        answer: tuple[Structure, float | None, dict[tuple[int, str], Substitute]] | None = None
        if _lightning.is_rank_zero(trainer):
            share = plan[due - 1].share
            if due == len(plan) and pruner.measures:
                release_memory()  # models are built to be measured, and what a step has used is free
            chosen, took = (
                pruner.settle(have, scores) if due == len(plan) else (pruner.propose(have, scores, share), None)
            )
            answer = chosen, took, {} if reconstruction is None else reconstruction.solve(chosen)
        wanted, measured, substitutes = _lightning.broadcast(trainer, answer)
        if self._reconstruction is not None:
            self._reconstruction.stop()
        first, self._done, self._waited = self._done + 1, due, False
        if due == len(plan) and self._stop_scoring is not None:
            self._stop_scoring()
        if wanted == have:
            return
        if self.dry_run:
            self._planned = wanted
        else:
            self.announce(trainer, "structure", at_end=at_end)
            release_free_heap()  # what steps have used: copies are not to come on top of it
            with unwrapped(trainer):
                take_over(match, substitutes)
                shrink(match, wanted, trainer.optimizers)
                for copied in map(find_family, averaged_copies(trainer, pl_module)):
                    take_over(copied, substitutes)
                    shrink(copied, wanted)
                self._tidy_heap(trainer, pl_module)
            forget_compiled(pl_module)
            release_memory()  # the blocks of the old sizes fit nothing that comes
        old, new, reason, readings = describe_event(
            pruner, have, wanted, first=first, event=due, plan=plan, progress=progress, measured=measured
        )
        if substitutes:
            readings["cut_error"] = fmean(made.lost for made in substitutes.values())
            readings["reconstruction_error"] = fmean(made.left for made in substitutes.values())
        self.record(trainer, "structure", old=old, new=new, reason=reason, readings=readings)

    def _watched(self, pl_module: Any) -> Reconstruction | None:
        """Returns what was seen for the reconstruction, summed over the ranks; None where one of them saw nothing."""
        found = self._reconstruction
        if found is None or not _lightning.all_reduce([float(found.seen)], op="min", device=pl_module.device)[0]:
            return None
        found.reduce(_lightning.sum_over_ranks)
        return found

    def _scores(self, pl_module: Any) -> Scores:
        """Returns the scores, the same on every rank."""
        assert self._scorer is not None
        scores = self._scorer.scores()
        flat = [value for layer in scores for values in layer.values() for value in values]
        shared = iter(_lightning.all_reduce(flat, device=pl_module.device))
        return [{kind: [next(shared) for _ in values] for kind, values in layer.items()} for layer in scores]


def _anywhere(flag: bool, pl_module: Any) -> bool:
    """Whether `flag` is true on any rank: validation by the clock may come on one and not yet on another."""
    return bool(_lightning.all_reduce([float(flag)], op="max", device=pl_module.device)[0])
