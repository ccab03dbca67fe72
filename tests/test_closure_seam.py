"""The private seam of Lightning's closure: these fail first when Lightning moves it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from adaptrain import _lightning
from adaptrain._lightning.closure import ClosureStep, LogBuffer, wrap_closure
from tests.toys import TextModule, quiet_trainer, text_loader, weights


class Wrapping(_lightning.Callback):
    def __init__(self, run) -> None:
        self.run = run

    def on_fit_start(self, trainer, pl_module) -> None:
        self.undo = wrap_closure(trainer, self.run)

    def on_fit_end(self, trainer, pl_module) -> None:
        self.undo()


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch])
def test_the_automatic_optimization_loop_has_what_the_seam_uses(namespace, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, namespace=namespace)
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    for name in ("_make_closure", "_make_step_fn", "output_result_cls"):
        assert hasattr(loop, name), name
    assert hasattr(trainer.fit_loop, "_should_accumulate")
    result = loop.output_result_cls(closure_loss=torch.tensor(2.0), extra={"a": 1})
    assert result.asdict() == {"loss": torch.tensor(2.0), "a": 1}


def test_ddps_reducer_has_what_overlap_uses() -> None:
    for name in ("_rebuild_buckets", "prepare_for_backward", "_check_reducer_finalized", "_reset_state"):
        assert hasattr(torch.distributed.Reducer, name), name


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch])
def test_running_the_parts_equals_lightnings_own_closure(namespace, tmp_path: Path) -> None:
    def parts(step: ClosureStep):
        logged = step.logged()
        with logged.capture():
            output = step.forward(step.batch)
            step.zero_grad()
            step.backward(output.closure_loss)
        logged.flush()
        return step.result(output.loss, output.extra)

    finals, metrics = [], []
    for run in (ClosureStep.run_unsplit, parts, None):
        module = _module(namespace)
        trainer = quiet_trainer(
            tmp_path, namespace=namespace, callbacks=[Wrapping(run)] if run else [], accumulate_grad_batches=2
        )
        trainer.fit(module, text_loader())
        finals.append(weights(module))
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
        assert (
            trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.zero_grad.total.completed == 3
        )
    assert torch.equal(finals[0], finals[2])
    assert torch.equal(finals[1], finals[2])
    assert metrics[0] == metrics[1] == metrics[2]
    assert {"train/loss_step", "train/loss_epoch"} <= set(metrics[0])


def test_windows_are_told_apart(tmp_path: Path) -> None:
    seen = []

    def run(step: ClosureStep):
        seen.append((step.zeroes_gradients, step.ends_window))
        return step.run_unsplit()

    trainer = quiet_trainer(tmp_path, callbacks=[Wrapping(run)], accumulate_grad_batches=3)
    trainer.fit(TextModule(), text_loader(batch_size=12))
    # The last batch of an epoch ends its window early.
    assert seen == [(True, False), (False, False), (False, True), (True, True)]


def test_no_batch_outlives_its_step(tmp_path: Path) -> None:
    batches: list[weakref.ref] = []

    def run(step: ClosureStep):
        assert sum(batch() is not None for batch in batches) <= 1  # Lightning holds the one before
        batches.append(weakref.ref(step.batch["input_ids"]))
        return step.run_unsplit()

    gc.disable()
    try:
        quiet_trainer(tmp_path, callbacks=[Wrapping(run)]).fit(TextModule(), text_loader())
    finally:
        gc.enable()
    assert len(batches) == 6


def test_undo_leaves_a_wrapper_put_on_later_alone(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    first = wrap_closure(trainer, ClosureStep.run_unsplit)
    inner = loop._make_closure
    second = wrap_closure(trainer, ClosureStep.run_unsplit)
    second()
    assert loop._make_closure is inner
    first()
    assert "_make_closure" not in vars(loop)


class _Results(dict):
    def __init__(self) -> None:
        self.calls: list = []

    def log(self, fx, name, value, **kwargs) -> None:
        self.calls.append((fx, name, value, kwargs))


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [("mean", 2.5), (torch.mean, 2.5), ("avg", 2.5), ("sum", 4.0), (torch.sum, 4.0), (max, 3.0), ("min", 1.0)],
)
def test_logged_values_are_combined_by_their_reduction(reduce_fx, expected) -> None:
    results = _Results()
    buffer = LogBuffer(results)
    with buffer.capture():
        for value, weight in ((1.0, 0.25), (3.0, 0.75)):
            buffer.next_piece(weight)
            results.log("training_step", "x", torch.tensor(value), reduce_fx=reduce_fx, batch_size=4)
    assert results.calls == []
    buffer.flush()
    [(fx, name, value, kwargs)] = results.calls
    assert (fx, name, float(value), kwargs["batch_size"]) == ("training_step", "x", expected, 8)


def test_a_constant_stays_exactly_what_it_is() -> None:
    results = _Results()
    buffer = LogBuffer(results)
    with buffer.capture():
        for weight in (0.1, 0.2, 0.7):
            buffer.next_piece(weight)
            results.log("training_step", "lr", torch.tensor(0.1))
    buffer.flush()
    assert float(results.calls[0][2]) == float(torch.tensor(0.1))


def test_a_name_logged_twice_in_one_step_is_logged_twice() -> None:
    results = _Results()
    buffer = LogBuffer(results)
    with buffer.capture():
        for weight in (0.5, 0.5):
            buffer.next_piece(weight)
            results.log("training_step", "x", torch.tensor(1.0))
            results.log("training_step", "x", torch.tensor(5.0))
    buffer.flush()
    assert [float(call[2]) for call in results.calls] == [1.0, 5.0]


def test_a_failed_micro_batch_leaves_no_value_behind() -> None:
    results = _Results()
    buffer = LogBuffer(results)
    with buffer.capture():
        buffer.next_piece(0.5)
        results.log("step", "x", torch.tensor(1.0))
        buffer.next_piece(0.5)
        results.log("step", "x", torch.tensor(9.0))
        results.log("step", "y", torch.tensor(9.0))
        buffer.drop_piece()
        buffer.next_piece(0.5)
        results.log("step", "x", torch.tensor(3.0))
    buffer.flush()
    assert [(name, float(value)) for _, name, value, _ in results.calls] == [("x", 2.0)]


def test_a_micro_batch_that_counts_nothing_is_in_sums_and_not_in_means() -> None:
    results = _Results()
    buffer = LogBuffer(results)
    with buffer.capture():
        for value, weight in ((1.0, 0.25), (3.0, 0.75), (float("nan"), 0.0)):
            buffer.next_piece(weight)
            results.log("step", "mean", torch.tensor(value))
            results.log("step", "count", torch.tensor(1.0), reduce_fx="sum")
    buffer.flush()
    assert {name: float(value) for _, name, value, _ in results.calls} == {"mean": 2.5, "count": 3.0}


def _module(namespace):
    """The toy module under either namespace's LightningModule."""
    if namespace is pytorch_lightning:
        return TextModule()
    body = {
        name: value
        for name, value in vars(TextModule).items()
        if name in ("training_step", "on_train_batch_end", "configure_optimizers")
    }
    module = type("OtherTextModule", (lightning.pytorch.LightningModule,), body)()
    template = TextModule()
    module.model, module.lr, module.optimizer_name, module.losses = template.model, template.lr, "AdamW", []
    return module
