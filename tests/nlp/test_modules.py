from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
)

from adaptrain import ConfigurationError
from adaptrain.nlp.datamodules import TextDataModule
from adaptrain.nlp.modules import CausalLanguageModel, TextClassifier
from adaptrain.nlp.optimization import build_optimizer
from tests.toys import quiet_trainer, tiny_bert, weights

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def data(reviews: dict[str, str]) -> TextDataModule:
    module = TextDataModule(**reviews, vocab_size=280, max_length=16, batch_size=8)
    module.setup("fit")
    return module


@pytest.fixture
def running_text(reviews: dict[str, str]) -> TextDataModule:
    module = TextDataModule(**reviews, vocab_size=280, max_length=16, batch_size=8, task="language_model")
    module.setup("fit")
    return module


def fit_and_test(root: Path, model: Any, data: Any, **kwargs: Any) -> dict[str, float]:
    trainer = quiet_trainer(root, **kwargs)
    trainer.fit(model, datamodule=data)
    metrics = dict(trainer.callback_metrics)
    trainer.test(model, datamodule=data, verbose=False)
    return {name: float(value) for name, value in (metrics | dict(trainer.callback_metrics)).items()}


def test_a_schedule_of_a_run_without_an_end_is_refused_before_training(tmp_path, data) -> None:
    model = TextClassifier(data=data, **SMALL)
    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_time="00:00:01:00")
    with pytest.raises(ConfigurationError, match=r"The schedule of TextClassifier plans.*WallClock"):
        trainer.fit(model, datamodule=data)


def test_a_classifier_from_scratch_learns_and_logs(tmp_path: Path, data: TextDataModule) -> None:
    model = TextClassifier(data=data, lr=1e-2, dropout=0.0, **SMALL)
    metrics = fit_and_test(tmp_path, model, data, max_epochs=8)
    assert {"train/loss", "val/loss", "val/accuracy", "test/loss", "test/accuracy"} <= set(metrics)
    assert metrics["val/accuracy"] == 1.0
    assert metrics["test/accuracy"] == 1.0
    assert model.model.config.id2label == {0: "bad", 1: "good"}


def test_the_logged_metrics_are_those_of_all_samples_at_once(tmp_path: Path, data: TextDataModule) -> None:
    model = TextClassifier(data=data, lr=1e-2, **SMALL)
    metrics = fit_and_test(tmp_path, model, data)
    samples = data._datasets["val"]
    batch = data.val_dataloader().collate_fn([samples[i] for i in range(len(samples))])
    with torch.no_grad():
        output = model.eval()(**batch)
    assert metrics["val/loss"] == pytest.approx(float(output.loss), rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx(float((output.logits.argmax(1) == batch["labels"]).float().mean()))


def test_perplexity_is_over_tokens_not_batches(tmp_path: Path, running_text: TextDataModule) -> None:
    model = CausalLanguageModel(data=running_text, num_key_value_heads=1, **SMALL)
    metrics = fit_and_test(tmp_path, model, running_text, max_epochs=3)
    losses, counts = 0.0, 0
    with torch.no_grad():
        for batch in running_text.val_dataloader():
            logits = model.eval()(**batch).logits[:, :-1]
            target = batch["labels"][:, 1:]
            losses += float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="sum"))
            counts += int((target != -100).sum())
    assert counts % 15  # the last sequence is shorter, so a mean over batches would be another number
    assert metrics["val/loss"] == pytest.approx(losses / counts, rel=1e-4)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(losses / counts), rel=1e-4)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)


def test_a_batch_without_a_loss_is_left_out_and_one_of_nan_is_not(running_text: TextDataModule) -> None:
    model = CausalLanguageModel(data=running_text, num_key_value_heads=1, **SMALL).eval()
    batch = next(iter(running_text.val_dataloader()))
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with torch.no_grad():
        for each in (batch, nothing):
            model.validation_step(each, 0)
        assert float(model.mean_loss.compute()) == pytest.approx(float(model.model(**batch).loss))
        model.model.lm_head.weight[:] = math.nan
        model.validation_step(batch, 0)
    assert math.isnan(float(model.mean_loss.compute()))


def test_the_rate_follows_the_progress_of_the_run(tmp_path: Path, data: TextDataModule) -> None:
    import pytorch_lightning as pl

    rates: list[float] = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.extend(group["lr"] for group in optimizer.param_groups)

    model = TextClassifier(data=data, lr=0.1, warmup=0.0, **SMALL)
    quiet_trainer(tmp_path, max_steps=5, max_epochs=-1, callbacks=[Rates()]).fit(model, datamodule=data)
    assert rates == pytest.approx([0.1 * (1 - step / 5) for step in range(5) for _ in range(2)])


def test_biases_and_norms_do_not_decay() -> None:
    model = tiny_bert()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.3, betas=(0.9, 0.99))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (name.endswith("weight") and "LayerNorm" not in name), name


def test_on_a_cpu_the_fused_kernel_makes_the_same_steps() -> None:
    model, twin = tiny_bert(), tiny_bert()
    twin.load_state_dict(model.state_dict())
    fused = build_optimizer(model, lr=0.1, weight_decay=0.3, betas=(0.9, 0.99))
    assert all(group["fused"] for group in fused.param_groups)
    groups = [[p for p in twin.parameters() if p.ndim >= 2], [p for p in twin.parameters() if p.ndim < 2]]
    decays = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.3, 0.0), strict=True)]
    plain = torch.optim.AdamW(decays, lr=0.1, betas=(0.9, 0.99), fused=False)
    for _ in range(3):
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = its.grad = torch.randn_like(mine)
        fused.step()
        plain.step()
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_in_mixed_precision(tmp_path: Path, data: TextDataModule) -> None:
    norms: list[float] = []

    class Norms(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(pl_module.parameters(), math.inf)))

    model = TextClassifier(data=data, **SMALL)
    trainer = quiet_trainer(
        tmp_path, max_steps=3, max_epochs=-1, precision="bf16-mixed", gradient_clip_val=0.01, callbacks=[Norms()]
    )
    trainer.fit(model, datamodule=data)
    assert norms[1:] == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.fixture
def folder(tmp_path: Path, data: TextDataModule) -> Path:
    """A pretrained encoder with its tokenizer and without a classifier."""
    config = BertConfig(vocab_size=280, max_position_embeddings=64, **SMALL)
    torch.manual_seed(5)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    data.tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_pretrained_encoder_keeps_its_weights_and_gets_a_head(
    tmp_path: Path, folder: Path, reviews: dict[str, str], caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    data = TextDataModule(**reviews, tokenizer=str(folder), max_length=16, batch_size=8)
    data.setup("fit")
    caplog.set_level("INFO", logger="adaptrain")
    model = TextClassifier(data=data, name_or_path=str(folder), lr=1e-2)
    assert torch.equal(weights(model.model.bert), weights(BertModel.from_pretrained(folder)))
    assert "classifier.bias, classifier.weight" in caplog.text
    assert model.model.training
    assert model.model.num_labels == 2
    assert fit_and_test(tmp_path, model, data, max_epochs=2)["train/loss"] > 0
    assert "LOAD REPORT" not in capsys.readouterr().err


def test_a_pretrained_language_model(tmp_path: Path, running_text: TextDataModule) -> None:
    config = GPT2Config(vocab_size=280, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = CausalLanguageModel(data=running_text, name_or_path=str(tmp_path / "gpt2"))
    assert fit_and_test(tmp_path, model, running_text)["val/perplexity"] > 1


def test_a_decoder_classifies_padded_batches(tmp_path: Path, data: TextDataModule) -> None:
    config = GPT2Config(vocab_size=280, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = TextClassifier(data=data, name_or_path=str(tmp_path / "gpt2"))
    assert model.model.config.pad_token_id == data.tokenizer.pad_token_id
    assert fit_and_test(tmp_path, model, data)["val/loss"] > 0


def test_an_encoder_is_no_language_model(tmp_path: Path, running_text: TextDataModule) -> None:
    BertForMaskedLM(BertConfig(vocab_size=280, **SMALL)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigurationError, match="reads to the right of a token as well"):
        CausalLanguageModel(data=running_text, name_or_path=str(tmp_path / "bert"))


def test_models_that_cannot_be_used_are_refused(tmp_path: Path, data: TextDataModule, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no config\.json"):
        TextClassifier(data=data, name_or_path=str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"'no-such-owner/no-such-model' cannot be loaded.*local folder"):
        TextClassifier(data=data, name_or_path="no-such-owner/no-such-model")
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigurationError, match="'vit' model, which Hugging Face does not offer for sequence"):
        TextClassifier(data=data, name_or_path=str(tmp_path / "vit"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"weights of .* cannot be loaded.*model\.safetensors"):
        TextClassifier(data=data, name_or_path=str(folder))


def test_data_that_does_not_suit_the_model_is_refused(folder: Path, data: TextDataModule) -> None:
    facts = {"task": "classification", "label_names": ["a", "b"]}
    long = SimpleNamespace(tokenizer=data.tokenizer, max_length=65, **facts)
    with pytest.raises(ConfigurationError, match=r"data\.max_length=65 is more than the 64 tokens"):
        TextClassifier(data=long, name_or_path=str(folder))
    data.tokenizer.add_tokens(["more"])
    with pytest.raises(ConfigurationError, match=r"281 tokens, but .* has embeddings for 280"):
        TextClassifier(data=data, name_or_path=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30}, r"model\.hidden_size must be a multiple of model\.num_attention_heads=4, got 30"),
        ({"num_hidden_layers": 0}, r"model\.num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"dropout": 1.0}, r"model\.dropout must be in \[0, 1\), got 1\.0"),
        ({"lr": 0.0}, r"model\.lr must be greater than 0, got 0\.0"),
        ({"lr": "fast"}, r"model\.lr must be greater than 0, got 'fast'"),
        ({"weight_decay": -1}, r"model\.weight_decay must be 0 or greater, got -1"),
        ({"betas": [0.9]}, r"model\.betas must be two numbers in \[0, 1\), got \[0\.9\]"),
        ({"schedule": "step"}, "Unknown schedule 'step'"),
        ({"warmup": 1.5}, r"warmup .* got 1\.5"),
    ],
)
def test_arguments_out_of_range_are_refused(data: TextDataModule, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TextClassifier(data=data, **options)


def test_data_of_the_other_task_is_refused(data: TextDataModule, running_text: TextDataModule) -> None:
    with pytest.raises(ConfigurationError, match=r"needs data of the task 'classification'.*model=llama"):
        TextClassifier(data=running_text)
    with pytest.raises(ConfigurationError, match=r"needs data of the task 'language_model'.*model=encoder"):
        CausalLanguageModel(data=data)
    with pytest.raises(ConfigurationError, match=r"num_key_value_heads must divide .*=4, got 3"):
        CausalLanguageModel(data=running_text, num_key_value_heads=3)
