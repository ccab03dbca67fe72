"""The parts of benchmark_family.py: how each trains, and what it measures."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pruning_arms import GIB, Job, latency_ratio, make_trainer, prepare
from quiet import be_quiet, quiet_trainer

import adaptrain
from adaptrain.compression import quantize
from adaptrain.family.cascade import judge
from adaptrain.family.samples import gather
from adaptrain.fusion import merge
from adaptrain.pruning import cost
from adaptrain.pruning.families import find_family
from adaptrain.pruning.shape import typical_shape
from adaptrain.resources.peak import PeakMemory

EVENTS = 3
RATES = (1.0, 0.5, 2.0)  # of the rate, for the members of a soup
AWARE = ("int8_dynamic", "int4_weight")
AWARE_FROM = 0.8  # of training: its last fifth
FREEZING: dict[str, dict[str, Any]] = {
    "freezing by schedule": {"by": "schedule", "most": 0.67, "begin": 0.4, "end": 0.6},
    "freezing by signal": {},
    "freezing in turns": {"by": "turns", "most": 0.67, "begin": 0.05},
    "unfreezing": {"by": "unfreezing", "most": 0.67, "begin": 0.4, "end": 0.5},
}
FEWER_STEPS = 0.76  # of the steps: what freezing in turns takes of the time
ADAPTERS_RATE = 10.0  # of the rate: adapters want a higher one (Hu et al. 2021)


def run(
    part: str, arm: str | None, job: Job, *, recovery: dict[str, Any], smallest: float, adapters: float
) -> list[dict[str, Any]]:
    """Runs one part, or the arm of it that has a process of its own, with one seed and returns its rows."""
    be_quiet(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "family": lambda: _family(job, Path(folder), recovery, smallest),
            "cascade": lambda: _cascade(job, Path(folder), recovery, smallest),
            "elastic": lambda: _elastic(job, Path(folder), recovery, smallest),
            "soup": lambda: _soup(job, folder),
            "freezing": lambda: [_freezing(job, str(arm), folder)],
            "aware": lambda: _aware(job, folder),
            "adapters": lambda: [_adapters(job, str(arm), folder, adapters)],
        }[part]()
    return [{"part": part, "seed": job.seed, **row} for row in rows]


@dataclasses.dataclass(frozen=True)
class Progressive:
    """One progressive run that kept its members, and what measures them."""

    trainer: Any
    module: Any
    data: Any
    dense: Any
    shape: tuple[int, int]
    wall: float
    family: Any

    def measured(self, model: Any) -> dict[str, Any]:
        inputs = cost.example_inputs(self.dense, *self.shape)
        return _measured(model, self.dense, inputs, self.trainer, self.module, self.data)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"arm": f"member {member.name}", "wall_s": self.wall} | self.measured(member.model())
            for member in self.family
        ]


def _progressive(job: Job, folder: Path, recovery: dict[str, Any], smallest: float) -> Progressive:
    data, module = prepare(job)
    dense = find_family(module).dense_twin()
    shape = typical_shape(data.train_dataloader())
    pruning = adaptrain.ProgressivePruning(
        target={"latency": smallest},
        latency_input=shape,
        schedule=adaptrain.CubicSchedule(begin=0.3, end=0.7, events=EVENTS),
    )
    keep = adaptrain.FamilyCheckpoint(latency_input=shape, **recovery)
    trainer = make_trainer(job, [pruning, keep], str(folder))
    began = time.perf_counter()
    pl.seed_everything(job.seed, verbose=False)
    trainer.fit(module, data)
    wall = time.perf_counter() - began
    return Progressive(trainer, module, data, dense, shape, wall, adaptrain.ModelFamily.load(folder))


def _smaller(rows: list[dict[str, Any]]) -> list[float]:
    """The latencies of the members that are smaller than the dense one."""
    return [row["latency"] for row in rows if row["latency"] < 0.95]


def _family(job: Job, folder: Path, recovery: dict[str, Any], smallest: float) -> list[dict[str, Any]]:
    """One run and its members, a cascade and lower precision of them, and as many separate runs in the same time."""
    run = _progressive(job, folder, recovery, smallest)
    rows = run.rows()
    levels = _smaller(rows)
    rows += _cascades(run.family, run.data)
    rows += _quantized(run)
    for number, level in enumerate(levels):
        rows.append(_alone(job, str(folder / f"alone-{number}"), level, run.wall / len(levels), run.shape))
    return rows


def _cascade(job: Job, folder: Path, recovery: dict[str, Any], smallest: float) -> list[dict[str, Any]]:
    """One run and its members, and a cascade of them."""
    run = _progressive(job, folder, recovery, smallest)
    return run.rows() + _cascades(run.family, run.data)


def _elastic(job: Job, folder: Path, recovery: dict[str, Any], smallest: float) -> list[dict[str, Any]]:
    """One run and its members, and networks of their latencies inside of one in the same wall time."""
    run = _progressive(job, folder, recovery, smallest)
    rows = run.rows()
    return rows + _inside(job, folder / "elastic", _smaller(rows), run.wall, run.shape)


def _measured(model: Any, dense: Any, inputs: Any, trainer: Any, module: Any, data: Any) -> dict[str, Any]:
    row = {"latency": latency_ratio(dense, model, inputs), "params": cost.count_params(model)}
    return row | _accuracies(trainer, module, data, model)


def _alone(job: Job, folder: str, target: float, seconds: float, shape: tuple[int, int]) -> dict[str, Any]:
    """Prunes to one member's latency in its share of the family's wall time, on a schedule that ends with it."""
    data, module = prepare(job)
    dense = find_family(module).dense_twin()
    pruning = adaptrain.ProgressivePruning(target={"latency": target}, latency_input=shape)
    trainer = _timed_trainer(job, [pruning], folder, seconds)
    began = time.perf_counter()
    pl.seed_everything(job.seed, verbose=False)
    trainer.fit(module, data)
    row = {"arm": "pruned alone", "wall_s": time.perf_counter() - began, "steps": trainer.global_step}
    inputs = cost.example_inputs(module.model, *shape)
    return row | _measured(module.model, dense, inputs, trainer, module, data)


def _timed_trainer(job: Job, callbacks: list[Any], folder: str, seconds: float) -> Any:
    """Returns a trainer that ends after some wall time, its schedules with it."""
    clock = adaptrain.WallClock(minutes=seconds / 60)
    return make_trainer(job, [clock, *callbacks], folder, max_epochs=-1, max_steps=-1)


def _inside(
    job: Job, folder: Path, levels: list[float], seconds: float, shape: tuple[int, int]
) -> list[dict[str, Any]]:
    """Trains networks of some latencies inside of one, in a wall time."""
    data, module = prepare(job)
    dense = find_family(module).dense_twin()
    inputs = cost.example_inputs(module.model, *shape)
    clock = Clock()
    elastic = adaptrain.ElasticTraining(levels=levels, latency_input=shape)
    keep = adaptrain.FamilyCheckpoint(latency_input=shape)
    trainer = _timed_trainer(job, [elastic, clock, keep], str(folder), seconds)
    began = time.perf_counter()
    pl.seed_everything(job.seed, verbose=False)
    trainer.fit(module, data)
    spent = {"wall_s": clock.ended - began, "steps": trainer.global_step}
    rows = []
    for member in adaptrain.ModelFamily.load(folder):
        name = member.name if member.name.startswith("elastic") else "elastic, whole"
        rows.append({"arm": name} | spent | _measured(member.model(), dense, inputs, trainer, module, data))
    return rows


def _cascades(family: Any, data: Any) -> list[dict[str, Any]]:
    """Chosen on the dev split that the run kept; accuracy and time of the test split, beside all members."""
    try:
        cascade = family.cascade(cost=0.5)
    except adaptrain.ConfigurationError as error:
        return [{"arm": "cascade", "note": str(error)}]
    data.setup("test")
    samples = gather(data.test_dataloader(), 10**9)
    assert samples is not None
    chosen = cascade.report
    seen = judge(
        cascade, family.members, samples, batch_size=chosen.batch_size, chosen_on=chosen.chosen_on, device=chosen.device
    )
    slowest = seen.throughputs[seen.slowest]
    return [
        {
            "arm": "cascade",
            "dev": chosen.metric,
            "test": seen.metric,
            "latency": seen.cost,
            "escalated": seen.escalated,
            "small": seen.small,
            "large": seen.large,
            "alone": {name: (seen.metrics[name], slowest / each) for name, each in seen.throughputs.items()},
        }
    ]


def _quantized(run: Progressive) -> list[dict[str, Any]]:
    """The dense member and the smallest in lower precision, by time, size and accuracy."""
    size = _bytes(run.family["dense"].model())
    rows: list[dict[str, Any]] = []
    for name in ("dense", "final"):
        for method in ("int8_dynamic", "bf16"):
            small = quantize(run.family[name].model(), method).model
            rows.append({"arm": f"{method} of {name}", "size": _bytes(small) / size} | run.measured(small))
    return rows


def _bytes(model: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _soup(job: Job, folder: str) -> list[dict[str, Any]]:
    """Fine-tunings that differ in seed of the order and in rate, from one initialisation, and their averages."""
    models: list[Any] = []
    rows: list[dict[str, Any]] = []
    trainer = module = data = None
    head = None
    for number, factor in enumerate(RATES):
        each = dataclasses.replace(job, lr=job.lr * factor)
        data, module = prepare(each)
        head = head or copy.deepcopy(module.model.state_dict())
        module.model.load_state_dict(head)
        trainer = make_trainer(each, [], folder)
        pl.seed_everything(1000 * job.seed + number, verbose=False)
        trainer.fit(module, data)
        models.append(copy.deepcopy(module.model))
        rows.append({"arm": "fine-tuned", "rate": each.lr} | _accuracies(trainer, module, data, module.model))

    def evaluate(model: Any) -> float:
        return _accuracies(trainer, module, data, model, test=False)["dev"]

    rows.append(
        {"arm": "greedy soup"} | _accuracies(trainer, module, data, merge(models, "greedy_soup", evaluate=evaluate))
    )
    rows.append({"arm": "uniform soup"} | _accuracies(trainer, module, data, merge(models, "uniform_soup")))
    return rows


def _freezing(job: Job, arm: str, folder: str) -> dict[str, Any]:
    """Fine-tunes all layers, or freezes the first ones on the way, or takes fewer steps."""
    callbacks = [adaptrain.LayerFreezing(**FREEZING[arm])] if arm in FREEZING else []
    data, module = prepare(job)
    trainer = make_trainer(job, callbacks, folder, limit_train_batches=FEWER_STEPS if arm == "fewer steps" else 1.0)
    began = time.perf_counter()
    pl.seed_everything(job.seed, verbose=False)
    trainer.fit(module, data)
    row = {"arm": arm, "wall_s": time.perf_counter() - began, "latency": 1.0}
    return row | _accuracies(trainer, module, data, module.model)


class Clock(pl.Callback):
    """Notes when training ended, before what is made of the model then."""

    ended = 0.0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended = time.perf_counter()


def _aware(job: Job, folder: str) -> list[dict[str, Any]]:
    """The same fine-tuning rounded after it, and rounded in its last fifth, each judged as it is rounded."""
    rows = []
    for aware in (None, *AWARE):
        data, module = prepare(job)
        dense = find_family(module).dense_twin()
        inputs = cost.example_inputs(module.model, *typical_shape(data.train_dataloader()))
        clock = Clock()
        callbacks: list[Any] = [clock]
        if aware is not None:
            callbacks.append(adaptrain.Quantization(method=aware, aware_from=AWARE_FROM))
        trainer = make_trainer(job, callbacks, f"{folder}/{aware}")
        began = time.perf_counter()
        pl.seed_everything(job.seed, verbose=False)
        trainer.fit(module, data)
        wall = clock.ended - began
        size = _bytes(module.model)
        for method in ("none", *AWARE) if aware is None else ("none", aware):
            small = quantize(module.model, method).model
            row: dict[str, Any] = {"arm": f"{method}, {'rounded after' if aware is None else f'aware of {aware}'}"}
            row |= {"latency": latency_ratio(dense, small, inputs), "size": _bytes(small) / size, "wall_s": wall}
            rows.append(row | _accuracies(trainer, module, data, small))
    return rows


def _adapters(job: Job, arm: str, folder: str, share: float) -> dict[str, Any]:
    """Trains all weights, or adapters within a share of them with ranks of one kind."""
    callbacks: list[Any] = []
    if arm != "all weights":
        job = dataclasses.replace(job, lr=job.lr * ADAPTERS_RATE)
        importance: Any = arm.rpartition(" ")[2]
        callbacks = [adaptrain.LowRankAdapters(target={"trainable_params": share}, importance=importance)]
    data, module = prepare(job)
    trainer = make_trainer(job, callbacks, folder)
    began = time.perf_counter()
    pl.seed_everything(job.seed, verbose=False)
    with PeakMemory() as memory:
        trainer.fit(module, data)
        peak = memory.read()
    row = {"arm": arm, "wall_s": time.perf_counter() - began, "peak_gib": peak / GIB, "latency": 1.0}
    row["trainable"] = callbacks[0].report()["trainable_params"] if callbacks else cost.count_params(module.model)
    return row | _accuracies(trainer, module, data, module.model)


def _accuracies(trainer: Any, module: Any, data: Any, model: Any, *, test: bool = True) -> dict[str, float]:
    """Returns a model's accuracy on the dev split, and the test split."""
    own, module.model = module.model, model.eval()
    try:
        quiet = quiet_trainer(trainer.default_root_dir)  # without callbacks, in full precision
        found = {"dev": quiet.validate(module, data, verbose=False)[0]["val/accuracy"]}
        if test:
            found["test"] = quiet.test(module, data, verbose=False)[0]["test/accuracy"]
    finally:
        module.model = own
    return found
