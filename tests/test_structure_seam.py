"""Lightning's private places that a model with changing shapes depends on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch

from adaptrain._lightning.structure import before_hook, unwrapped, validation_follows
from tests.toys import TextModule, ValidatedTextModule, quiet_trainer, text_loader


class Recording(TextModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls.append("module loads")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls.append("module saves")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("weights")
        return super().load_state_dict(*args, **kwargs)


@pytest.mark.parametrize("weights_only", [False, True])
def test_module_hooks_run_before_weights_load_and_at_every_save(tmp_path, weights_only) -> None:
    module = Recording()
    trainer = quiet_trainer(tmp_path, max_steps=1, max_epochs=-1)
    undo = [
        before_hook(module, "on_save_checkpoint", lambda saved: module.calls.append("before save")),
        before_hook(module, "on_load_checkpoint", lambda saved: module.calls.append("before load")),
    ]
    trainer.fit(module, text_loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    assert module.calls == ["before save", "module saves"]
    module.calls.clear()
    trainer.validate_loop.trainer.strategy.connect(module)
    trainer._checkpoint_connector._restore_modules_and_callbacks(tmp_path / "x.ckpt")
    assert module.calls == ["before load", "module loads", "weights"]
    for each in undo:
        each()
    assert "on_load_checkpoint" not in module.__dict__
    assert "on_save_checkpoint" not in module.__dict__


def test_an_instance_hook_of_the_user_is_put_back() -> None:
    module, seen = TextModule(), []
    own = module.on_load_checkpoint = seen.append  # type: ignore[method-assign]
    undo = before_hook(module, "on_load_checkpoint", lambda saved: seen.append("before"))
    module.on_load_checkpoint({"x": 1})
    assert seen == ["before", {"x": 1}]
    undo()
    assert module.on_load_checkpoint is own


@pytest.mark.parametrize("namespace", [pl, lightning_pl])
def test_validation_is_foretold(tmp_path, namespace) -> None:
    class Module(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ValidatedTextModule()
            self.foretold: list[int] = []
            self.validated: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.inner.model(**batch).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_validation_start(self) -> None:
            if not self.trainer.sanity_checking:
                self.validated.append(self.trainer.global_step)

        def on_train_batch_end(self, *_: Any) -> None:
            if validation_follows(self.trainer):
                self.foretold.append(self.trainer.global_step)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = quiet_trainer(tmp_path, namespace=namespace, max_epochs=2, val_check_interval=4)
    trainer.fit(module, text_loader(), text_loader())
    assert module.foretold == module.validated == [4, 10]


def test_nothing_to_unwrap_in_one_process(tmp_path) -> None:
    class Unwraps(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with unwrapped(trainer):
                assert trainer.strategy.model is pl_module
            assert trainer.strategy.model is pl_module

    quiet_trainer(tmp_path, callbacks=[Unwraps()], max_steps=2, max_epochs=-1).fit(TextModule(), text_loader())
