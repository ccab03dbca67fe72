"""Low-rank adapters: what trains, how ranks are shared out, that a plain model is left, and what is refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import adaptrain
from adaptrain import ConfigurationError, LearningRateController, LowRankAdapters, ProgressivePruning
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.adapters import adapted_matrices, head_parameters, insert_adapters, merge_adapters, rank_gains
from adaptrain.pruning.families import find_family
from tests.toys import (
    TextModule,
    language_model_samples,
    quiet_trainer,
    text_loader,
    text_samples,
    tiny_bert,
    tiny_llama,
    weights,
)

WeightAveraging: Any = getattr(pl.callbacks, "WeightAveraging", None)  # since Lightning 2.6

HEAD = 32 * 32 + 32 + 32 * 3 + 3  # pooler and classifier of the tiny BERT


def adapters(share: float = 0.2, **changes: Any) -> LowRankAdapters:
    return LowRankAdapters(**({"target": {"trainable_params": share}, "samples": 16} | changes))


def tiny_gpt2() -> Any:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=64)
    torch.manual_seed(1)
    return GPT2LMHeadModel(config)


# In the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2])
def test_adapters_start_as_nothing_and_merge_into_what_they_were(make) -> None:
    model, plain = make().eval(), make().eval()
    match = find_family(model)
    matrices = adapted_matrices(match)
    ranks = {name: index % 4 for index, name in enumerate(matrices)}
    costs = {name: sum(matrix.weight.shape) for name, matrix in matrices.items()}  # type: ignore[union-attr]
    batch = {name: torch.stack([s[name] for s in text_samples(4)]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model(**batch).logits
        insert_adapters(match, ranks, scale=2.0)
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head = sum(p.numel() for p in head_parameters(find_family(plain)))
        assert trainable == head + sum(rank * costs[name] for name, rank in ranks.items())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1.0)
        changed = model(**batch).logits
        assert not torch.allclose(changed, before, atol=1e-3)
        assert merge_adapters(model) == sum(rank > 0 for rank in ranks.values())
        torch.testing.assert_close(model(**batch).logits, changed, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_the_head_is_what_comes_after_the_layers_but_no_embedding() -> None:
    assert sum(p.numel() for p in head_parameters(find_family(tiny_bert()))) == HEAD
    for tie in (True, False):
        assert sum(p.numel() for p in head_parameters(find_family(tiny_llama(tie=tie)))) == 32  # the last norm


def test_gains_are_the_squared_singular_values_of_the_gradient() -> None:
    torch.manual_seed(0)
    small = torch.randn(12, 20)
    assert rank_gains(small, 64) == pytest.approx(torch.linalg.svdvals(small).square().tolist(), rel=1e-4)
    assert len(rank_gains(small, 5)) == 5
    large = torch.randn(300, 6) @ torch.randn(6, 400) + 0.01 * torch.randn(300, 400)  # by sketch
    assert rank_gains(large, 4) == pytest.approx(torch.linalg.svdvals(large)[:4].square().tolist(), rel=1e-3)


# In training -----------------------------------------------------------------------------------------------------


class Watched(TextModule):
    """Keeps what has a gradient, and how much state the optimizer holds."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.with_gradient = {name for name, p in self.named_parameters() if p.grad is not None}

    def on_train_end(self) -> None:
        (optimizer,) = self.trainer.optimizers
        self.held = sum(state["exp_avg"].numel() for state in optimizer.state.values())


def test_few_parameters_train_and_a_plain_model_is_left(tmp_path: Path) -> None:
    module = Watched(tiny_bert())
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback = adapters()
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=4)
    trainer.fit(module, text_loader())
    total = sum(p.numel() for p in module.parameters())
    report = callback.report()
    assert report["total_params"] == total
    assert 0.95 * 0.2 * total < report["trainable_params"] <= 0.2 * total
    assert module.held == report["trainable_params"]
    assert all("lora_" in name or "pooler" in name or "classifier" in name for name in module.with_gradient)
    assert set(before) == {name for name, _ in module.named_parameters()}
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    adapted = {f"model.{name}.weight" for name, rank in callback.ranks.items() if rank}
    head = {name for name in before if "pooler" in name or "classifier" in name}
    assert moved == adapted | head
    assert sum(module.losses[-6:]) < 0.7 * sum(module.losses[:6])
    (decision,) = decision_log(trainer).where(lambda each: each.knob == "trainable_params")
    assert (decision.old, decision.new) == (total, report["trainable_params"])
    assert decision.readings == callback.ranks


def test_ranks_go_where_the_gradient_is(tmp_path: Path) -> None:
    model = tiny_bert()
    with torch.no_grad():  # nothing that the first layer's neurons say is heard
        model.bert.encoder.layer[0].output.dense.weight.zero_()
    callback = adapters(max_rank=6, rank_step=1)
    quiet_trainer(tmp_path, callbacks=[callback]).fit(TextModule(model), text_loader())
    assert callback.ranks["bert.encoder.layer.0.intermediate.dense"] == 0
    assert callback.ranks["bert.encoder.layer.1.intermediate.dense"] > 0
    assert max(callback.ranks.values()) == 6
    assert len(set(callback.ranks.values())) > 2


@pytest.mark.parametrize(
    ("share", "arguments", "step"),
    [
        (0.7, {}, 8),
        (0.7, {"rank_step": 4}, 4),
        (0.3, {}, 4),  # all could have 6
        (0.2, {}, 2),  # all could have 3
        (0.7, {"max_rank": 6}, 6),
    ],
)
def test_ranks_come_in_steps_that_the_budget_allows(share: float, arguments: Any, step: int, tmp_path: Path) -> None:
    callback = adapters(share, dry_run=True, **arguments)
    quiet_trainer(tmp_path, callbacks=[callback]).fit(TextModule(), text_loader())
    ranks = set(callback.ranks.values())
    assert math.gcd(*ranks) == step
    total = sum(p.numel() for p in tiny_bert().parameters())
    assert callback.report()["trainable_params"] <= share * total


def test_uniform_ranks_are_uniform_and_need_no_data(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(text_samples(16))

    callback = adapters(importance="uniform", target={"trainable_params_m": 0.005})
    loader = torch.utils.data.DataLoader(Endless(), batch_size=8)
    quiet_trainer(tmp_path, callbacks=[callback], max_steps=2).fit(TextModule(), loader)
    assert set(callback.ranks.values()) == {4}
    assert callback.report()["trainable_params"] == HEAD + 4 * 2 * (4 * 64 + 2 * 96)
    with pytest.raises(ConfigurationError, match=r"over Endless.*importance='uniform'"):
        quiet_trainer(tmp_path, callbacks=[adapters()], max_steps=2).fit(TextModule(), loader)


def test_deciding_leaves_no_trace(tmp_path: Path) -> None:
    class Counts(TextModule):
        def __init__(self) -> None:
            super().__init__(tiny_bert(dropout=0.2))
            self.seen = torchmetrics.SumMetric()
            self.own = nn.Parameter(torch.zeros(1), requires_grad=False)

        def training_step(self, batch, batch_idx):
            self.seen(len(batch["labels"]))
            return super().training_step(batch, batch_idx)

    def trained(*callbacks) -> Counts:
        torch.manual_seed(0)
        module = Counts()
        trainer = quiet_trainer(tmp_path, callbacks=list(callbacks))
        trainer.fit(module, text_loader(shuffle=True))
        return module

    bare, watched = trained(), trained(adapters(dry_run=True))
    assert torch.equal(weights(bare), weights(watched))
    assert bare.losses == watched.losses
    assert watched.seen.compute() == 48
    assert not watched.own.requires_grad


def test_a_language_model_trains_with_the_learning_rate_controller(tmp_path: Path) -> None:
    module = TextModule(tiny_llama(), lr=1e-2)
    callbacks = [adapters(0.1), LearningRateController()]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=5)
    trainer.fit(module, text_loader(language_model_samples()))
    assert callbacks[0].report()["trainable_params"] <= 0.1 * callbacks[0].report()["total_params"]
    assert sum(module.losses[-6:]) < sum(module.losses[:6])


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    module = TextModule()
    module.model.bert.embeddings.requires_grad_(False)
    quiet_trainer(tmp_path, callbacks=[adapters()], max_steps=2).fit(module, text_loader())
    assert not any(p.requires_grad for p in module.model.bert.embeddings.parameters())
    assert all(p.requires_grad for p in module.model.bert.encoder.parameters())


# Checkpoints -----------------------------------------------------------------------------------------------------


class Plain(TextModule):
    def __init__(self) -> None:
        super().__init__(tiny_bert())

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.model(**batch).loss)


def test_a_checkpoint_from_the_middle_loads_as_a_plain_model(tmp_path: Path) -> None:
    class Keeps(Plain):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            self.trainer.save_checkpoint(tmp_path / "middle.ckpt")
            self.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    module = Keeps()
    trainer = quiet_trainer(tmp_path, callbacks=[adapters()])
    trainer.fit(module, text_loader())
    for name in ("middle.ckpt", "weights.ckpt"):
        loaded = adaptrain.load_from_checkpoint(Plain, tmp_path / name)
        torch.testing.assert_close(weights(loaded), weights(module), rtol=1e-6, atol=1e-8)
    (tested,) = quiet_trainer(tmp_path, callbacks=[adapters()]).test(
        Plain(), text_loader(), ckpt_path=str(tmp_path / "middle.ckpt"), verbose=False
    )
    (expected,) = quiet_trainer(tmp_path).test(module, text_loader(), verbose=False)
    assert tested["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


def test_the_final_checkpoint_is_plain_and_nothing_to_resume_from(tmp_path: Path) -> None:
    module = Plain()
    trainer = quiet_trainer(tmp_path, callbacks=[adapters()])
    trainer.fit(module, text_loader())
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    assert torch.equal(weights(Plain.load_from_checkpoint(tmp_path / "final.ckpt")), weights(module))
    with pytest.raises(ConfigurationError, match="has no adapters"):
        quiet_trainer(tmp_path, callbacks=[adapters()], max_epochs=2).fit(
            Plain(), text_loader(), ckpt_path=str(tmp_path / "final.ckpt")
        )


# Refused ---------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_head_says_what_the_least_is(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"lets 1,000 .* head alone has {HEAD:,} .* trainable_params_m=0.001219"
    ):
        quiet_trainer(tmp_path, callbacks=[adapters(target={"trainable_params_m": 0.001})]).fit(
            TextModule(), text_loader()
        )
    with pytest.raises(ConfigurationError, match="too little for a rank of 1 everywhere"):
        quiet_trainer(tmp_path, callbacks=[adapters(importance="uniform", target={"trainable_params_m": 0.0015})]).fit(
            TextModule(), text_loader()
        )


def test_what_works_on_the_weights_is_refused_beside_it(tmp_path: Path) -> None:
    callbacks = [adapters(), ProgressivePruning(target={"flops": 0.5})]
    with pytest.raises(ConfigurationError, match="does not go with ProgressivePruning"):
        quiet_trainer(tmp_path, callbacks=callbacks).fit(TextModule(), text_loader())
    callbacks[1] = ProgressivePruning(target={"flops": None})  # prunes nothing
    quiet_trainer(tmp_path, callbacks=callbacks, max_steps=2).fit(TextModule(), text_loader())


@pytest.mark.skipif(WeightAveraging is None, reason="needs Lightning 2.6")
def test_a_running_average_is_refused_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="running average"):
        quiet_trainer(tmp_path, callbacks=[adapters(), WeightAveraging()]).fit(TextModule(), text_loader())


def test_without_peft_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'adaptrain\[adapters\]'"):
        quiet_trainer(tmp_path, callbacks=[adapters()]).fit(TextModule(), text_loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank_step": 0}, "rank_step must be a whole number of at least 1, got 0"),
        ({"max_rank": 1.5}, "max_rank must be a whole number of at least 1, got 1.5"),
        ({"samples": True}, "samples must be a whole number of at least 1, got True"),
        ({"scale": 0.0}, "scale must be a number above 0, got 0.0"),
        ({"importance": "size"}, "importance must be gradient or uniform, got 'size'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        adapters(**arguments)
