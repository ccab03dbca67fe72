"""Whole layers that go while a model trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from adaptrain import ConfigurationError, CubicSchedule, ProgressivePruning, load_from_checkpoint
from adaptrain.callbacks.base import decision_log
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from tests.pruning.models import MODELS
from tests.toys import TextModule, language_model_samples, quiet_trainer, text_loader, tiny_bert, tiny_llama, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from.*"),
]
ALL = ("heads", "ffn", "layers")
BUILD = {"bert": lambda: tiny_bert(layers=4), "llama": lambda: tiny_llama(layers=4)}


class Idle(pl.Callback):
    """Takes the second layer's gradients away: what has none is worth nothing, and the layer is the one to go."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in find_family(pl_module).layers[1].parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def fit(folder: Path, name: str, *, resume: Path | None = None) -> Any:
    callback = ProgressivePruning(
        target={"flops": 0.6}, groups=ALL, schedule=CubicSchedule(begin=0.35, end=0.7, events=2)
    )
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_epochs=1)
    trainer = quiet_trainer(folder, callbacks=[Idle(), callback, saving], max_epochs=4, enable_checkpointing=True)
    module = TextModule(BUILD[name]())
    samples = language_model_samples() if name == "llama" else None
    trainer.fit(module, text_loader(samples), ckpt_path=None if resume is None else str(resume))
    return trainer, module, callback


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_layers_are_dropped_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name) -> None:
    trainer, expected, callback = fit(tmp_path / "whole", name)
    kept = structures.current(find_family(expected))
    assert [structures.is_dropped(layer) for layer in kept] == [False, True, False, False]
    reasons = [decision.reason for decision in decision_log(trainer)]
    assert sum("and 1 whole layer removed" in reason for reason in reasons) == 1
    assert sum("and 0 whole layers removed" in reason for reason in reasons) == len(reasons) - 1
    assert callback.report()["constraints"][0]["met"]
    for saved in (12, 18):
        path = tmp_path / "whole" / f"step={saved}.ckpt"
        _, module, _ = fit(tmp_path / f"from{saved}", name, resume=path)
        assert module.losses == expected.losses[saved:]
        assert torch.equal(weights(module), weights(expected))
        assert structures.current(find_family(module)) == kept
    loaded = load_from_checkpoint(TextModule, tmp_path / "whole" / "step=24.ckpt", model=BUILD[name]())
    assert torch.equal(weights(loaded), weights(expected))


def test_t5_keeps_its_layers_and_says_why(tmp_path) -> None:
    callback = ProgressivePruning(target={"flops": 0.5}, groups=ALL)
    with pytest.raises(ConfigurationError, match="has none to prune"):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(TextModule(MODELS["t5"]()), text_loader())


def test_layers_go_only_with_all_that_is_in_them() -> None:
    with pytest.raises(ConfigurationError, match="without heads and ffn"):
        ProgressivePruning(target={"flops": 0.5}, groups=["ffn", "layers"])
