"""What benchmark_learning_rate.py trains, and the methods it is trained with."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner.tuning import Tuner
from quiet import be_quiet, quiet_trainer

import adaptrain
from adaptrain.nlp.datamodules import CorpusDataModule, TextDataModule
from adaptrain.nlp.modules import CausalLanguageModel, TextClassifier
from adaptrain.policies.batch_size import Proposal
from adaptrain.policies.global_batch_size import GlobalBatchSizePolicy

SCHEDULES = ("constant", "cosine", "wsd", "linear")
FACTORS = ("align", "cap", "plateau", "batch", "recover", "guard")
ADAM_ALONE = ("schedulefree", "prodigy")  # methods that bring an AdamW of their own
PEERS = ("plateau", "greedy", "finder", "schedulefree", "prodigy")
SET_THEIR_RATE = ("finder", "prodigy")  # whatever rate was typed
WARMUP = 0.05  # share of the run, of every schedule and of schedule-free
_FOLDER = tempfile.TemporaryDirectory()


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Args:
        name: `"language_model"`, `"classifier"` (both small, from scratch, on the embedded corpus), `"wide_classifier"`
            and `"long_language_model"` (their like, to develop on), or `"encoder"` (pretrained, fine-tuned).
        steps: Optimizer steps of a run.
        batch_size: Samples of a step.
        rates: The learning rates that are typed.
        model: The encoder's folder.
        data: The folder with the encoder's train.tsv, dev.tsv and test.tsv.
        precision: Of training, as Lightning names it.
        optimizer: `"adamw"`, or `"sgd"`: with a momentum of 0.9 and without weight decay.
    """

    name: str
    steps: int
    batch_size: int
    rates: tuple[float, ...]
    model: str | None = None
    data: str | None = None
    precision: Any = "32-true"
    optimizer: str = "adamw"

    @property
    def has_accuracy(self) -> bool:
        return "language" not in self.name

    def datamodule(self, seed: int) -> Any:
        size: dict[str, Any] = {"batch_size": self.batch_size, "eval_batch_size": 64, "seed": seed}
        if self.name == "encoder":
            assert self.data is not None
            folder = Path(self.data)
            files = {f"{split}_file": folder / f"{name}.tsv" for split, name in _FILES}
            limits = {"limit_train": 768, "limit_val": 400}
            data: Any = TextDataModule(tokenizer=self.model, max_length=32, **limits, **files, **size)
        elif self.name == "language_model":
            data = CorpusDataModule(task="language_model", vocab_size=1024, max_length=64, **_LIMITS, **size)
        elif self.name == "long_language_model":
            data = CorpusDataModule(task="language_model", vocab_size=512, max_length=96, **_LIMITS, **size)
        else:
            data = CorpusDataModule(vocab_size=2048, max_length=48, **size)
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        return data

    def module(self, data: Any, *, lr: float, schedule: str) -> Any:
        module = self._module(data, lr=lr, schedule=schedule)
        if self.optimizer == "sgd":
            _use_sgd(module)
        return module

    def _module(self, data: Any, *, lr: float, schedule: str) -> Any:
        options: dict[str, Any] = {"data": data, "lr": lr, "schedule": schedule, "warmup": WARMUP}
        if self.name == "encoder":
            return TextClassifier(name_or_path=self.model, **options)
        wide = self.name in ("wide_classifier", "long_language_model")
        options |= {"hidden_size": 96 if wide else 64, "num_hidden_layers": 3 if wide else 2}
        if self.has_accuracy:
            return TextClassifier(intermediate_size=256, **options)
        return CausalLanguageModel(intermediate_size=192, **options)


def _use_sgd(module: Any) -> None:
    """Puts SGD where a module has AdamW, under the same schedule."""
    own = module.configure_optimizers

    def configure() -> Any:
        made = own()
        groups = [{"params": g["params"], "lr": g["initial_lr"]} for g in made["optimizer"].param_groups]
        return _scheduled(made, torch.optim.SGD(groups, momentum=0.9), _shape(made))

    module.configure_optimizers = configure


def _shape(made: dict[str, Any]) -> Callable[[int], float]:
    """Returns the schedule of what a module's `configure_optimizers` made, as a multiplier by step."""
    return made["lr_scheduler"]["scheduler"].lr_lambdas[0]


def _scheduled(made: dict[str, Any], optimizer: Any, shape: Callable[[int], float]) -> dict[str, Any]:
    """Puts an optimizer at its highest rate, under the schedule `shape`, where `configure_optimizers` made another."""
    made["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    return made | {"optimizer": optimizer}


_FILES = (("train", "train"), ("val", "dev"), ("test", "test"))
_LIMITS = {"limit_val": 512, "limit_test": 1024}


def decades(low: float, high: float, count: int = 7) -> tuple[float, ...]:
    """Returns `count` rates in equal steps of the logarithm."""
    ratio = (high / low) ** (1 / (count - 1))
    return tuple(float(f"{low * ratio**index:.2g}") for index in range(count))


def make_task(
    name: str,
    *,
    model: str | None,
    data: str | None,
    steps: int | None,
    batch_size: int | None = None,
    precision: str = "32-true",
    optimizer: str = "adamw",
) -> Task:
    """Returns a task by its name; `steps` and `batch_size` replace its own, and rates for SGD those for AdamW."""
    usual = {
        "language_model": (300, 16, decades(3e-5, 1e-1)),
        "classifier": (300, 32, decades(1e-5, 3e-2)),
        "encoder": (144, 16, decades(1e-6, 3e-3)),
        "long_language_model": (400, 16, decades(3e-5, 1e-1)),
        "wide_classifier": (400, 16, decades(1e-5, 3e-2)),
    }
    own_steps, own_batch_size, rates = usual[name]
    rates = decades(1e-3, 3.0) if optimizer == "sgd" else rates
    return Task(name, steps or own_steps, batch_size or own_batch_size, rates, model, data, precision, optimizer)


# Methods ---------------------------------------------------------------------------------------------------------


def known_methods() -> tuple[str, ...]:
    """Returns the usual methods, to which factors may be left out."""
    return (*SCHEDULES, *PEERS, *(f"{schedule}+ours" for schedule in SCHEDULES))


def controller(method: str) -> Any:
    """Returns the controller a method names after its schedule's +, or None.

    Raises:
        ValueError: There is no such method.
    """
    base, _, ours = method.partition("+")
    if base not in (*SCHEDULES, *PEERS):
        raise ValueError(f"There is no method {method!r}. Methods are {', '.join(known_methods())}.")
    if not ours:
        return None
    first, *without = ours.split("-")
    only = without[:1] == ["only"]
    named = without[1:] if only else without
    if first != "ours" or base in PEERS or any(name not in FACTORS for name in named):
        raise ValueError(f"{method!r} is not SCHEDULE+ours, followed by -FACTOR or -only-FACTOR of {FACTORS}.")
    off = [name for name in FACTORS if (name not in named) == only] if named else []
    switches: dict[str, Any] = {name: False for name in off if name != "batch"}
    if "batch" in off:
        switches["batch_scaling"] = None
    return adaptrain.LearningRateController(**switches)


class _Mode(pl.Callback):
    """Schedule-free optimizers train at other weights than they are evaluated at."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].train()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].eval()


class _Greedy(pl.Callback):
    """Shows GreedyLR every step's training loss, as its documentation does."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from transformers.optimization import get_greedy_schedule

        # The documented defaults but for the lower bound, 1e-3, which is above the rates typed here.
        self.schedule = get_greedy_schedule(trainer.optimizers[0], smooth=True, min_lr=1e-7)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.schedule.step(float(outputs["loss"]))


def _optimizer_of(method: str, module: Any, *, lr: float, steps: int) -> Any:
    """Replaces a module's `configure_optimizers` by a peer's; keeps the groups, decays and betas."""
    own = module.configure_optimizers

    def configure() -> Any:
        optimizer = own()["optimizer"]
        for group in optimizer.param_groups:
            group["lr"] = group.pop("initial_lr")  # the module's schedule has set it for its first step
        if method == "schedulefree":
            from schedulefree import AdamWScheduleFree

            groups = [{k: g[k] for k in ("params", "weight_decay")} for g in optimizer.param_groups]
            return AdamWScheduleFree(groups, lr=lr, warmup_steps=round(WARMUP * steps))
        if method == "prodigy":
            from prodigyopt import Prodigy

            groups = [{k: g[k] for k in ("params", "weight_decay")} for g in optimizer.param_groups]
            prodigy = Prodigy(groups, lr=1.0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(prodigy, T_max=steps)
            return {"optimizer": prodigy, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        if method == "plateau":
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            every = max(1, steps // 20)
            plateau = {"scheduler": schedule, "interval": "step", "frequency": every, "monitor": "val/loss"}
            return {"optimizer": optimizer, "lr_scheduler": plateau}
        return optimizer  # greedy, and the finder's probing run

    return configure


# Runs ------------------------------------------------------------------------------------------------------------


@functools.cache
def _data(task: Task, seed: int) -> Any:
    return task.datamodule(seed)


def run(task: Task, method: str, rate: float | None, seed: int, fault: str | None = None) -> dict[str, Any]:
    """Trains once and returns the losses (nats; not finite: the run diverged) and accuracies at the end."""
    be_quiet(threads=1)
    base = method.partition("+")[0]
    data = _data(task, seed)
    lr = 1e-3 if rate is None else rate
    pl.seed_everything(seed, verbose=False)
    module = task.module(data, lr=lr, schedule=base if base in SCHEDULES else "cosine")
    callbacks: list[Any] = [*_fault_callbacks(fault, task, module), *filter(None, [controller(method)])]
    found: dict[str, Any] = {}
    if base == "finder":
        found["found_lr"] = _find_rate(task, module, data)
    elif base in PEERS:
        module.configure_optimizers = _optimizer_of(base, module, lr=lr, steps=task.steps)
        callbacks += [_Mode()] if base == "schedulefree" else [_Greedy()] if base == "greedy" else []
    trainer = _trainer(task, callbacks, validate=base == "plateau")
    pl.seed_everything(seed, verbose=False)
    began, error = time.perf_counter(), None
    try:
        trainer.fit(module, data)
    except RuntimeError as stopped:
        if "Training diverged" not in str(stopped):
            raise
        error = str(stopped)
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {"task": task.name, "method": method, "rate": rate, "seed": seed, "fault": fault}
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        loss, accuracy = evaluate(module, loader)
        result[f"{split}_loss"], result[f"{split}_accuracy"] = loss, accuracy
    ours = next((c for c in callbacks if isinstance(c, adaptrain.LearningRateController)), None)
    result |= {"multiplier": getattr(ours, "multiplier", None), "seconds": seconds, "error": error}
    return result | found


def untrained(task: Task, seed: int) -> dict[str, Any]:
    """Returns what the model came to before training: a diverged run is worth no more."""
    be_quiet()
    data = _data(task, seed)
    pl.seed_everything(seed, verbose=False)
    loss, accuracy = evaluate(task.module(data, lr=1e-3, schedule="constant"), data.test_dataloader())
    return {"task": task.name, "method": "untrained", "seed": seed, "test_loss": loss, "test_accuracy": accuracy}


def _trainer(task: Task, callbacks: list[Any], *, validate: bool = False) -> Any:
    validation: dict[str, Any] = {"limit_val_batches": 0}
    if validate:
        validation = {"val_check_interval": max(1, task.steps // 20)}
    return quiet_trainer(
        _FOLDER.name,
        max_steps=task.steps,
        max_epochs=-1,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        precision=task.precision,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        **validation,
    )


def _find_rate(task: Task, module: Any, data: Any) -> float | None:
    """Runs Lightning's finder with its defaults and sets the rate it suggests; its 100 steps are not charged."""
    module.lr = 1e-3
    cosine = module.configure_optimizers
    module.configure_optimizers = _optimizer_of("finder", module, lr=1e-3, steps=task.steps)
    finder = Tuner(_trainer(task, [])).lr_find(module, datamodule=data, update_attr=False)
    found = None if finder is None else finder.suggestion()
    module.configure_optimizers = cosine
    module._optimizer["lr"] = found or 1e-3
    return found


@torch.no_grad()
def evaluate(module: Any, loader: Any) -> tuple[float, float | None]:
    """Returns the mean loss over samples (or predicted tokens) and the accuracy, None for a language model."""
    module.eval()
    total, weight, right, classes = 0.0, 0, 0, False
    for batch in loader:
        output = module.model(**batch)
        labels = batch["labels"]
        classes = labels.ndim == 1
        count = len(labels) if classes else int((labels[:, 1:] != -100).sum())
        total += float(output.loss) * count
        weight += count
        if classes:
            right += int((output.logits.argmax(-1) == labels).sum())
    accuracy = right / weight if classes else None
    return total / weight, accuracy


# Faults ----------------------------------------------------------------------------------------------------------


def _fault_callbacks(fault: str | None, task: Task, module: Any) -> list[Any]:
    middle = task.steps // 2
    makers: dict[str | None, Callable[[], list[Any]]] = {
        None: list,
        "nan": lambda: [_NotANumber(middle)],
        "spike": lambda: [_RateSpike(module, middle, steps=20, factor=10.0)],
        "batch": lambda: [
            adaptrain.BatchSizeController(micro_batch_size=task.batch_size, global_batch_size=_Jump(task.batch_size))
        ],
        "prune": lambda: [
            adaptrain.ProgressivePruning(
                target={"flops": 0.5},
                schedule=adaptrain.OneShotSchedule(at=0.5),
                groups=("heads", "ffn"),
            )
        ],
    }
    return makers[fault]()


class _Jump(GlobalBatchSizePolicy):
    """Four times the samples in every step from half of the run on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def next(self, size: int, *, progress: float, unit: int) -> Proposal | None:
        if progress < 0.5 or size != self.size:
            return None
        return Proposal(size, 4 * size, "the benchmark asks for it", {})


class _NotANumber(pl.Callback):
    """Makes the hidden states of one batch not a number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        embedding = pl_module.model.get_input_embeddings()
        self.handle = embedding.register_forward_hook(lambda *a: a[-1] * math.nan)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (handle := getattr(self, "handle", None)) is not None:
            handle.remove()
            del self.handle


class _RateSpike(pl.Callback):
    """Multiplies the schedule by `factor` for some steps, as a mistake in a schedule would."""

    def __init__(self, module: Any, step: int, *, steps: int, factor: float) -> None:
        own = module.configure_optimizers

        def configure() -> Any:
            made = own()
            shape = _shape(made)

            def spiked(count: int) -> float:
                return shape(count) * (factor if step <= count < step + steps else 1.0)

            for group in made["optimizer"].param_groups:
                group["lr"] = group["initial_lr"]
            return _scheduled(made, made["optimizer"], spiked)

        module.configure_optimizers = configure


def fit_endlessly(task: Task, method: str, steps: int, turn: Any) -> None:
    """Trains for some steps with a callback that is called first; for timing."""
    be_quiet()
    pl.seed_everything(0, verbose=False)
    data = _data(task, 0)
    module = task.module(data, lr=sorted(task.rates)[3], schedule=method.partition("+")[0])
    ours = [controller(method)] if controller(method) is not None else []
    trainer = _trainer(dataclasses.replace(task, steps=steps), [turn, *ours])
    trainer.fit(module, train_dataloaders=data.train_dataloader())
