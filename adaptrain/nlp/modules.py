"""The text models of the app: a classifier and a causal language model, pretrained or from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from adaptrain import _lightning
from adaptrain.errors import ConfigurationError
from adaptrain.nlp.loader import IGNORED
from adaptrain.nlp.optimization import build_optimizer
from adaptrain.nlp.pretrained import load_model
from adaptrain.policies.progress_schedule import progress_schedule


class _TextModule(_lightning.LightningModule):
    """What both share: training loss, optimizer and schedule.

    Attributes:
        model: The Hugging Face model.
    """

    def __init__(
        self, model: Any, *, lr: float, weight_decay: float, schedule: str, warmup: float, betas: tuple[float, float]
    ) -> None:
        super().__init__()
        self.model = model
        self._schedule = {"name": schedule, "warmup": warmup}
        self._optimizer = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas)}
        # Wrong arguments are refused here, before training. Neither result is kept: a module must pickle.
        progress_schedule(**self._schedule)
        build_optimizer(model, **self._optimizer)

    def forward(self, **batch: Tensor) -> Any:
        """Returns the Hugging Face model's output."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss over the samples, or over the tokens of a language model."""
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> Any:
        """Returns AdamW and a schedule over the progress of the run, so that a wall-clock budget ends annealed.

        Raises:
            ConfigurationError: Nothing tells how long the run is, so that a schedule would stay at its beginning.
        """
        _lightning.refuse_endless(self.trainer, user=f"The schedule of {type(self).__name__}")
        optimizer = build_optimizer(self.model, **self._optimizer)
        multiplier = progress_schedule(**self._schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: multiplier(_lightning.progress(self.trainer))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TextClassifier(_TextModule):
    """Tells the class of a text: a BERT-shaped encoder from scratch, or any sequence classifier of Hugging Face.

    It logs `train/loss`, and `val/` and `test/` `loss` and `accuracy` (a fraction).

    Args:
        data: The data module, set up: gives the vocabulary, the classes and the longest length.
        name_or_path: A Hugging Face name or folder with pretrained weights; None: from scratch, shaped by the next
            five arguments, which a pretrained model ignores.
        hidden_size: Width; a multiple of `num_attention_heads`.
        num_hidden_layers: Layers.
        num_attention_heads: Heads in a layer.
        intermediate_size: Neurons of a feed-forward block.
        dropout: Of hidden states and attention, in [0, 1).
        lr: Peak learning rate.
        weight_decay: AdamW's, on matrices only, not on biases and norms.
        betas: AdamW's.
        schedule: `"linear"`, `"cosine"`, `"wsd"` or `"constant"`, over the progress of the run. Under `"wsd"` the rate
            stays high until the last fifth: that leaves `LearningRateController` time to find it, and what is pruned
            time to recover.
        warmup: Share of the run for the warm-up, in [0, 1).

    Raises:
        ConfigurationError: The pretrained model cannot be used, an argument is out of its range, or `data` is not
            labelled.
    """

    def __init__(
        self,
        *,
        data: Any,
        name_or_path: str | None = None,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 512,
        dropout: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: str = "linear",
        warmup: float = 0.05,
    ) -> None:
        _check_task(data, "classification", "TextClassifier", "language_model")
        names = list(data.label_names)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        if name_or_path is not None:
            model = load_model("sequence classification", name_or_path, data=data, **labels)
        else:
            check_shape(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size)
            if not 0 <= dropout < 1:
                raise ConfigurationError(f"model.dropout must be in [0, 1), got {dropout}.")
            config = BertConfig(
                vocab_size=len(data.tokenizer),
                hidden_size=hidden_size,
                num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads,
                intermediate_size=intermediate_size,
                max_position_embeddings=data.max_length,
                type_vocab_size=1,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                pad_token_id=data.tokenizer.pad_token_id,
                **labels,
            )
            model = BertForSequenceClassification(config)
        super().__init__(model, lr=lr, weight_decay=weight_decay, schedule=schedule, warmup=warmup, betas=betas)
        self.val_accuracy = MulticlassAccuracy(num_classes=len(names), average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes=len(names), average="micro")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        output = self.model(**batch)
        accuracy = self.val_accuracy if stage == "val" else self.test_accuracy
        accuracy.update(output.logits, batch["labels"])
        size = len(batch["labels"])
        self.log(f"{stage}/loss", output.loss, batch_size=size, sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=size)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the batch to the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the batch to the test metrics."""
        self._evaluate(batch, "test")


class CausalLanguageModel(_TextModule):
    """Predicts the next token: a Llama-shaped decoder from scratch, or any causal language model of Hugging Face.

    It logs `train/loss`, and `val/` and `test/` `loss` (mean over tokens) and `perplexity` (its exponential).

    Args:
        data: The data module, set up: gives the vocabulary and the sequence length.
        name_or_path: A Hugging Face name or folder with pretrained weights; None: from scratch, shaped by the next
            arguments up to `tie_word_embeddings`, which a pretrained model ignores.
        hidden_size: Width; a multiple of `num_attention_heads`.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads in a layer.
        num_key_value_heads: Key-value heads they share; a divisor of `num_attention_heads`.
        intermediate_size: Neurons of a feed-forward block.
        tie_word_embeddings: Whether input and output embeddings are one matrix.
        lr: Peak learning rate.
        weight_decay: AdamW's, on matrices only, not on biases and norms.
        betas: AdamW's.
        schedule: `"linear"`, `"cosine"`, `"wsd"` or `"constant"`, over the progress of the run. Under `"wsd"` the rate
            stays high until the last fifth: that leaves `LearningRateController` time to find it, and what is pruned
            time to recover.
        warmup: Share of the run for the warm-up, in [0, 1).

    Raises:
        ConfigurationError: The pretrained model cannot be used, an argument is out of its range, or `data` is not for
            language modelling.
    """

    def __init__(
        self,
        *,
        data: Any,
        name_or_path: str | None = None,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        intermediate_size: int = 384,
        tie_word_embeddings: bool = True,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: str = "wsd",
        warmup: float = 0.05,
    ) -> None:
        _check_task(data, "language_model", "CausalLanguageModel", "classification")
        if name_or_path is not None:
            model = load_model("causal language modelling", name_or_path, data=data)
        else:
            check_shape(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size)
            if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
                raise ConfigurationError(
                    f"model.num_key_value_heads must divide model.num_attention_heads={num_attention_heads},"
                    f" got {num_key_value_heads}."
                )
            tokenizer = data.tokenizer
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads,
                intermediate_size=intermediate_size,
                max_position_embeddings=data.max_length,
                tie_word_embeddings=tie_word_embeddings,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=False,
            )
            model = LlamaForCausalLM(config)
        super().__init__(model, lr=lr, weight_decay=weight_decay, schedule=schedule, warmup=warmup, betas=betas)
        self.mean_loss = MeanMetric(nan_strategy="disable")  # by default it leaves out batches whose loss is nan

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        if predicted := int((batch["labels"][:, 1:] != IGNORED).sum()):  # the mean of none is nan
            self.mean_loss.update(self.model(**batch).loss, predicted)

    def _log_mean(self, stage: str) -> None:
        loss = self.mean_loss.compute()  # over all ranks
        self.mean_loss.reset()
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the batch to the validation metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log_mean("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the batch to the test metrics."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_mean("test")


def check_shape(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, intermediate_size: int) -> None:
    """Refuses a transformer that cannot be built.

    Raises:
        ConfigurationError: A size is not a whole number above 0, or the heads do not divide the width.
    """
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size,
    }
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"model.{name} must be a whole number of at least 1, got {value!r}.")
    if hidden_size % num_attention_heads:
        raise ConfigurationError(
            f"model.hidden_size must be a multiple of model.num_attention_heads={num_attention_heads},"
            f" got {hidden_size}."
        )


def _check_task(data: Any, task: str, module: str, other: str) -> None:
    if data.task != task:
        raise ConfigurationError(
            f"{module} needs data of the task {task!r}, but data.task is {data.task!r}. Set data.task={task}, or"
            f" choose a model for {other}: {'model=llama' if other == 'language_model' else 'model=encoder'}."
        )
