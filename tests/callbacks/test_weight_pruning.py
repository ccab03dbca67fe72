from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from adaptrain import ConfigurationError, CubicSchedule, OneShotSchedule, ProgressivePruning, WeightPruning
from adaptrain.callbacks.base import decision_log
from adaptrain.pruning.families import find_family
from adaptrain.pruning.weight_masks import masked_projections, zero_share
from tests.pruning.models import MODELS
from tests.toys import (
    TextModule,
    ValidatedTextModule,
    language_model_samples,
    quiet_trainer,
    text_loader,
    tiny_bert,
    weights,
)

TWO = CubicSchedule(begin=0.2, end=0.6, events=2)
WeightAveraging: Any = getattr(pl.callbacks, "EMAWeightAveraging", None)  # since Lightning 2.6


def run(tmp_path: Path, callback: Any, module: Any = None, *, others: Any = (), **settings: Any) -> Any:
    module = module or TextModule()
    trainer = quiet_trainer(tmp_path, callbacks=[callback, *others], **({"max_epochs": 2} | settings))
    language = hasattr(module.model, "lm_head")
    trainer.fit(module, text_loader(language_model_samples() if language else None))
    return trainer, module


def zeros(module: Any) -> float:
    return zero_share(part.weight for part in masked_projections(find_family(module)).values())


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_weights_become_zero_in_events_and_stay_so(tmp_path, optimizer) -> None:
    shares: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            shares.append(zeros(pl_module))

    callback = WeightPruning(sparsity=0.75, schedule=TWO)
    trainer, module = run(tmp_path, callback, TextModule(optimizer=optimizer), others=[Watch()])
    first = 0.75 * TWO.plan()[0].share
    assert sorted({round(share, 3) for share in shares}) == pytest.approx([0.0, first, 0.75], abs=2e-3)
    assert shares == sorted(shares)  # no step brings one back
    assert callback.report()["zeros"] == pytest.approx(0.75, abs=1e-3)
    decisions = [d for d in decision_log(trainer) if d.knob == "weight_sparsity"]
    assert [d.new for d in decisions] == pytest.approx([first, 0.75], abs=1e-3)
    assert "75% of the weights are zero" in decisions[-1].reason
    assert len(set(module.losses)) == len(module.losses)  # what is left goes on learning


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_of_every_four_weights_along_the_inputs_two_stay(tmp_path, name) -> None:
    callback = WeightPruning(granularity="2:4", schedule=TWO)
    _, module = run(tmp_path, callback, TextModule(MODELS[name]()))
    for part in masked_projections(find_family(module)).values():
        rows = part.weight.T if part.transposed else part.weight
        assert ((rows.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert callback.report()["zeros"] == pytest.approx(0.5, abs=0.02)


def test_the_trajectory_is_that_of_training_with_masked_weights(tmp_path) -> None:
    """Against a plain loop that masks gradients and weights itself."""
    callback = WeightPruning(sparsity=0.5, schedule=OneShotSchedule(at=0.5))
    _, module = run(tmp_path, callback, TextModule().double())

    expected = TextModule().double()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2)
    masks: dict[Any, torch.Tensor] = {}
    for step, batch in enumerate([*text_loader(), *text_loader()]):
        expected.model(**batch).loss.backward()
        for parameter, mask in masks.items():
            parameter.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        if step == 5:
            parts = [part.weight for part in masked_projections(find_family(expected)).values()]
            sizes = torch.cat([part.detach().abs().flatten() for part in parts])
            limit = sizes.kthvalue(len(sizes) // 2).values
            masks = {part: part.detach().abs() > limit for part in parts}
        for parameter, mask in masks.items():
            parameter.data.mul_(mask)
    assert torch.allclose(weights(module), weights(expected), rtol=0, atol=1e-12)


def test_what_zeros_buy_is_measured_and_said(tmp_path, caplog) -> None:
    callback = WeightPruning(sparsity=0.9, schedule=TWO)
    with caplog.at_level(logging.INFO, logger="adaptrain"):
        run(tmp_path, callback)
    report = callback.report()
    assert report["compressed_bytes"] < 0.8 * report["size_bytes"]
    assert 0.2 < report["latency"] < 5  # two models of one shape
    assert "90% of the weights" in caplog.text


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from.*")
@pytest.mark.parametrize("arguments", [{"sparsity": 0.6}, {"granularity": "1:4"}])
@pytest.mark.parametrize("saved", [6, 12, 18])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, arguments, saved) -> None:
    def fit(folder: Path, resume: Path | None = None) -> Any:
        saving = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_epochs=1)
        trainer = quiet_trainer(
            folder,
            callbacks=[WeightPruning(schedule=TWO, **arguments), saving],
            max_epochs=4,
            enable_checkpointing=True,
        )
        module = TextModule()
        trainer.fit(module, text_loader(), ckpt_path=None if resume is None else str(resume))
        return module

    expected = fit(tmp_path / "whole")
    resumed = fit(tmp_path / "resumed", tmp_path / "whole" / f"step={saved}.ckpt")
    assert torch.equal(weights(resumed), weights(expected))
    plain = TextModule.load_from_checkpoint(tmp_path / "whole" / "step=24.ckpt")  # no callback, plain parameters
    assert zeros(plain) == zeros(expected) > 0.5


@pytest.mark.parametrize("order", [1, -1])
def test_it_goes_with_cutting_the_structure(tmp_path, order) -> None:
    masking = WeightPruning(sparsity=0.5, schedule=CubicSchedule(begin=0.3, end=0.8, events=2))
    cutting = ProgressivePruning(target={"flops": 0.6}, schedule=TWO)
    first, second = (masking, cutting)[::order]
    trainer, module = run(tmp_path, first, others=[second], max_epochs=3)
    assert {d.knob for d in decision_log(trainer)} >= {"structure", "weight_sparsity"}
    assert cutting.report()["constraints"][0]["met"]
    assert zeros(module) == pytest.approx(0.5, abs=0.01)
    assert masking.report()["size_bytes"] < 4 * sum(p.numel() for p in TextModule().parameters())


@pytest.mark.skipif(WeightAveraging is None, reason="needs Lightning 2.6")
def test_averaged_weights_have_the_same_zeros(tmp_path) -> None:
    module = ValidatedTextModule()
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[WeightPruning(sparsity=0.5, schedule=TWO), WeightAveraging(decay=0.9)],
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, text_loader(), text_loader())
    assert zeros(module) == pytest.approx(0.5, abs=1e-3)  # it holds the average now


def test_training_that_ends_early_still_ends_with_the_zeros(tmp_path, caplog) -> None:
    callback = WeightPruning(sparsity=0.5, schedule=CubicSchedule(begin=0.2, end=1.0, events=3))

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 6

    _, module = run(tmp_path, callback, others=[Stop()])
    assert zeros(module) == pytest.approx(0.5, abs=1e-3)
    assert "Training ended before event" in caplog.text


def test_a_matrix_that_cannot_hold_the_pattern_is_refused_by_name(tmp_path) -> None:
    module = TextModule(tiny_bert(ffn=66))
    with pytest.raises(ConfigurationError, match=r"multiples of 4, but layer 0, output.dense has 66"):
        run(tmp_path, WeightPruning(granularity="2:4"), module)


def test_an_unknown_model_is_refused_before_training(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"found none\. Supported: BERT"):
        run(tmp_path, WeightPruning(sparsity=0.5), TextModule(torch.nn.Linear(2, 2)))


def test_accumulated_steps_keep_the_zeros(tmp_path) -> None:
    _, module = run(tmp_path, WeightPruning(sparsity=0.5, schedule=TWO), accumulate_grad_batches=2, max_epochs=4)
    assert zeros(module) == pytest.approx(0.5, abs=1e-3)
