"""The training-step seam, in both namespaces."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch

from adaptrain._lightning.training_step import wrap_training_step
from tests.toys import TextModule, quiet_trainer, text_loader, tiny_bert


class Indexed(TextModule):
    """A step that does not ask for the number of the batch."""

    def training_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
        return self.model(**batch).loss


@pytest.mark.parametrize("namespace", [pl, lightning_pl])
@pytest.mark.parametrize("kind", [TextModule, Indexed])
def test_every_step_is_wrapped_and_returns_what_the_wrapper_does(tmp_path, namespace, kind) -> None:
    class Module(namespace.LightningModule):
        training_step = kind.training_step
        configure_optimizers = TextModule.configure_optimizers
        on_train_batch_end = TextModule.on_train_batch_end

    found = []
    for factor in (None, 3.0):
        module = Module()
        module.model, module.lr, module.optimizer_name, module.losses = tiny_bert(), 0.0, "SGD", []
        if factor is not None:
            undo = wrap_training_step(module, lambda step, factor=factor: factor * step())
        quiet_trainer(tmp_path, namespace=namespace).fit(module, text_loader())
        found.append(module.losses)
    assert found[1] == pytest.approx([3 * loss for loss in found[0]])
    undo()
    assert "training_step" not in module.__dict__


def test_wrappers_come_off_in_the_order_they_were_put_on_backwards() -> None:
    module = TextModule()
    batch = next(iter(text_loader()))
    own = module.training_step
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    plain = float(own(batch, 0).detach())
    inner = wrap_training_step(module, lambda step: 2 * step())
    outer = wrap_training_step(module, lambda step: 1 + step())
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(1 + 2 * plain)
    inner()  # not the outermost: stays
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(1 + 2 * plain)
    outer()
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(2 * plain)
    inner()
    assert module.training_step == own
