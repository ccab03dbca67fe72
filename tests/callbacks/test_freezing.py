"""Freezing layers: what stands still, what is saved, what thaws, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from adaptrain import ConfigurationError, LayerFreezing, OneShotSchedule, ProgressivePruning
from adaptrain.callbacks.base import decision_log
from tests.toys import TextModule, quiet_trainer, text_loader, tiny_bert, weights


def soon(**changes: Any) -> LayerFreezing:
    """Freezes half of the layers at the first decision, after 2 steps."""
    return LayerFreezing(**({"by": "schedule", "begin": 0.0, "end": 0.01, "window": 2} | changes))


class Watched(TextModule):
    """Keeps the layers' weights before each batch, and what has a gradient after its backward."""

    def __init__(self, model: Any = None) -> None:
        super().__init__(model or tiny_bert(layers=4))
        self.states: list[dict[str, torch.Tensor]] = []
        self.with_gradient: list[set[str]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.states.append({name: p.detach().clone() for name, p in self.named_parameters()})

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.with_gradient.append({name for name, p in self.named_parameters() if p.grad is not None})

    def still(self, after: int) -> set[str]:
        """Returns the names of what did not move after a step."""
        begin = self.states[after]
        return {name for name, p in self.named_parameters() if torch.equal(p, begin[name])}


def frozen_names(module: Any, count: int) -> set[str]:
    below = {name for name, _ in module.named_parameters() if "embeddings" in name}
    return below | {n for n, _ in module.named_parameters() for i in range(count) if f".layer.{i}." in n}


def test_the_first_layers_stand_still_and_the_others_train(tmp_path) -> None:
    module, callback = Watched(), soon()
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, text_loader())
    still = module.still(after=2)
    assert frozen_names(module, 2) <= still
    assert not any(f".layer.{i}." in name and name.endswith("weight") for name in still for i in (2, 3))
    assert module.with_gradient[-1].isdisjoint(frozen_names(module, 2))
    assert all(p.requires_grad for p in module.parameters())  # the module leaves as it came
    assert not module.model.bert.encoder.layer[2]._forward_pre_hooks
    (decision,) = (d for d in decision_log(trainer) if d.knob == "frozen_layers")
    assert (decision.old, decision.new) == (0, 2)


def test_in_turns_the_first_layers_train_in_every_third_window(tmp_path) -> None:
    module, callback = Watched(), LayerFreezing(by="turns", begin=0.0, every=3, window=2)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=4)
    trainer.fit(module, text_loader())
    first = frozen_names(module, 2)
    trained = [bool(names & first) for names in module.with_gradient]
    turns = [True] * 2 + ([False] * 4 + [True] * 2) * 10
    assert len(trained) > 12
    assert trained == turns[: len(trained)]
    moved = [any(not torch.equal(a[n], b[n]) for n in first) for a, b in itertools.pairwise(module.states)]
    assert moved == trained[:-1]  # what has no gradient does not move
    moves = [(d.old, d.new) for d in decision_log(trainer) if d.knob == "frozen_layers"]
    assert moves[:3] == [(0, 2), (2, 0), (0, 2)]


def test_unfreezing_trains_the_last_layers_first(tmp_path) -> None:
    module = Watched()
    callback = LayerFreezing(by="unfreezing", most=0.75, begin=0.3, end=0.7, window=2)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=4)
    trainer.fit(module, text_loader())
    assert module.with_gradient[0].isdisjoint(frozen_names(module, 3))
    counts = [next(n for n in (3, 2, 1, 0) if names.isdisjoint(frozen_names(module, n)) or n == 0)
              for names in module.with_gradient]  # fmt: skip
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {3, 2, 1, 0}
    assert counts[-1] == 0
    moved = [
        any(not torch.equal(a[n], b[n]) for n in frozen_names(module, 1)) for a, b in itertools.pairwise(module.states)
    ]
    assert moved == [count == 0 for count in counts[:-1]]
    moves = [(d.old, d.new, d.step) for d in decision_log(trainer) if d.knob == "frozen_layers"]
    assert [(old, new) for old, new, _ in moves] == [(0, 3), (3, 2), (2, 1), (1, 0)]
    assert moves[0][2] == 0


# A run is resumed in its folder on purpose.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*")
def test_unfreezing_goes_on_from_a_checkpoint_of_before_the_optimizer_knew_all_layers(tmp_path) -> None:
    def fit(resume: str | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        module = Watched()
        saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
        freezing = LayerFreezing(by="unfreezing", begin=0.4, end=0.6, window=2)
        trainer = quiet_trainer(tmp_path, callbacks=[freezing, saving], max_epochs=4, enable_checkpointing=True)
        trainer.fit(module, text_loader(), ckpt_path=resume)
        return trainer, module

    trainer, whole = fit()
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) < len(list(whole.parameters()))
    resumed_trainer, resumed = fit(str(tmp_path / "step=6.ckpt"))
    assert resumed.losses == whole.losses[6:]
    assert torch.equal(weights(resumed), weights(whole))
    moves = [(d.step, d.old, d.new) for d in decision_log(trainer) if d.knob == "frozen_layers"]
    assert [(d.step, d.old, d.new) for d in decision_log(resumed_trainer) if d.knob == "frozen_layers"] == moves


@pytest.mark.parametrize("trained", [True, False])
def test_unfreezing_layers_that_were_never_trained_is_warned_about(tmp_path, caplog, trained: bool) -> None:
    model = tiny_bert(layers=4)
    if trained:
        quiet_trainer(tmp_path, max_epochs=1).fit(TextModule(model), text_loader())
    quiet_trainer(tmp_path, callbacks=[LayerFreezing(by="unfreezing")], max_epochs=1).fit(
        TextModule(model), text_loader()
    )
    assert ("freezes 2 layers that seem never to have been trained" in caplog.text) == (not trained)


def test_unfreezing_beside_pruning_freezes_nothing_and_says_so(tmp_path, caplog) -> None:
    pruning = ProgressivePruning(target={"flops": 0.7}, schedule=OneShotSchedule(at=0.5))
    freezing = LayerFreezing(by="unfreezing", window=2)
    trainer = quiet_trainer(tmp_path, callbacks=[freezing, pruning], max_epochs=4)
    trainer.fit(Watched(), text_loader())
    assert "frozen_layers" not in {d.knob for d in decision_log(trainer)}
    assert "LayerFreezing freezes nothing: another callback reads the gradients" in caplog.text


def test_the_trained_layers_learn_as_if_the_frozen_ones_were_constant(tmp_path) -> None:
    class ByHand(Watched):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_step == 2:
                for name, parameter in self.named_parameters():
                    if name in frozen_names(self, 2):
                        parameter.requires_grad_(False)
                        parameter.grad = None

    module, twin = Watched(), ByHand()
    quiet_trainer(tmp_path / "ours", callbacks=[soon()], max_epochs=2).fit(module, text_loader())
    quiet_trainer(tmp_path / "by hand", max_epochs=2).fit(twin, text_loader())
    assert torch.equal(weights(module), weights(twin))


class Modes(Watched):
    """Keeps, at each batch, the names of the modules in evaluation mode."""

    def __init__(self, model: Any = None) -> None:
        super().__init__(model or tiny_bert(layers=4, dropout=0.5))
        self.in_evaluation: list[set[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.in_evaluation.append({name for name, module in self.named_modules() if not module.training})
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(**batch)


def test_frozen_layers_run_as_in_evaluation_until_they_thaw(tmp_path) -> None:
    module = Modes()
    names = {name for name, _ in module.named_modules()}
    below = {name for name in names if "embeddings" in name}
    frozen = {name for name in names for i in (0, 1) if f".layer.{i}." in f"{name}."}
    freezing = LayerFreezing(by="unfreezing", begin=0.5, end=0.7, window=2)
    # Two epochs are frozen, with a validation between them, which puts all into evaluation and back.
    trainer = quiet_trainer(tmp_path, callbacks=[freezing], max_epochs=4, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(module, text_loader(), text_loader())
    assert "model.bert.embeddings.dropout" in below
    assert "model.bert.encoder.layer.1.output.dropout" in frozen
    thawed = next(d.step for d in decision_log(trainer) if d.knob == "frozen_layers" and d.new < 2)
    assert thawed > len(text_loader())
    assert module.in_evaluation[:thawed] == [below | frozen] * thawed
    assert not module.in_evaluation[-1]


def test_a_module_that_was_in_evaluation_mode_stays_so(tmp_path) -> None:
    class Without(Modes):
        """Does without one dropout of a layer that will be frozen."""

        def on_train_start(self) -> None:
            self.model.bert.encoder.layer[0].output.dropout.eval()

    module = Without()
    quiet_trainer(tmp_path, callbacks=[soon()], max_epochs=1).fit(module, text_loader(), text_loader())
    assert len(module.in_evaluation[-1]) > 1
    assert [name for name, part in module.named_modules() if not part.training] == [
        "model.bert.encoder.layer.0.output.dropout"
    ]


def test_no_backward_runs_through_frozen_layers(tmp_path) -> None:
    ran: list[int] = []

    class Noted(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            ran.append(0)
            return super().training_step(batch, batch_idx)

    module = Noted()
    for layer in module.model.bert.encoder.layer[:2]:
        layer.output.dense.register_full_backward_hook(lambda *_: ran.__setitem__(-1, ran[-1] + 1))
    quiet_trainer(tmp_path, callbacks=[soon()], max_epochs=1).fit(module, text_loader())
    assert ran[:2] == [2, 2]
    assert set(ran[2:]) == {0}


def test_tied_embeddings_go_on_learning_from_the_output(tmp_path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=64, num_hidden_layers=4, tie_word_embeddings=True, pad_token_id=0, **shape)

    class Module(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch["input_ids"] % 64, labels=batch["input_ids"] % 64).loss

    module = Module(LlamaForCausalLM(config))
    quiet_trainer(tmp_path, callbacks=[soon()], max_epochs=1).fit(module, text_loader())
    still = module.still(after=3)
    assert "model.model.embed_tokens.weight" not in still
    assert "model.model.layers.0.mlp.up_proj.weight" in still
    assert "model.model.layers.3.mlp.up_proj.weight" not in still


def test_pruning_keeps_all_layers_training_until_its_last_event_and_thaws_none_after(tmp_path) -> None:
    module = Watched()
    pruning = ProgressivePruning(target={"flops": 0.7}, schedule=OneShotSchedule(at=0.5))
    trainer = quiet_trainer(tmp_path, callbacks=[soon(), pruning], max_epochs=4)
    trainer.fit(module, text_loader())
    knobs = [(d.knob, d.step) for d in decision_log(trainer) if d.knob in ("structure", "frozen_layers")]
    assert [knob for knob, _ in knobs] == ["structure", "frozen_layers"]


def test_a_change_of_structure_thaws(tmp_path) -> None:
    class Other(ProgressivePruning):
        """One that does not say that it needs gradients."""

        needs_gradients = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    pruning = Other(target={"flops": 0.7}, importance="magnitude", schedule=OneShotSchedule(at=0.5))
    trainer = quiet_trainer(tmp_path, callbacks=[soon(), pruning], max_epochs=4)
    trainer.fit(Watched(), text_loader())
    moves = [(d.old, d.new) for d in decision_log(trainer) if d.knob == "frozen_layers"]
    assert moves[:3] == [(0, 2), (2, 0), (0, 2)]


def test_a_dry_run_freezes_nothing(tmp_path) -> None:
    plain = TextModule(tiny_bert(layers=4))
    quiet_trainer(tmp_path / "plain", max_epochs=2).fit(plain, text_loader())
    module = TextModule(tiny_bert(layers=4))
    trainer = quiet_trainer(tmp_path / "dry", callbacks=[soon(dry_run=True)], max_epochs=2)
    trainer.fit(module, text_loader())
    assert torch.equal(weights(plain), weights(module))
    assert [d.applied for d in decision_log(trainer) if d.knob == "frozen_layers"] == [False]


def test_an_encoder_with_a_decoder_is_refused(tmp_path) -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with pytest.raises(ConfigurationError, match="no chain"):
        quiet_trainer(tmp_path, callbacks=[soon()]).fit(TextModule(T5ForConditionalGeneration(config)), text_loader())


def test_a_single_layer_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="at least two layers"):
        quiet_trainer(tmp_path, callbacks=[soon()]).fit(TextModule(tiny_bert(layers=1)), text_loader())
