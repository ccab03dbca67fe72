"""The arms of benchmark_pruning.py: how each of them trains one model, and the peers it is compared with."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from quiet import be_quiet, quiet_trainer
from torch import nn

import adaptrain
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.oom import release_memory
from adaptrain.nlp.datamodules import TextDataModule
from adaptrain.nlp.modules import TextClassifier
from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checks import projections
from adaptrain.pruning.families import find_family
from adaptrain.pruning.importance import magnitude_scores
from adaptrain.pruning.shape import typical_shape
from adaptrain.pruning.surgery import shrink
from adaptrain.resources.peak import PeakMemory

GIB = 2**30
SCORED_BATCHES = 20  # whose gradients Torch-Pruning scores by: about as many optimizer steps as ours remembers
NEAR, FITS = 0.94, 0.99  # of a latency target: a candidate in between counts as there, with room for noise


@dataclass(frozen=True)
class Job:
    """One arm with one seed.

    Args:
        arm: The method, and after an @ the latency it aims at as a fraction of the dense model's, as `ours@0.5`.
        seed: Of the classifier's head, the order of the samples and dropout; arms of one seed share all three.
        model: The folder of the pretrained model.
        data: The folder with train.tsv, dev.tsv and test.tsv.
        epochs: Passes over the training data.
        limit: Samples of each split; None: all.
        batch_size: Samples in a step.
        lr: The peak of the schedule.
        threads: Torch's.
        precision: Of training, as Lightning names it; latencies are measured in full precision.
        micro_batch_size: Samples at once, sorted by length inside their batch, in every arm; None: whole batches.
        schedule: Of the rate, as the text modules name it.
    """

    arm: str
    seed: int
    model: str
    data: str
    epochs: int
    limit: int | None
    batch_size: int
    lr: float
    threads: int
    precision: Any
    micro_batch_size: int | None
    schedule: str

    @property
    def method(self) -> str:
        return self.arm.partition("@")[0]

    def unknown(self) -> str | None:
        """Returns what is wrong with the arm's name, if anything is."""
        base, *options = self.method.split("+")
        if base not in CALLBACKS:
            return f"There is no arm {self.arm!r}. Methods are {', '.join(CALLBACKS)}."
        known = {*OPTIONS, *COMPANIONS} if base == "ours" else set()
        if odd := [name for name in options if name not in known]:
            return f"{base} has no option {odd[0]!r}. Options of ours are {', '.join((*OPTIONS, *COMPANIONS))}."
        return None

    @property
    def target(self) -> float:
        return float(self.arm.partition("@")[2] or 1.0)


class Watch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Any:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class TimedPruning(adaptrain.ProgressivePruning):
    """Ours, with a watch on what it costs."""

    def __init__(self, watch: Watch, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._watch = watch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with self._watch("table"):
            super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        with self._watch("scoring"):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self._watch("events"):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with self._watch("report"):
            super().on_train_end(trainer, pl_module)


class TorchPruning(pl.Callback):
    """Torch-Pruning after the first epoch: one cut to the target, then a new optimizer, on the same schedule.

    It takes a ratio and not a latency, so the ratio is searched for, each candidate measured against the dense model.
    """

    def __init__(self, watch: Watch, job: Job, shape: tuple[int, int]) -> None:
        self.watch = watch
        self.job = job
        self.shape = shape
        self.said: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch != 0:
            return
        with self.watch("scoring"):
            gradients = self._gradients(trainer, pl_module) if "taylor" in self.job.method else None
        with self.watch("events"):
            model, self.said = self._search(pl_module.model, gradients)
        pl_module.model = model.train()
        trainer.strategy.setup_optimizers(trainer)

    def _gradients(self, trainer: Any, pl_module: Any) -> list[torch.Tensor | None]:
        pl_module.zero_grad()
        for number, batch in enumerate(trainer.train_dataloader):
            if number == SCORED_BATCHES:
                break
            pl_module.model(**batch).loss.backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.model.parameters()]
        pl_module.zero_grad()
        return gradients

    def _search(self, model: Any, gradients: Any) -> tuple[Any, dict[str, Any]]:
        twin = find_family(model).dense_twin()
        inputs = cost.example_inputs(model, *self.shape)
        best: tuple[float, Any, dict[str, Any]] | None = None
        count = 0
        # Ranked over all layers it never empties a layer, and at high ratios skips layers instead of cutting them; by
        # layer it reaches further.
        for scope in ("global", "by layer"):
            low, high = 0.0, 1.0
            for _ in range(7):
                ratio, count = (low + high) / 2, count + 1
                candidate = torch_pruned(model, gradients, ratio, scope=scope)
                used = latency_ratio(twin, candidate, inputs, turns=2) / self.job.target
                # The nearest of those that fit, else the nearest.
                if best is None or (used > FITS, abs(used - FITS)) < (best[0] > FITS, abs(best[0] - FITS)):
                    best = used, candidate, {"ratio": ratio, "scope": scope}
                if NEAR <= used <= FITS:
                    break
                low, high = (ratio, high) if used > FITS else (low, ratio)
            assert best is not None
            if best[0] <= FITS:
                break
        return best[1], {**best[2], "candidates": count}


def torch_pruned(model: Any, gradients: Any, ratio: float, *, scope: str) -> Any:
    """Returns a copy of a BERT classifier from which Torch-Pruning cut `ratio` of the heads and FFN neurons."""
    import torch_pruning as tp

    pruned = copy.deepcopy(model).eval()
    for parameter, gradient in zip(pruned.parameters(), gradients or [], strict=False):
        parameter.grad = None if gradient is None else gradient.clone()
    layers: Any = find_family(pruned).layers
    attentions: list[Any] = [layer.attention.self for layer in layers]
    heads = {m: a.num_attention_heads for a in attentions for m in (a.query, a.key, a.value)}
    cut = {*heads, *(layer.intermediate.dense for layer in layers)}
    kept: list[nn.Module] = [
        m for m in pruned.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm)) and m not in cut
    ]
    taylor = gradients is not None
    importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        pruned,
        cost.example_inputs(pruned, 2, 8),  # pyright: ignore[reportArgumentType]
        importance=importance,
        global_pruning=scope == "global",
        isomorphic=True,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        ignored_layers=kept,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        output_transform=lambda output: output.logits.sum(),
        root_module_types=[nn.Linear],
    )
    pruner.step()
    for attention in attentions:
        attention.all_head_size = attention.query.out_features
        attention.num_attention_heads = attention.all_head_size // attention.attention_head_size
    pruned.zero_grad()
    return pruned


def truncated(model: Any, target: float, shape: tuple[int, int]) -> tuple[Any, str]:
    """Returns a small model of a latency: the first layers of the pretrained one, their FFN narrowed by magnitude.

    As few layers as exceed the target, and of their neurons as many as fit; no pruning follows.

    Source of keeping the first layers: Sajjad et al. 2023, "On the effect of dropping layers of pre-trained
    transformer models".
    """
    twin, inputs = find_family(model).dense_twin(), cost.example_inputs(model, *shape)
    depth = len(find_family(model).layers)

    def build(layers: int, eighths: int) -> Any:
        small = copy.deepcopy(model)
        match = find_family(small)
        match.keep_layers(range(layers))
        small.config.num_hidden_layers = layers
        scores, keep = magnitude_scores(match, ("heads", "ffn")), structures.dense(match)
        for layer, kept in enumerate(keep):
            best = sorted(kept["ffn"], key=lambda unit, s=scores[layer]["ffn"]: -s[unit])
            kept["ffn"] = sorted(best[: len(best) * eighths // 8])
        shrink(match, keep)
        return small

    fits: tuple[Any, str] | None = None
    for layers in range(1, depth + 1):
        for eighths in range(2, 9):
            small = build(layers, eighths)
            if latency_ratio(twin, small, inputs, turns=2) > target:
                break
            fits = small, f"first {layers} of {depth} layers, {eighths}/8 of the FFN neurons"
        else:
            continue
        break
    if fits is None:
        raise SystemExit(f"small@{target}: even one layer with a quarter of its neurons is slower than the target.")
    return fits


def latency_ratio(dense: Any, other: Any, inputs: Any, *, turns: int = 8) -> float:
    """Returns the latency of a model as a fraction of the dense one's: both in turns, the median over `turns`.

    Each turn measures copies, since where weights lie in memory changes their time by several percent.
    """
    rough = cost.measure_latency({"dense": dense}, inputs, repeats=2)["dense"]
    models, repeats = {"dense": dense, "other": other}, max(1, cost.repeats_for(rough) // 2)
    each = [cost.measure_latency(models, inputs, repeats=repeats, copies=1) for _ in range(turns)]
    return statistics.median(times["other"] / times["dense"] for times in each)


def run(job: Job) -> dict[str, Any]:
    """Trains one arm and says what came of it."""
    be_quiet(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        return _run(job, folder)


def prepare(job: Job) -> tuple[Any, Any]:
    """Returns the data, set up, and the module that is to be trained."""
    pl.seed_everything(job.seed, verbose=False)
    limits: dict[str, Any] = {f"limit_{split}": job.limit for split in ("train", "val", "test")}
    files = {f"{name}_file": f"{job.data}/{file}.tsv" for name, file in (("train", "train"), ("val", "dev"))}
    data = TextDataModule(
        **files,
        test_file=f"{job.data}/test.tsv",
        tokenizer=job.model,
        batch_size=job.batch_size,
        seed=job.seed,
        **limits,
    )
    data.setup("fit")
    module: Any = TextClassifier(data=data, name_or_path=job.model, lr=job.lr, schedule=job.schedule)
    return data, module


def make_trainer(job: Job, callbacks: list[Any], folder: str, **settings: Any) -> Any:
    """Returns a quiet trainer for the job."""
    if job.micro_batch_size is not None:
        callbacks = [
            *callbacks,
            adaptrain.BatchSizeController(micro_batch_size=job.micro_batch_size, split_by="tokens"),
        ]
    usual: dict[str, Any] = {"precision": job.precision, "max_epochs": job.epochs, "callbacks": callbacks}
    return quiet_trainer(folder, **(usual | settings))


def _run(job: Job, folder: str) -> dict[str, Any]:
    data, module = prepare(job)
    dense = find_family(module).dense_twin()
    shape = typical_shape(data.train_dataloader())
    watch, note = Watch(), ""
    started = time.perf_counter()
    if job.method == "small":
        with watch("table"):
            module.model, note = truncated(module.model, job.target, shape)
    callbacks = CALLBACKS[job.method.partition("+")[0]](job, watch, shape)
    trainer = make_trainer(job, callbacks, folder)
    pl.seed_everything(job.seed, verbose=False)
    with PeakMemory() as memory:
        trainer.fit(module, data)
        peak = memory.read()
    wall = time.perf_counter() - started - watch.seconds.get("teacher", 0.0)
    dev = trainer.validate(module, data, verbose=False)[0]["val/accuracy"]
    test = trainer.test(module, data, verbose=False)[0]["test/accuracy"]
    if said := next((c.said for c in callbacks if isinstance(c, TorchPruning)), None):
        note = ", ".join(f"{name} {value}" for name, value in said.items())
    events = sum(decision.knob == "structure" for decision in decision_log(trainer))
    return {
        "arm": job.arm,
        "seed": job.seed,
        "dev": dev,
        "test": test,
        "latency": latency_ratio(dense, module.model, cost.example_inputs(module.model, *shape)),
        "latency_input": list(shape),
        "params": cost.count_params(module.model),
        "widths": structures.current_widths(find_family(module)),
        "zeros": _zeros(module.model),
        "wall_s": wall,
        "spent_s": watch.seconds,
        "events": events or int(bool(said) or job.method == "lightning"),
        "steps": trainer.global_step,
        "peak_gib": peak / GIB,
        "note": note,
    }


def _prunable(model: Any) -> list[Any]:
    """Returns the projections that can be pruned."""
    match = find_family(model)
    return [layer.get_submodule(path) for layer in match.layers for path in projections(match.family)]


def _zeros(model: Any) -> float:
    """Returns the share of zeros in the projections that can be pruned."""
    weights = [module.weight for module in _prunable(model)]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


OPTIONS: dict[str, dict[str, Any]] = {
    "layers": {"groups": ("heads", "ffn", "layers")},
    "early": {"schedule": adaptrain.CubicSchedule(begin=0.05, end=0.4, events=6)},
    "late": {"schedule": adaptrain.CubicSchedule(begin=0.3, end=0.7, events=6)},
    "linear": {"schedule": adaptrain.LinearSchedule(begin=0.1, end=0.6, events=6)},
    "oneshot": {"schedule": adaptrain.OneShotSchedule(at=1 / 3)},
    "magnitude": {"importance": "magnitude"},
    "activation": {"importance": "activation"},
    "movement": {"importance": "movement"},
    "random": {"importance": "random"},
    "reconstruct": {"reconstruct": True},
}


def _taught(job: Job, watch: Watch) -> Any:
    """Distillation from a dense model that is fine-tuned before."""
    with watch("teacher"), tempfile.TemporaryDirectory() as folder:
        data, module = prepare(job)
        trainer = make_trainer(job, [], folder)
        pl.seed_everything(job.seed, verbose=False)
        trainer.fit(module, data)
        model = module.model
        model.zero_grad()
        del trainer, module, data
        release_memory()  # of the pruned run the peak is asked
    return adaptrain.Distillation(teacher=model, weight=0.9)  # chosen on the dev split


COMPANIONS: dict[str, Callable[[Job, Watch], Any]] = {
    "distillation": lambda job, watch: adaptrain.Distillation(),
    "teacher": _taught,
    "rate": lambda job, watch: adaptrain.LearningRateController(align=False, cap=False, plateau=False),  # and guard
    "tokens": lambda job, watch: adaptrain.BatchSizeController(split_by="tokens"),
}


def _ours(job: Job, watch: Watch, shape: tuple[int, int]) -> list[Any]:
    named = job.method.split("+")[1:]
    arguments = {key: value for name in named for key, value in OPTIONS.get(name, {}).items()}
    pruning = TimedPruning(watch, target={"latency": job.target}, latency_input=shape, **arguments)
    return [pruning, *(COMPANIONS[name](job, watch) for name in named if name in COMPANIONS)]


class EncoderPruning(ModelPruning):
    """Lightning's callback on the encoder's projections.

    Its default is every weight there is; by global L1 that is all of the pooler, and no training brings it back.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._parameters_to_prune = [(module, "weight") for module in _prunable(pl_module.model)]
        super().setup(trainer, pl_module, stage)


def _lightning(job: Job, watch: Watch, shape: tuple[int, int]) -> list[Any]:
    """As much to zero as the target cuts, after the first epoch, by global L1."""
    return [
        EncoderPruning(
            "l1_unstructured",
            amount=1 - job.target,
            apply_pruning=lambda epoch: epoch == 0,
            use_lottery_ticket_hypothesis=False,
        )
    ]


CALLBACKS: dict[str, Callable[[Job, Watch, tuple[int, int]], list[Any]]] = {
    "dense": lambda job, watch, shape: [],
    "small": lambda job, watch, shape: [],
    "ours": _ours,
    "tp-taylor": lambda job, watch, shape: [TorchPruning(watch, job, shape)],
    "tp-magnitude": lambda job, watch, shape: [TorchPruning(watch, job, shape)],
    "lightning": _lightning,
}
