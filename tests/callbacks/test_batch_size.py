"""BatchSizeController in real training: equal to the unsplit run, also when memory runs out."""

from __future__ import annotations

import pickle
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
import torchmetrics
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

from adaptrain import BatchSizeController, ConfigurationError
from adaptrain.callbacks.base import AdaptiveCallback, decision_log
from adaptrain.resources.host import process_memory_bytes
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, tiny_bert, weights

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Scarce(nn.Module):
    """Passes activations through; runs out of memory above `most` samples, or at chosen calls."""

    def __init__(self, *, most: int | None = None, at: tuple[int, ...] = (), phase: str = "forward") -> None:
        super().__init__()
        self.most, self.at, self.phase = most, at, phase
        self.calls = 0
        self.errors = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        fails = (self.most is not None and x.shape[0] > self.most) or self.calls in self.at
        if fails and self.phase == "forward":
            self._fail()
        if fails:
            return _FailsInBackward.apply(x, self)
        return x

    def _fail(self) -> None:
        self.errors += 1
        raise torch.OutOfMemoryError(OOM)


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, owner):
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.owner._fail()


class ScarceModule(TextModule):
    """In fp64, with everything a replay must restore: logged values, metrics, random numbers, a buffer."""

    def __init__(self, scarce: Scarce | None = None, *, use_random: bool = False) -> None:
        super().__init__(tiny_bert().double())
        self.scarce = scarce or Scarce()
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.use_random = use_random
        self.draws: list[tuple[float, ...]] = []
        self.register_buffer("steps_seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.steps_seen += batch["labels"].shape[0]
        if self.use_random:
            self.draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        hidden = self.scarce(self.model.bert(batch["input_ids"], batch["attention_mask"])[1])
        logits = self.model.classifier(hidden)
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        self.accuracy(logits, batch["labels"])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("train/count", float(len(logits)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("train/top", logits.max(), on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "logits": logits.detach(), "rows": batch["labels"], "mean": logits.detach().mean()}


def fit(module, root: Path, controller=None, *, samples=None, batch_size: int = 12, **kwargs):
    callbacks = kwargs.pop("callbacks", [])
    trainer = quiet_trainer(root, callbacks=[*callbacks, *([controller] if controller else [])], **kwargs)
    trainer.fit(module, text_loader(samples, batch_size=batch_size))
    return trainer


def metrics(trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch])
def test_it_runs_under_both_namespaces(namespace, tmp_path: Path) -> None:
    if namespace is pytorch_lightning:
        module = TextModule()
    else:
        module = type("Other", (lightning.pytorch.LightningModule,), {})()
        module.model = tiny_bert()
        module.training_step = lambda batch, batch_idx: module.model(**batch).loss
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    controller = BatchSizeController(micro_batch_size=3)
    trainer = fit(module, tmp_path, controller, namespace=namespace)
    assert [d.new for d in decision_log(trainer)] == [3]
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


@pytest.mark.parametrize(
    ("size", "split_by", "accumulate"),
    [
        (1, "tokens", 1),
        (5, "samples", 1),
        (5, "tokens", 3),
        (12, "tokens", 1),
        ("auto", "samples", 3),
        ("auto", "tokens", 1),
    ],
)
def test_split_steps_equal_unsplit_ones(size, split_by: str, accumulate: int, tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    plain, split = ScarceModule(), ScarceModule()
    expected = fit(plain, tmp_path, **settings)
    got = fit(split, tmp_path, BatchSizeController(micro_batch_size=size, split_by=split_by), **settings)
    assert split.scarce.calls >= plain.scarce.calls
    torch.testing.assert_close(weights(split), weights(plain), rtol=1e-12, atol=1e-12)
    assert split.losses == pytest.approx(plain.losses, rel=1e-12)
    assert metrics(got) == pytest.approx(metrics(expected), rel=1e-6)
    assert split.steps_seen == plain.steps_seen == 48


@pytest.mark.parametrize(
    ("multiple", "precision", "expected"),
    [(None, "32-true", 1), ("auto", "32-true", 1), ("auto", "bf16-mixed", 8), (4, "64-true", 4)],
)
def test_lengths_are_trimmed_to_a_multiple(multiple, precision: str, expected: int, tmp_path: Path) -> None:
    columns: list[int] = []

    class Watched(ScarceModule):
        def training_step(self, batch, batch_idx):
            columns.append(batch["input_ids"].shape[1])
            return super().training_step(batch, batch_idx)

    split = Watched().to(torch.get_default_dtype())
    controller = BatchSizeController(micro_batch_size=2, pad_to_multiple_of=multiple)
    fit(split, tmp_path, controller, precision=precision)
    assert all(length % expected == 0 or length == max(columns) for length in columns)
    assert len(set(columns)) > 1
    assert (expected == 1) == any(length % 2 for length in columns if length < max(columns))


def test_gradient_checkpointing_is_served(tmp_path: Path) -> None:
    modules = [ScarceModule(), ScarceModule()]
    for module in modules:
        for layer in module.model.bert.encoder.layer:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    fit(modules[0], tmp_path)
    fit(modules[1], tmp_path, BatchSizeController(micro_batch_size=5))
    torch.testing.assert_close(weights(modules[1]), weights(modules[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_large_vocabulary_is_served_and_left_as_found(accumulate: int, tmp_path: Path) -> None:
    def large(scarce: Scarce | None = None) -> ScarceModule:
        module = ScarceModule(scarce)
        old = module.model.bert.embeddings.word_embeddings
        new = nn.Embedding(2**15, 32, padding_idx=0, dtype=torch.float64)
        with torch.no_grad():
            new.weight.zero_()
            new.weight[: len(old.weight)] = old.weight
        module.model.bert.embeddings.word_embeddings = new
        return module

    plain, split = large(), large(Scarce(most=4, phase="backward"))
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    fit(plain, tmp_path, **settings)
    fit(split, tmp_path, BatchSizeController(micro_batch_size=6), **settings)
    torch.testing.assert_close(weights(split), weights(plain), rtol=1e-12, atol=1e-12)
    assert not split.model.bert.embeddings.word_embeddings.sparse


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_running_out_of_memory_is_survived_with_equal_weights(phase: str, accumulate: int, tmp_path: Path) -> None:
    plain, scarce = ScarceModule(), ScarceModule(Scarce(most=4, phase=phase))
    expected = fit(plain, tmp_path, accumulate_grad_batches=accumulate)
    got = fit(scarce, tmp_path, BatchSizeController(micro_batch_size=12), accumulate_grad_batches=accumulate)
    assert scarce.scarce.errors == 2  # 12, then 6 at once; 3 fit
    torch.testing.assert_close(weights(scarce), weights(plain), rtol=1e-12, atol=1e-12)
    assert scarce.losses == pytest.approx(plain.losses, rel=1e-12)
    assert metrics(got) == pytest.approx(metrics(expected), rel=1e-6)
    assert scarce.steps_seen == 48
    decisions = list(decision_log(got))
    assert [(d.old, d.new, d.knob) for d in decisions] == [(12, 6, "micro_batch_size"), (6, 3, "micro_batch_size")]
    assert "ran out at 12 samples" in decisions[0].reason
    assert decisions[0].readings["limit_gib"] > 0
    progress = got.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
    assert progress.zero_grad.total.completed == progress.step.total.completed == got.global_step


@pytest.mark.parametrize(("seed", "phase"), [(0, "forward"), (1, "forward"), (2, "backward"), (3, "backward")])
def test_errors_at_random_micro_batches_lose_no_sample(seed: int, phase: str, tmp_path: Path) -> None:
    at = tuple(random.Random(seed).sample(range(1, 16), 2))
    plain, scarce = ScarceModule(), ScarceModule(Scarce(at=at, phase=phase))
    expected = fit(plain, tmp_path, max_epochs=2)
    got = fit(scarce, tmp_path, BatchSizeController(micro_batch_size=6), max_epochs=2)
    assert scarce.scarce.errors == 2
    torch.testing.assert_close(weights(scarce), weights(plain), rtol=1e-12, atol=1e-12)
    assert metrics(got) == pytest.approx(metrics(expected), rel=1e-6)


def test_a_replay_draws_the_same_random_numbers(tmp_path: Path) -> None:
    def draws(scarce: Scarce) -> list[tuple[float, ...]]:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        module = ScarceModule(scarce, use_random=True)
        fit(module, tmp_path, BatchSizeController(micro_batch_size=4), limit_train_batches=2)
        return module.draws

    clean, failing = draws(Scarce()), draws(Scarce(at=(4,), phase="backward"))
    # The first micro-batch of the second batch fails and is drawn again, now at half the size.
    assert failing[:4] == clean[:4]
    assert failing[4] == clean[3]


def test_other_outputs_come_back_in_the_loaders_order(tmp_path: Path) -> None:
    class Watch(pytorch_lightning.Callback):
        def __init__(self) -> None:
            self.outputs: list = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.outputs.append((outputs, batch))

    seen = []
    for controller in (None, BatchSizeController(micro_batch_size=5)):
        watch = Watch()
        fit(ScarceModule(), tmp_path, controller, callbacks=[watch])
        seen.append(watch.outputs)
    for (plain, _), (split, batch) in zip(*seen, strict=True):
        torch.testing.assert_close(split["logits"], plain["logits"], rtol=1e-9, atol=1e-9)
        assert torch.equal(split["rows"], batch["labels"])
        torch.testing.assert_close(split["mean"], plain["mean"], rtol=1e-9, atol=1e-9)


class Scaling(pytorch_lightning.plugins.precision.Precision):
    """Scales the loss before backward and unscales before the step, as a GradScaler does."""

    def pre_backward(self, tensor, module):
        return super().pre_backward(tensor * 1024, module)

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        closure()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024
        self._after_closure(model, optimizer)
        return optimizer.step(**kwargs)


def test_a_scaling_precision_plugin_is_served(tmp_path: Path) -> None:
    plain, scarce = ScarceModule(), ScarceModule(Scarce(most=4, phase="backward"))
    fit(plain, tmp_path, plugins=[Scaling()], gradient_clip_val=0.1)
    fit(scarce, tmp_path, BatchSizeController(), plugins=[Scaling()], gradient_clip_val=0.1)
    torch.testing.assert_close(weights(scarce), weights(plain), rtol=1e-12, atol=1e-12)


def test_bfloat16_autocast_runs(tmp_path: Path) -> None:
    module = TextModule(tiny_bert())
    fit(module, tmp_path, BatchSizeController(micro_batch_size=4), precision="bf16-mixed")
    assert torch.isfinite(weights(module)).all()


@pytest.mark.parametrize("shape", ["tuple", "encoding", "nested", "list"])
def test_batches_of_every_common_shape(shape: str, tmp_path: Path) -> None:
    def collate(samples):
        batch = torch.utils.data.default_collate(samples)
        if shape == "tuple":
            return batch["input_ids"], batch["labels"]
        if shape == "encoding":
            return BatchEncoding(batch)
        if shape == "nested":
            return {"x": {"tokens": batch, "names": [str(n) for n in range(len(samples))]}, "scale": torch.tensor(1.0)}
        return [batch["input_ids"], [batch["labels"], "a note"]]

    class Any_(ScarceModule):
        def training_step(self, batch, batch_idx):
            mask = None
            if shape == "tuple":
                ids, labels = batch
            elif shape == "encoding":
                assert isinstance(batch, BatchEncoding)
                ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
            elif shape == "nested":
                assert len(batch["x"]["names"]) == len(batch["x"]["tokens"]["labels"])
                ids, mask, labels = (batch["x"]["tokens"][key] for key in ("input_ids", "attention_mask", "labels"))
            else:
                ids, (labels, _) = batch
            return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss

    results = []
    for controller in (None, BatchSizeController(micro_batch_size=5)):
        module = Any_()
        trainer = quiet_trainer(tmp_path, callbacks=[controller] if controller else [])
        trainer.fit(module, text_loader(batch_size=12, collate_fn=collate))
        results.append(weights(module))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_a_users_split_and_weight(tmp_path: Path) -> None:
    def split(batch, size):
        rows = len(batch["labels"])
        return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, rows, size)]

    def weight(batch) -> float:
        return float(len(batch["labels"]))

    plain, module = ScarceModule(), ScarceModule(Scarce(most=3))
    fit(plain, tmp_path)
    fit(module, tmp_path, BatchSizeController(micro_batch_size=8, split=split, weight_by=weight))
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-12, atol=1e-12)


def test_a_single_sample_that_does_not_fit_raises_with_advice(tmp_path: Path) -> None:
    module = ScarceModule(Scarce(most=0))
    with pytest.raises(RuntimeError, match=r"A single sample .* does not fit into memory") as caught:
        fit(module, tmp_path, BatchSizeController())
    assert "gradient checkpointing" in str(caught.value)
    assert "GiB" in str(caught.value)
    assert OOM in str(caught.value)


def test_another_error_is_not_swallowed_and_the_trainer_is_left_as_found(tmp_path: Path) -> None:
    class Broken(TextModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("shapes do not match")

    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController()])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.fit(Broken(), text_loader())
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


def test_a_batch_that_cannot_be_split_runs_whole(tmp_path: Path) -> None:
    class Table(TextModule):
        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss * batch["class_weight"].sum()

    def collate(samples):
        return torch.utils.data.default_collate(samples) | {"class_weight": torch.ones(3)}

    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController(micro_batch_size=2)])
    with pytest.warns(UserWarning, match="cannot split this batch.*`split`"):
        trainer.fit(Table(), text_loader(collate_fn=collate))


def test_batch_norm_is_named_in_a_warning(tmp_path: Path) -> None:
    module = TextModule()
    module.model.norm = nn.BatchNorm1d(4)
    with pytest.warns(UserWarning, match=r"BatchNorm.*model\.norm"):
        fit(module, tmp_path, BatchSizeController(micro_batch_size=4))


def test_dry_run_changes_nothing_and_proposes(tmp_path: Path) -> None:
    plain, dry = TextModule(tiny_bert(dropout=0.1)), TextModule(tiny_bert(dropout=0.1))
    torch.manual_seed(5)
    fit(plain, tmp_path, batch_size=16)
    torch.manual_seed(5)
    trainer = fit(dry, tmp_path, BatchSizeController(dry_run=True), batch_size=16)
    assert torch.equal(weights(dry), weights(plain))
    [decision] = decision_log(trainer)
    assert (decision.old, decision.new, decision.applied) == (16, 2, False)
    assert decision.readings["peak_gib"] > 0


def test_a_whole_batch_without_padding_is_bit_identical_to_no_callback(tmp_path: Path) -> None:
    samples = text_samples(24, variable=False)
    plain, ours = TextModule(tiny_bert(dropout=0.1)), TextModule(tiny_bert(dropout=0.1))
    torch.manual_seed(5)
    fit(plain, tmp_path, samples=samples)
    torch.manual_seed(5)
    fit(ours, tmp_path, BatchSizeController(micro_batch_size=12), samples=samples)
    assert torch.equal(weights(ours), weights(plain))


def test_a_structure_decision_measures_anew(tmp_path: Path) -> None:
    class Pruner(AdaptiveCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 2:
                self.record(trainer, "structure", old=10, new=5, reason="half", readings={"removed": 0.5})

    controller = BatchSizeController()
    fit(TextModule(), tmp_path, controller, callbacks=[Pruner()], limit_train_batches=3)
    assert controller.state_dict()["policy"]["trials"] == {}
    assert controller.state_dict()["fit"]["added"] == []


@pytest.mark.parametrize(
    ("counts", "anew"),
    [
        ((4, 4, 0), True),  # frozen from the start: no step had all layers
        ((4, 4, 6), False),
        ((0, 2, 0), False),  # the first step had
        ((4, 2, 3), False),
    ],
)
def test_layers_that_train_for_the_first_time_are_measured_and_the_search_goes_on(
    tmp_path: Path, counts: tuple[int, int, int], anew: bool
) -> None:
    class Freezer(AdaptiveCallback):
        """Has frozen so many layers in the first step, the second and after it."""

        def on_train_start(self, trainer, pl_module) -> None:
            self.move(trainer, 0, counts[0])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.move(trainer, *counts[batch_idx : batch_idx + 2])

        def move(self, trainer, old: int, new: int) -> None:
            if old != new:
                self.record(trainer, "frozen_layers", old=old, new=new, reason="a test")

    controller = BatchSizeController()
    fit(TextModule(), tmp_path, controller, callbacks=[Freezer()], limit_train_batches=2)
    assert (controller.state_dict()["fit"]["added"] == []) == anew
    assert controller.state_dict()["policy"]["trials"]


def test_its_state_is_plain_and_resumes(tmp_path: Path) -> None:
    module = ScarceModule(Scarce(most=4))
    first = BatchSizeController(micro_batch_size=12)
    trainer = fit(module, tmp_path, first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["BatchSizeController"]
    assert state["policy"]["size"] == 3

    again = ScarceModule(Scarce(most=4))
    second = BatchSizeController(micro_batch_size=12)
    resumed = quiet_trainer(tmp_path, callbacks=[second], max_epochs=2)
    resumed.fit(again, text_loader(batch_size=12), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.scarce.errors == 0  # it goes on with 3


def test_another_machine_measures_anew(tmp_path: Path) -> None:
    controller = BatchSizeController()
    fit(TextModule(), tmp_path, controller)
    state = controller.state_dict()
    state["machine"] = {"device": "another", "memory_gib": 1.0}
    state["policy"] |= {"searching": False, "size": 4}
    moved = BatchSizeController()
    moved.load_state_dict(state)
    fit(TextModule(), tmp_path, moved, limit_train_batches=1)
    assert moved.state_dict()["policy"]["searching"] is True
    assert moved.state_dict()["policy"]["size"] == 4


def test_it_pickles_before_fit() -> None:
    copied = pickle.loads(pickle.dumps(BatchSizeController(micro_batch_size=4, split_by="samples")))
    assert copied.micro_batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size must be 'auto' or a whole number.*got 0"),
        ({"micro_batch_size": -2}, "got -2"),
        ({"micro_batch_size": "big"}, "got 'big'"),
        ({"micro_batch_size": True}, "got True"),
        ({"micro_batch_size": 2.5}, "got 2.5"),
        ({"split_by": "rows"}, "split_by must be 'tokens' or 'samples', got 'rows'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be 'auto', null or a whole number.* got 0"),
        ({"pad_to_multiple_of": "8"}, "got '8'"),
        ({"weight_by": "length"}, "weight_by must be .* got 'length'"),
        ({"memory_limit_gib": 0}, "memory_limit_gib must be .* got 0"),
        ({"memory_limit_gib": "4"}, "got '4'"),
        ({"memory_fraction": 0}, r"memory_fraction must be in \(0, 1\], got 0"),
        ({"memory_fraction": 1.5}, "got 1.5"),
        ({"split": "tokens"}, "split must be a callable"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BatchSizeController(**arguments)


def test_a_limit_already_exceeded_is_refused_before_training(tmp_path: Path) -> None:
    module = TextModule()
    with pytest.raises(ConfigurationError, match=r"uses .* GiB before training .*memory_limit_gib=0\.01"):
        fit(module, tmp_path, BatchSizeController(memory_limit_gib=0.01))
    assert module.losses == []


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch])
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy"])
def test_strategies_that_shard_are_refused_before_training(namespace, name: str) -> None:
    # Lightning's own classes; their constructors want GPUs or packages that are not here.
    strategy = object.__new__(getattr(namespace.strategies, name))
    trainer = SimpleNamespace(strategy=strategy, callbacks=[], world_size=2)
    module = TextModule()
    for stage in ("fit", "validate", "test", "predict"):
        with pytest.raises(ConfigurationError, match=rf"{name}.*sharded over the ranks.*strategy='auto' or 'ddp'"):
            BatchSizeController().setup(trainer, module, stage)


def test_a_strategy_that_shards_is_refused_by_fit(tmp_path: Path) -> None:
    class FSDPLike(type(quiet_trainer(tmp_path).strategy)):
        pass

    module = TextModule()
    with pytest.raises(ConfigurationError, match=r"FSDPLike.*sharded over the ranks"):
        fit(module, tmp_path, BatchSizeController(), strategy=FSDPLike(device="cpu"))
    assert not module.losses


def test_lbfgs_and_manual_optimization_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="LBFGS"):
        fit(TextModule(optimizer="LBFGS"), tmp_path, BatchSizeController())

    module = TextModule()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic optimization"):
        fit(module, tmp_path, BatchSizeController())


def test_a_long_batch_that_runs_out_does_not_shrink_the_others(tmp_path: Path) -> None:
    class Full(TextModule):
        def training_step(self, batch, batch_idx):
            if batch["input_ids"].shape[1] == 64 and len(batch["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    short, long = text_samples(16, variable=False), text_samples(8, length=64, variable=False)
    batches = [torch.utils.data.default_collate(part) for part in (short[:8], short[8:], long, short[:8])]
    controller = BatchSizeController(micro_batch_size=8, memory_limit_gib=process_memory_bytes() / 2**30 + 2)
    # 8 samples of 16 tokens are known to add 1 GiB: of 64 tokens, 3 or 4 are expected to fit.
    for length in (8, 16, 24):
        controller._fit.observe(8, length, added_bytes=length / 16 * 2**30)
    module = Full(optimizer="SGD")
    trainer = quiet_trainer(tmp_path, callbacks=[controller])
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    reasons = [decision.reason for decision in decision_log(trainer)]
    assert any("others go on at 8" in reason for reason in reasons)
    state = controller.state_dict()
    assert state["policy"]["size"] == 8
    assert state["policy"]["ceiling"] is None
    assert {shape[1] for shape in state["fit"]["exceeded"]} == {64}

    plain = TextModule(optimizer="SGD")
    quiet_trainer(tmp_path).fit(plain, torch.utils.data.DataLoader(batches, batch_size=None))
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-4, atol=1e-6)
