from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from adaptrain import ConfigurationError, OneShotSchedule, ProgressivePruning, Quantization
from adaptrain.callbacks.base import decision_log
from adaptrain.compression import load_quantized, quantize
from adaptrain.compression.int8 import Int8Linear
from tests.toys import TextModule, quiet_trainer, text_loader, tiny_bert, weights


class Judged(TextModule):
    """Logs an accuracy that the test sets by the kind of model that is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = {"Linear": 0.9, "Int8Linear": 0.9, "Int4Linear": 0.9}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", self.accuracy[type(self.model.classifier).__name__])
        self.log("val/loss", self.model(**batch).loss)


def run(tmp_path, callback: Any, module: Any = None, others: Any = (), **settings: Any) -> Any:
    module = module or Judged()
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0} | settings
    trainer = quiet_trainer(tmp_path, callbacks=[callback, *others], **settings)
    trainer.fit(module, text_loader(), text_loader() if isinstance(module, Judged) else None)
    return trainer, module


def test_a_run_leaves_a_copy_in_lower_precision(tmp_path) -> None:
    callback = Quantization(method="int8_dynamic")
    pruning = ProgressivePruning(target={"flops": 0.6}, schedule=OneShotSchedule(at=0.5))
    trainer, module = run(tmp_path, callback, others=[pruning])
    assert module.model.classifier.weight.dtype == torch.float32  # the trained one stays
    small = load_quantized(tmp_path / "quantized")
    assert type(small.classifier) is Int8Linear
    inputs = dict(next(iter(text_loader())))
    with torch.no_grad():
        expected, said = module.model.eval()(**inputs).logits, small(**inputs).logits
    assert float((said - expected).abs().max()) < 0.1 * float(expected.abs().max())
    decision = next(d for d in decision_log(trainer) if d.knob == "precision")
    assert (decision.old, decision.new) == ("float32", "int8_dynamic")
    assert "val/accuracy 0.9 → 0.9" in decision.reason
    assert [trial["method"] for trial in callback.report()] == ["none", "int8_dynamic"]


def test_a_method_that_does_not_run_here_is_refused_before_training(tmp_path, monkeypatch) -> None:
    def no_kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(Int8Linear, "forward", no_kernel)
    module = Judged()
    with pytest.raises(ConfigurationError, match="'int8_weight' does not run here: NotImplementedError: no kernel"):
        run(tmp_path, Quantization(method="int8_weight"), module)
    assert not module.losses
    run(tmp_path, Quantization(), module)  # of several, it is one that is left out
    assert module.losses


@pytest.mark.parametrize("method", ["bf16", "int8_dynamic", "int8_weight", "int4_weight"])
def test_training_is_as_without_it(tmp_path, method) -> None:
    _, plain = run(tmp_path, pl.Callback())
    _, module = run(tmp_path, Quantization(method=method))
    assert torch.equal(weights(module), weights(plain))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("method", ["bf16", "int8_dynamic", "int8_weight", "int4_weight"])
def test_what_is_validated_in_another_precision_is_saved_as_it_was_made(tmp_path, precision, method) -> None:
    _, module = run(tmp_path, Quantization(method=method), precision=precision)
    expected = quantize(module.model, method).model.state_dict()
    found = load_file(tmp_path / "quantized" / "model.safetensors")
    assert len(found) > 10
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name])
    kept = load_quantized(tmp_path / "quantized").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in expected.items())


def test_what_loses_too_much_is_not_chosen(tmp_path, caplog) -> None:
    module = Judged()
    module.accuracy = {"Linear": 0.9, "Int8Linear": 0.8, "Int4Linear": 0.7}
    callback = Quantization(minimize="size", max_metric_drop=0.05)
    with caplog.at_level(logging.INFO, logger="adaptrain"):
        run(tmp_path, callback, module)
    trials = {trial["method"]: trial for trial in callback.report()}
    assert "loses 0.1, more than max_metric_drop=0.05" in trials["int8_weight"]["refused"]
    assert load_quantized(tmp_path / "quantized").dtype == torch.bfloat16
    assert "bf16" in caplog.text


def test_a_model_that_diverged_is_left_as_it_is(tmp_path) -> None:
    module = Judged()
    module.accuracy = dict.fromkeys(module.accuracy, math.nan)
    callback = Quantization()
    trainer, _ = run(tmp_path, callback, module)
    assert [d.new for d in decision_log(trainer) if d.knob == "precision"] == ["none"]
    assert {trial["refused"] for trial in callback.report()} == {
        None,
        "its metric is nan, that of the model as it is nan",
    }

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "quantized" / "quantized.json").read_text(), parse_constant=refuse)


def test_without_validation_it_goes_by_cost_and_says_so(tmp_path, caplog) -> None:
    run(tmp_path, Quantization(minimize="size"), TextModule())
    assert "chosen by cost alone" in caplog.text
    assert (tmp_path / "quantized" / "model.safetensors").is_file()


def test_a_dry_run_writes_nothing_and_says_what_would_be(tmp_path) -> None:
    plain = TextModule()
    quiet_trainer(tmp_path / "plain", max_epochs=2).fit(plain, text_loader())
    trainer, module = run(tmp_path / "dry", Quantization(method="bf16", dry_run=True), TextModule())
    assert torch.equal(weights(module), weights(plain))
    assert not (tmp_path / "dry" / "quantized").exists()
    assert [d.applied for d in decision_log(trainer) if d.knob == "precision"] == [False]


def test_a_module_that_is_its_own_model_is_refused(tmp_path) -> None:
    class Both(TextModule):
        def __init__(self) -> None:
            super().__init__(torch.nn.Identity())
            self.bert = tiny_bert().bert
            self.config, self.base_model_prefix = self.bert.config, "bert"

        @property
        def base_model(self) -> Any:
            return self.bert

    with pytest.raises(ConfigurationError, match="in one"):
        run(tmp_path, Quantization(), Both())


class Seen(pl.Callback):
    """Notes, for each step, whether the model computes with rounded weights."""

    def __init__(self) -> None:
        self.steps: list[bool] = []
        self.at_end: bool | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append("forward" in pl_module.model.classifier.__dict__)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.at_end = "forward" in pl_module.model.classifier.__dict__


@pytest.mark.parametrize("method", ["int4_weight", "int8_dynamic"])
def test_the_last_part_of_training_is_quantization_aware(tmp_path, method) -> None:
    seen = Seen()
    trainer, module = run(tmp_path, Quantization(method=method, aware_from=0.5), TextModule(), others=[seen])
    half = len(seen.steps) // 2
    assert seen.steps == [False] * half + [True] * half
    assert seen.at_end is False  # so that what others measure at the end is the plain model
    began = next(d for d in decision_log(trainer) if d.knob == "fake_quantization")
    assert (began.step, began.old, began.new) == (half, "none", method)
    assert "50% of training are over" in began.reason
    assert "forward" not in module.model.classifier.__dict__
    assert load_quantized(tmp_path / "quantized") is not None


# The resumed run saves nothing.
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_a_resumed_run_is_aware_where_it_was(tmp_path) -> None:
    def fit(folder: Any, resume: Any = None) -> TextModule:
        torch.manual_seed(0)
        callbacks: list[Any] = [Quantization(method="int4_weight", aware_from=0.4)]
        if resume is None:
            callbacks.append(ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1))
        trainer = quiet_trainer(folder, callbacks=callbacks, max_epochs=4, enable_checkpointing=resume is None)
        module = TextModule()
        trainer.fit(module, text_loader(), ckpt_path=resume)
        return module

    expected = fit(tmp_path / "whole")
    module = fit(tmp_path / "resumed", tmp_path / "whole" / "step=12.ckpt")
    assert module.losses == expected.losses[12:]
    assert torch.equal(weights(module), weights(expected))


def test_a_failing_run_leaves_the_model_as_it_was(tmp_path) -> None:
    class Failing(TextModule):
        def on_train_epoch_end(self) -> None:
            assert "forward" in self.model.classifier.__dict__
            raise RuntimeError("on purpose")

    module = Failing()
    trainer = quiet_trainer(tmp_path, callbacks=[Quantization(method="int8_weight", aware_from=0.0)], max_epochs=2)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, text_loader())
    assert "forward" not in module.model.classifier.__dict__


def test_a_dry_run_is_not_aware(tmp_path) -> None:
    seen = Seen()
    callback = Quantization(method="int4_weight", aware_from=0.5, dry_run=True)
    trainer, _ = run(tmp_path, callback, TextModule(), others=[seen])
    assert not any(seen.steps)
    assert [d.applied for d in decision_log(trainer) if d.knob == "fake_quantization"] == [False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "int4_weight", "aware_from": 1.0}, "in \\[0, 1\\), got 1.0"),
        ({"method": "int4_weight", "aware_from": True}, "got True"),
        ({"aware_from": 0.8}, "method must be one of int8_dynamic, int8_weight, int4_weight, got 'auto'"),
        ({"method": "bf16", "aware_from": 0.8}, "got 'bf16'"),
    ],
)
def test_an_aware_run_needs_a_share_and_a_method(arguments, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Quantization(**arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_a_compiled_model_is_compiled_anew_when_it_becomes_aware(tmp_path) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = tiny_bert()
        module = TextModule(torch.compile(model, backend="eager") if compiled else model)
        callback = Quantization(method="int4_weight", aware_from=0.5)
        trainer = quiet_trainer(tmp_path / str(compiled), callbacks=[callback], max_epochs=2)
        trainer.fit(module, text_loader())
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.manual_seed(0)
    unaware = TextModule(tiny_bert())
    quiet_trainer(tmp_path / "unaware", max_epochs=2).fit(unaware, text_loader())
    assert unaware.losses != pytest.approx(losses[0], rel=1e-4)  # so that the comparison says something
