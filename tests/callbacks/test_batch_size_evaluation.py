"""BatchSizeController in validation, test and predict: with memory running out, the results of the unsplit run."""

from __future__ import annotations

import random
from collections import namedtuple
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
import torchmetrics
from torch import nn
from transformers import BatchEncoding

from adaptrain import BatchSizeController
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.oom import DoesNotFitError
from tests.toys import TextModule, language_model_samples, quiet_trainer, text_loader, text_samples, tiny_bert, weights

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"
STAGES = ("validation", "test", "predict")
Pair = namedtuple("Pair", "first second")


class Scarce(TextModule):
    """In fp64, with what a replay must restore. Runs out of memory above `most` samples, or at chosen calls.

    `late` raises after the step has logged, counted and drawn.
    """

    def __init__(self, *, most: int | None = None, at: tuple[int, ...] = (), late: bool = False) -> None:
        super().__init__(tiny_bert().double())
        self.most, self.at, self.late = most, at, late
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.scores = torchmetrics.CatMetric()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("large", torch.zeros(2**18, dtype=torch.double))
        self.calls, self.errors = 0, 0
        self.rows: list[int] = []
        self.draws: list[tuple[float, ...]] = []

    def allocate(self, rows: int) -> None:
        self.calls += 1
        if (self.most is not None and rows > self.most) or self.calls in self.at:
            self.errors += 1
            raise torch.OutOfMemoryError(OOM)
        self.rows.append(rows)

    def evaluate(self, batch, stage: str):
        rows = len(batch["labels"])
        if not self.late:
            self.allocate(rows)
        self.seen += rows
        self.large += rows
        self.draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        self.accuracy(logits, batch["labels"])
        self.scores.update(logits.amax(1))
        if stage != "predict":
            self.log(f"{stage}/loss", loss, on_step=True, on_epoch=True, batch_size=rows)
            self.log(f"{stage}/inferred", loss)
            self.log(f"{stage}/accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.log(f"{stage}/count", float(rows), reduce_fx="sum")
            self.log(f"{stage}/top", logits.max(), reduce_fx="max")
        if self.late:
            self.allocate(rows)
        return logits, loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits, loss = self.evaluate(batch, "validation")
        return {"loss": loss, "logits": logits}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self.evaluate(batch, "test")[1]

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        logits, _ = self.evaluate(batch, "predict")
        ids = batch["input_ids"]
        return {
            "logits": logits,
            "nested": Pair(ids, [logits.argmax(1), (ids[:, 0].numpy(),)]),
            "texts": [f"row {row[0]}" for row in ids.tolist()],
            "ragged": [row[row > 0] for row in ids],
            "nothing": None,
            "mean": logits.mean(),
        }


class Outputs(pytorch_lightning.Callback):
    """Keeps what the hooks are given, and whether gradients and modes are as Lightning sets them."""

    def __init__(self) -> None:
        self.seen: list = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.seen.append((outputs, batch_idx, dataloader_idx))

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end


def run(stage: str, module, root: Path, controller=None, *, loaders=None, **kwargs):
    """Returns the trainer, what it returned, the logged values, and the hooks' outputs."""
    watch = Outputs()
    trainer = quiet_trainer(root, callbacks=[watch, *([controller] if controller else [])], **kwargs)
    loaders = loaders if loaders is not None else text_loader(batch_size=13)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    if stage == "predict":
        returned = trainer.predict(module, loaders)
    else:
        returned = getattr(trainer, {"validation": "validate"}.get(stage, stage))(module, loaders, verbose=False)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return trainer, returned, logged, watch.seen


def assert_equal(got, expected) -> None:
    """Structures with the same types and values, but for rounding."""
    assert type(got) is type(expected), (got, expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_equal(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-6)
    else:
        assert got == expected


def left_as_found(trainer, module) -> bool:
    steps = {"validation_step", "test_step", "predict_step"}
    return not steps & set(vars(module)) and "batch_to_device" not in vars(trainer.strategy)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_does_not_fit_gives_the_results_of_the_unsplit_run(stage: str, late: bool, tmp_path: Path) -> None:
    plain, scarce = Scarce(), Scarce(most=4, late=late)
    _, expected, logged, outputs = run(stage, plain, tmp_path)
    trainer, got, logged_too, outputs_too = run(stage, scarce, tmp_path, BatchSizeController())
    assert scarce.errors == 2  # 13, then a piece of 5; 2 fit
    assert sum(scarce.rows) == sum(plain.rows) == 48
    assert_equal(got, expected)
    assert_equal(logged_too, logged)
    assert_equal(outputs_too, outputs)
    assert scarce.seen == plain.seen == 48
    assert torch.equal(scarce.large, plain.large)
    decisions = list(decision_log(trainer))
    assert all(d.knob == "micro_batch_size" and d.readings["stage"] == stage for d in decisions)
    assert f"ran out in {stage} at 13 samples" in decisions[0].reason
    assert left_as_found(trainer, scarce)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stage", STAGES)
def test_errors_at_random_micro_batches_lose_and_repeat_no_sample(stage: str, seed: int, tmp_path: Path) -> None:
    at = tuple(random.Random(seed).sample(range(1, 8), 2))
    plain, scarce = Scarce(), Scarce(at=at, late=seed % 2 == 0)
    _, expected, logged, outputs = run(stage, plain, tmp_path)
    _, got, logged_too, outputs_too = run(stage, scarce, tmp_path, BatchSizeController())
    assert scarce.errors == 2
    assert sum(scarce.rows) == 48
    assert_equal([got, logged_too, outputs_too], [expected, logged, outputs])
    assert scarce.seen == 48


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch])
def test_validation_inside_of_fit_leaves_training_as_it_is(namespace, tmp_path: Path) -> None:
    def fit(most: int | None, controller=None):
        module = Scarce(most=most)
        if namespace is lightning.pytorch:
            body = {name: value for cls in (TextModule, Scarce) for name, value in vars(cls).items()}
            names = ("allocate", "evaluate", "validation_step", "training_step", "configure_optimizers")
            source = module
            module = type("Other", (lightning.pytorch.LightningModule,), {name: body[name] for name in names})()
            for name in ("model", "lr", "optimizer_name", "most", "at", "late", "accuracy", "scores", "rows", "draws"):
                setattr(module, name, getattr(source, name))
            module.calls = module.errors = 0
            module.register_buffer("seen", torch.zeros(()))
            module.register_buffer("large", torch.zeros(8, dtype=torch.double))
        trainer = quiet_trainer(
            tmp_path,
            namespace=namespace,
            callbacks=[controller] if controller else [],
            max_epochs=2,
            val_check_interval=2,
            accumulate_grad_batches=3,  # validation falls inside of a window: its gradients must stay
            num_sanity_val_steps=1,
        )
        samples = text_samples(variable=False)
        trainer.fit(module, text_loader(samples, batch_size=12), text_loader(batch_size=13))
        return trainer, module

    (expected, plain), (got, scarce) = fit(None), fit(4, BatchSizeController(micro_batch_size=12))
    assert scarce.errors == 2
    assert torch.equal(weights(scarce), weights(plain))
    metrics = [{n: float(v) for n, v in t.callback_metrics.items() if "micro" not in n} for t in (got, expected)]
    assert_equal(*metrics)
    assert {"validation/loss", "validation/accuracy", "train/loss"} <= set(metrics[0])
    assert left_as_found(got, scarce)


def test_a_metric_that_training_shares_can_be_trained_on_after_a_replay(tmp_path: Path) -> None:
    class Shared(Scarce):
        def training_step(self, batch, batch_idx):
            output = self.model(**batch)
            self.accuracy(output.logits, batch["labels"])
            return output.loss

    module = Shared(most=4, late=True)
    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController()], val_check_interval=2, max_epochs=2)
    trainer.fit(module, text_loader(batch_size=12), text_loader(batch_size=13))
    assert module.errors == 2


@pytest.mark.parametrize("stage", STAGES)
def test_several_loaders_have_their_own_size_and_stay_apart(stage: str, tmp_path: Path) -> None:
    def loaders():
        return [text_loader(text_samples(26), batch_size=13), text_loader(text_samples(20, seed=1), batch_size=5)]

    plain, scarce = Scarce(), Scarce(most=4)
    _, expected, logged, outputs = run(stage, plain, tmp_path, loaders=loaders())
    controller = BatchSizeController()
    trainer, got, logged_too, outputs_too = run(stage, scarce, tmp_path, controller, loaders=loaders())
    assert_equal([got, logged_too, outputs_too], [expected, logged, outputs])
    assert {loader for *_, loader in outputs_too} == {0, 1}
    assert {d.readings["stage"] for d in decision_log(trainer)} == {f"{stage} (loader 0)", f"{stage} (loader 1)"}


def test_means_over_tokens_are_weighed_by_the_tokens_that_count(tmp_path: Path) -> None:
    class Tokens(Scarce):
        def validation_step(self, batch, batch_idx):
            self.allocate(len(batch["labels"]))
            logits = self.model.bert(batch["input_ids"], batch["attention_mask"])[0] @ self.table
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            self.log("loss", loss)
            return loss

        table = torch.rand(32, 64, dtype=torch.double, generator=torch.Generator().manual_seed(0))

    samples = language_model_samples(12)
    for sample in samples:
        sample["labels"] = (sample["input_ids"] % 3).where(sample["attention_mask"] == 1, -100)
    for sample in samples[4:7]:
        sample["labels"] = torch.full_like(sample["labels"], -100)  # alone, their mean is 0/0
    results = []
    for most, controller in ((None, None), (1, BatchSizeController())):
        module = Tokens(most=most)
        _, returned, _, outputs = run(
            "validation", module, tmp_path, controller, loaders=text_loader(samples, batch_size=6)
        )
        assert sum(module.rows) == 12
        results.append((returned, outputs))
    assert_equal(results[1], results[0])


def test_without_an_error_a_run_is_bit_identical_and_whole(tmp_path: Path) -> None:
    for stage in STAGES:
        runs = []
        for controller in (None, BatchSizeController(micro_batch_size=2)):
            module = Scarce()
            _, returned, logged, outputs = run(stage, module, tmp_path / stage, controller)
            assert module.rows == [13, 13, 13, 9]
            runs.append((returned, logged, outputs, module.draws, module.scores))
        assert_identical(runs[0][:4], runs[1][:4])
        assert not (tmp_path / stage / "decisions.jsonl").exists()


def assert_identical(one, other) -> None:
    if isinstance(one, dict):
        one, other = list(one.items()), list(other.items())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    elif isinstance(one, (torch.Tensor, np.ndarray)):
        assert (one == other).all()
    else:
        assert one == other


def test_a_replay_draws_the_same_random_numbers(tmp_path: Path) -> None:
    clean, failing = Scarce(), Scarce(at=(2,), late=True)
    run("test", clean, tmp_path)
    run("test", failing, tmp_path, BatchSizeController())
    assert failing.draws[2] == failing.draws[1] == clean.draws[1]


def test_the_size_is_remembered_for_longer_batches_and_grows_back(tmp_path: Path) -> None:
    controller = BatchSizeController()
    controller._evaluation_policy.growth_interval = 4
    module = Scarce(at=(1,))
    trainer, *_ = run("predict", module, tmp_path, controller, loaders=text_loader(text_samples(800), batch_size=16))
    assert module.errors == 1
    assert module.rows[:4] == [8, 8, 8, 8]
    assert module.rows[-1] == 16
    decisions = list(decision_log(trainer))
    assert (decisions[0].old, decisions[0].new) == (16, 8)
    assert [d.new for d in decisions[1:]] == [10, 12, 14, 16]
    assert "4 batches of predict without an error" in decisions[1].reason


@pytest.mark.parametrize("stage", STAGES)
def test_a_single_sample_that_does_not_fit_raises_with_a_report(stage: str, tmp_path: Path) -> None:
    module, controller = Scarce(most=0), BatchSizeController()
    trainer = quiet_trainer(tmp_path, callbacks=[controller])
    call = {"validation": trainer.validate, "test": trainer.test, "predict": trainer.predict}[stage]
    with pytest.raises(DoesNotFitError, match=rf"A single sample .*does not fit into memory in {stage}") as caught:
        call(module, text_loader())
    assert "GiB allowed" in str(caught.value)
    assert OOM in str(caught.value)
    assert "gradient" not in str(caught.value)
    assert left_as_found(trainer, module)
    assert controller._evaluation is None


def test_a_dry_run_raises_as_without_it(tmp_path: Path) -> None:
    for stage in STAGES:
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            run(stage, Scarce(most=4), tmp_path, BatchSizeController(dry_run=True))


def test_another_error_is_not_swallowed(tmp_path: Path) -> None:
    class Broken(Scarce):
        def test_step(self, batch, batch_idx):
            raise RuntimeError("shapes do not match")

    module = Broken()
    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController()])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.test(module, text_loader(), verbose=False)
    assert left_as_found(trainer, module)


def test_one_step_calling_another_is_one_step(tmp_path: Path) -> None:
    class Nested(Scarce):
        def test_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)["loss"]

    plain, scarce = Nested(), Nested(most=4)
    _, expected, logged, _ = run("test", plain, tmp_path)
    _, got, logged_too, _ = run("test", scarce, tmp_path, BatchSizeController())
    assert_equal([got, logged_too], [expected, logged])


@pytest.mark.parametrize("encoding", [False, True])
def test_a_step_may_take_entries_out_of_its_batch(encoding: bool, tmp_path: Path) -> None:
    class Popping(Scarce):
        def predict_step(self, batch, batch_idx):
            labels = batch.pop("labels")
            return self.evaluate({**batch, "labels": labels}, "predict")[0]

    def collate(samples):
        batch = torch.utils.data.default_collate(samples)
        return BatchEncoding(batch) if encoding else batch

    results = []
    for most, controller in ((None, None), (4, BatchSizeController())):
        loader = text_loader(batch_size=13, collate_fn=collate)
        results.append(run("predict", Popping(most=most), tmp_path, controller, loaders=loader)[1])
    assert_equal(results[1], results[0])


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_takes_an_iterator_is_left_to_lightning(tmp_path: Path) -> None:
    class Iterating(TextModule):
        rows = 0

        def test_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            self.rows += len(batch["labels"])

    module = Iterating()
    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController()])
    trainer.test(module, text_loader(), verbose=False)
    assert module.rows == 48


def test_a_users_split_serves_batches_that_cannot_be_counted(tmp_path: Path) -> None:
    def collate(samples):
        return {"text": torch.utils.data.default_collate(samples), "table": torch.ones(5)}

    def split(batch, size):
        rows = batch["text"]
        starts = range(0, len(rows["labels"]), size)
        return [{"text": {k: v[i : i + size] for k, v in rows.items()}, "table": batch["table"]} for i in starts]

    class Tables(Scarce):
        def predict_step(self, batch, batch_idx):
            return self.evaluate(batch["text"], "predict")[0]

    def loader():
        return text_loader(batch_size=13, collate_fn=collate)

    plain, scarce = Tables(), Tables(most=4)
    _, expected, *_ = run("predict", plain, tmp_path, loaders=loader())
    _, got, *_ = run("predict", scarce, tmp_path, BatchSizeController(split=split), loaders=loader())
    assert_equal(got, expected)
    with pytest.raises(DoesNotFitError, match="cannot be split into samples"):
        run("predict", Tables(most=4), tmp_path, BatchSizeController(), loaders=loader())
    whole = BatchSizeController(split=lambda batch, size: [batch] * (13 if size == 1 else 1))
    with pytest.raises(ValueError, match="split returned one micro-batch"):
        run("predict", Tables(most=4), tmp_path, whole, loaders=loader())


def test_the_size_is_kept_in_the_state(tmp_path: Path) -> None:
    first, second = BatchSizeController(), BatchSizeController()
    run("predict", Scarce(most=4), tmp_path, first)
    second.load_state_dict(first.state_dict())
    module = Scarce(most=4)
    run("predict", module, tmp_path, second)
    assert module.errors == 0

    state = first.state_dict()
    state["machine"] = {"device": "another", "memory_gib": 1.0}
    moved, module = BatchSizeController(), Scarce(most=4)
    moved.load_state_dict(state)
    run("predict", module, tmp_path, moved)
    assert module.errors == 2


def test_evaluating_a_checkpoint_keeps_the_decisions_of_the_run_that_wrote_it(tmp_path: Path) -> None:
    module = Scarce()
    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController(micro_batch_size=4)])
    trainer.fit(module, text_loader(batch_size=12), text_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = (tmp_path / "decisions.jsonl").read_text()
    for most, name in ((None, "decisions.jsonl"), (4, "decisions.1.jsonl")):
        fresh = quiet_trainer(tmp_path, callbacks=[BatchSizeController()])
        fresh.predict(Scarce(most=most), text_loader(batch_size=12), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        assert (tmp_path / name).read_text() == before
    assert "predict" in (tmp_path / "decisions.jsonl").read_text()


class Cramped(Scarce):
    """The transfer to the device runs out of memory, `times` times."""

    times = 0

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        if self.times:
            self.times -= 1
            raise torch.OutOfMemoryError(OOM)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


@pytest.mark.parametrize("stage", ["fit", *STAGES])
def test_the_transfer_is_tried_once_more(stage: str, tmp_path: Path) -> None:
    def go(times: int):
        module = Cramped()
        module.times = times
        if stage != "fit":
            return module, *run(stage, module, tmp_path, BatchSizeController())
        trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController(micro_batch_size=4)])
        trainer.fit(module, text_loader(), text_loader())
        return module, trainer

    module, trainer, *_ = go(1)
    assert module.times == 0
    assert left_as_found(trainer, module)
    with pytest.raises(DoesNotFitError, match=r"does not fit on the device.*GiB allowed"):
        go(2)


@pytest.mark.parametrize("fails", [False, True])
def test_a_sharded_strategy_is_refused_in_evaluation_too(fails: bool, tmp_path: Path) -> None:
    class FSDPLike(type(quiet_trainer(tmp_path).strategy)):
        pass

    FSDPLike.__name__ = "FSDPLike" if fails else "Like"
    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController()], strategy=FSDPLike(device="cpu"))
    if not fails:
        trainer.predict(TextModulePredicting(), text_loader())
        return
    with pytest.raises(ValueError, match="sharded"):
        trainer.predict(TextModulePredicting(), text_loader())


class TextModulePredicting(TextModule):
    def predict_step(self, batch, batch_idx):
        return self.model(**batch).logits
