"""The teacher in training. Also the script of the run that is killed."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from adaptrain import (
    BatchSizeController,
    ConfigurationError,
    CubicSchedule,
    Distillation,
    ProgressivePruning,
    load_from_checkpoint,
)
from adaptrain.callbacks.base import decision_log
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from tests.processes import run_python
from tests.toys import (
    TextModule,
    language_model_samples,
    quiet_trainer,
    text_loader,
    tiny_bert,
    tiny_llama,
    weights,
)

STEPS, EVENT = 24, 9  # the first event comes after step 9, the last after step 17, a checkpoint every 6 steps

# Tests read and write checkpoints across runs and folders on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from.*"),
]


class KillAt(pl.Callback):
    """SIGKILL, with no chance to clean up, after `step` optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def pruning(**arguments: Any) -> ProgressivePruning:
    schedule = CubicSchedule(begin=0.35, end=0.7, events=2)
    return ProgressivePruning(**({"target": {"flops": 0.5}, "schedule": schedule} | arguments))


def fit(
    folder: Path,
    callbacks: list[Any],
    *,
    module: Any = None,
    resume: Path | None = None,
    samples: Any = None,
    save: bool = False,
    **settings: Any,
) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    extra = [ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_epochs=1)] if save else []
    trainer = quiet_trainer(folder, callbacks=[*callbacks, *extra], max_epochs=4, enable_checkpointing=save, **settings)
    module = module if module is not None else TextModule()
    trainer.fit(module, text_loader(samples), ckpt_path=None if resume is None else str(resume))
    return trainer, module


class Watch(pl.Callback):
    """Keeps the weights of every step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights[trainer.global_step] = {k: v.clone() for k, v in pl_module.model.state_dict().items()}


@pytest.mark.parametrize("order", [1, -1])
def test_the_dense_model_before_the_first_event_teaches(tmp_path, order) -> None:
    watch, distillation = Watch(), Distillation()
    trainer, _ = fit(tmp_path, [watch, *[distillation, pruning()][::order]])
    teacher = distillation._model
    assert teacher is not None
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, watch.weights[EVENT][name])
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    (decision,) = [d for d in decision_log(trainer) if d.knob == "distillation"]
    assert (decision.step, decision.old, decision.new) == (EVENT, 0.0, 0.5)
    assert decision.reason.startswith(f"The dense model of step {EVENT} teaches from here on, with 50% of the loss")
    assert decision.readings["teacher_params"] == sum(p.numel() for p in tiny_bert().parameters())


def test_it_changes_nothing_before_and_the_loss_after(tmp_path) -> None:
    _, plain = fit(tmp_path / "plain", [pruning()])
    _, taught = fit(tmp_path / "taught", [pruning(), Distillation()])
    assert taught.losses[:EVENT] == plain.losses[:EVENT]
    assert taught.losses[EVENT] != plain.losses[EVENT]
    assert not torch.equal(weights(taught), weights(plain))


def test_a_student_follows_its_teacher(tmp_path) -> None:
    _, teacher = fit(tmp_path / "teacher", [])
    far = []
    for weight in (None, 1.0):
        module = TextModule(tiny_bert(ffn=32, heads=2))
        _, module = fit(
            tmp_path / str(weight), [] if weight is None else [Distillation(teacher=teacher.model, weight=weight)],
            module=module,
        )  # fmt: skip
        batch = next(iter(text_loader(batch_size=48)))
        with torch.no_grad():
            logits = [model.eval()(**batch).logits.log_softmax(-1) for model in (module.model, teacher.model)]
        far.append(float((logits[0] - logits[1]).square().mean()))
    assert far[1] < 0.6 * far[0]


@pytest.mark.parametrize("hidden", [False, True])
def test_micro_batches_are_taught_like_the_batch(tmp_path, hidden) -> None:
    found = []
    for others in ([], [BatchSizeController(micro_batch_size=3)]):
        module = TextModule(tiny_bert().double(), optimizer="SGD", lr=0.05)
        fit(
            tmp_path / str(len(others)),
            [pruning(importance="magnitude"), Distillation(hidden=hidden), *others],
            module=module,
        )
        found.append((weights(module), module.losses))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6, rtol=0)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


def test_micro_batches_of_a_language_model_are_taught_like_the_batch(tmp_path) -> None:
    teacher = tiny_llama(ffn=96).double()
    found = []
    for others in ([], [BatchSizeController(micro_batch_size=3)]):
        module = TextModule(tiny_llama().double(), optimizer="SGD", lr=0.05)
        callbacks = [Distillation(teacher=teacher), *others]
        fit(tmp_path / str(len(others)), callbacks, module=module, samples=language_model_samples())
        found.append(weights(module))
    assert torch.allclose(*found, atol=1e-6, rtol=0)  # transformers forms this loss in single precision


def test_samples_of_a_later_epoch_are_not_asked_about_again(tmp_path) -> None:
    passes: dict[float, int] = {}
    found = []
    for cache_mib in (0, 64):
        teacher = tiny_bert(ffn=96)
        passes[cache_mib] = 0

        def count(*_: Any, size: float = cache_mib) -> None:
            passes[size] += 1

        distillation = Distillation(teacher=teacher, cache_mib=cache_mib)
        module = TextModule()
        teacher.register_forward_hook(count)
        fit(tmp_path / str(cache_mib), [distillation], module=module)
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert passes[0] - passes[64] == STEPS * 3 // 4  # three of four epochs


def test_every_other_step(tmp_path) -> None:
    asked = []
    teacher = tiny_bert(ffn=96)
    teacher.register_forward_hook(lambda *_: asked.append(1))
    distillation = Distillation(teacher=teacher, every=3, cache_mib=0)
    _, module = fit(tmp_path, [distillation])
    assert len(asked) == 1 + STEPS // 3  # once to be checked
    _, plain = fit(tmp_path, [])
    assert module.losses[0] != plain.losses[0]


def test_a_saved_model_teaches_from_the_start(tmp_path) -> None:
    tiny_bert(ffn=96).save_pretrained(tmp_path / "teacher")
    trainer, module = fit(tmp_path / "path", [Distillation(teacher=str(tmp_path / "teacher"))])
    _, given = fit(tmp_path / "module", [Distillation(teacher=tiny_bert(ffn=96))])
    assert torch.equal(weights(module), weights(given))
    (decision,) = decision_log(trainer)
    assert decision.step == 0


@pytest.mark.parametrize(
    ("build", "arguments", "seen"),
    [
        (lambda: "nowhere", {}, "The teacher 'nowhere' cannot be loaded"),
        (lambda: tiny_bert().bert, {}, "BertModel returns none"),
        (lambda: tiny_bert(hidden=16), {"hidden": True}, "16 wide and the student's 32"),
        (tiny_llama, {}, r"\(4, 64\) for each sample, the student's \(3,\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(tmp_path, monkeypatch, build, arguments, seen) -> None:
    monkeypatch.chdir(tmp_path)
    module = TextModule()
    with pytest.raises(ConfigurationError, match=seen):
        fit(tmp_path, [Distillation(teacher=build(), **arguments)], module=module)
    assert module.losses == []


def test_regression_and_manual_optimization_are_refused(tmp_path) -> None:
    regression = tiny_bert()
    regression.config.problem_type = "regression"
    with pytest.raises(ConfigurationError, match="trained for regression"):
        fit(tmp_path, [Distillation()], module=TextModule(regression))
    manual = TextModule()
    manual.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic_optimization=False"):
        fit(tmp_path, [Distillation()], module=manual)


def test_without_a_change_of_structure_it_says_that_it_did_nothing(tmp_path, caplog) -> None:
    _, plain = fit(tmp_path / "plain", [])
    with caplog.at_level(logging.WARNING):
        _, module = fit(tmp_path / "alone", [Distillation()])
    assert "Distillation did nothing" in caplog.text
    assert torch.equal(weights(module), weights(plain))


def test_a_dry_run_beside_real_pruning_teaches_nothing(tmp_path) -> None:
    _, plain = fit(tmp_path / "plain", [pruning()])
    trainer, module = fit(tmp_path / "dry", [pruning(), Distillation(dry_run=True)])
    assert torch.equal(weights(module), weights(plain))
    (decision,) = [d for d in decision_log(trainer) if d.knob == "distillation"]
    assert not decision.applied


def test_pruning_that_only_comes_at_the_end_takes_no_teacher(tmp_path) -> None:
    class StopEarly(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 8

    trainer, _ = fit(tmp_path, [pruning(), Distillation(), StopEarly()])
    assert [d for d in decision_log(trainer) if d.knob == "structure"]
    assert not [d for d in decision_log(trainer) if d.knob == "distillation"]


class Logged(pl.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.names |= set(metrics)


def test_it_logs_the_teachers_part_and_leaves_the_step_as_it_was(tmp_path) -> None:
    logger = Logged()
    _, module = fit(tmp_path, [pruning(), Distillation()], logger=logger, log_every_n_steps=1)
    assert "adaptrain/distillation_loss" in logger.names
    assert "training_step" not in module.__dict__

    class Failing(TextModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise RuntimeError("broken")

    broken = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, [Distillation(teacher=tiny_bert())], module=broken)
    assert "training_step" not in broken.__dict__


def run_to_resume(folder: Path, *, kill_at: int | None = None, resume: Path | None = None, **arguments: Any) -> Any:
    extra = [] if kill_at is None else [KillAt(kill_at)]
    callbacks = [pruning(), Distillation(hidden=True, **arguments), *extra]
    return fit(folder, callbacks, resume=resume, save=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run_to_resume(folder)


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path) -> None:
    _, trainer, expected = whole
    killed = run_python("-m", __name__, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, module = run_to_resume(tmp_path, resume=tmp_path / "step=12.ckpt")
    assert module.losses == expected.losses[12:]
    assert torch.equal(weights(module), weights(expected))
    assert torch.equal(weights(resumed.callbacks[1]._model), weights(trainer.callbacks[1]._model))


@pytest.mark.parametrize("saved", [6, 18, 24])
def test_checkpoints_hold_the_teacher_and_load_without_it(whole, saved) -> None:
    folder, trainer, _ = whole
    stored = torch.load(folder / f"step={saved}.ckpt", weights_only=True)
    assert ("adaptrain_teacher" in stored) == (saved > EVENT)
    module = load_from_checkpoint(TextModule, folder / f"step={saved}.ckpt")
    assert structures.current(find_family(module)) == stored["adaptrain_structure"]["layers"]
    if saved > EVENT:
        kept = stored["adaptrain_teacher"]["Distillation"]["weights"]
        for name, value in trainer.callbacks[1]._model.state_dict().items():
            assert torch.equal(value, kept[name])


def test_resumed_before_the_event_takes_its_own_teacher(whole, tmp_path) -> None:
    folder, _, expected = whole
    _, module = run_to_resume(tmp_path, resume=folder / "step=6.ckpt")
    assert torch.equal(weights(module), weights(expected))


def test_a_checkpoint_without_its_teacher_is_refused(whole, tmp_path) -> None:
    run_to_resume(tmp_path, dry_run=True)
    with pytest.raises(ConfigurationError, match="does not hold the teacher"):
        run_to_resume(tmp_path, resume=tmp_path / "step=12.ckpt")


def test_a_model_that_was_pruned_before_teaches_as_it_is(tmp_path, whole) -> None:
    folder, *_ = whole
    module = load_from_checkpoint(TextModule, folder / "step=12.ckpt")
    before = structures.current(find_family(module))
    distillation = Distillation()
    trainer, _ = fit(tmp_path, [pruning(target={"flops": 0.4}), distillation], module=module, save=True)
    teacher: Any = distillation._model
    assert structures.current(find_family(teacher)) == before
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert "adaptrain_teacher" in torch.load(tmp_path / "after.ckpt", weights_only=True)
    other = Distillation()
    module = load_from_checkpoint(TextModule, folder / "step=12.ckpt")
    fit(tmp_path / "more", [pruning(target={"flops": 0.4}), other], module=module, resume=tmp_path / "step=18.ckpt")
    assert torch.equal(weights(other._model), weights(teacher))  # type: ignore[arg-type]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run_to_resume(Path(sys.argv[1]), kill_at=14)
    raise SystemExit("was not killed")
