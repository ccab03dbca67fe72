from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from adaptrain import ConfigurationError
from adaptrain.nlp.cache import cache_folder
from adaptrain.nlp.datamodules import CorpusDataModule, TextDataModule
from adaptrain.nlp.modules import TextClassifier
from tests.nlp.conftest import review_rows, write_jsonl
from tests.toys import quiet_trainer, weights


def text_data(files: dict[str, str], **options: Any) -> TextDataModule:
    return TextDataModule(**files, **({"vocab_size": 280, "max_length": 16, "batch_size": 8, "seed": 1} | options))


def classifier(data: Any) -> TextClassifier:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return TextClassifier(data=data, dropout=0.0, lr=1e-2, warmup=0.2, **shape)


class Recorder(pl.Callback):
    """Keeps what was trained on; saves at a step and dies there, or in the middle of the next."""

    def __init__(self, checkpoint: Path | None = None, *, at: int = 0, inside: bool = False) -> None:
        self.checkpoint, self.at, self.inside = checkpoint, at, inside
        self.batches: list[list[list[int]]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch["input_ids"].tolist())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if self.checkpoint is not None and not self.inside and trainer.global_step == self.at:
            trainer.save_checkpoint(self.checkpoint)
            raise RuntimeError("killed")

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.checkpoint is not None and self.inside and trainer.global_step == self.at:
            trainer.save_checkpoint(self.checkpoint)
            raise RuntimeError("killed")


def fit(root: Path, data: Any, recorder: Recorder, *, ckpt_path: Path | None = None, **kwargs: Any) -> TextClassifier:
    data.setup("fit")
    model = classifier(data)
    settings = {"max_epochs": 2, "callbacks": [recorder], "num_sanity_val_steps": 0} | kwargs
    quiet_trainer(root, **settings).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize(
    ("workers", "at", "inside", "limits"),
    [
        (0, 3, False, {}),  # in the first epoch
        (0, 7, False, {}),  # its last batch
        (0, 9, False, {}),  # in the second
        (0, 9, True, {}),  # between two steps, with a batch handed out that is not trained on
        (2, 9, False, {}),
        (0, 4, False, {"limit_train_batches": 4}),  # the end of an epoch that is shorter than the loader
        (0, 6, False, {"limit_train_batches": 4}),
        (0, 3, False, {"max_steps": 10}),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, reviews: dict[str, str], workers: int, at: int, inside: bool, limits: dict[str, int]
) -> None:
    whole = Recorder()
    expected = fit(tmp_path, text_data(reviews, num_workers=workers), whole, **limits)
    first, second = Recorder(tmp_path / "at.ckpt", at=at, inside=inside), Recorder()
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, text_data(reviews, num_workers=workers), first, **limits)
    resumed = text_data(reviews, num_workers=workers)
    model = fit(tmp_path, resumed, second, ckpt_path=tmp_path / "at.ckpt", **limits)
    assert len(first.batches) == at
    assert first.batches + second.batches == whole.batches
    assert first.rates + second.rates == whole.rates
    assert torch.equal(weights(model), weights(expected))


def test_everything_is_there_after_setup(reviews: dict[str, str]) -> None:
    data = text_data(reviews)
    data.prepare_data()
    data.setup("fit")
    described = data.describe()
    assert described["samples"] == {"train": 50, "val": 11, "test": 7}
    assert described["labels"] == data.label_names == ["bad", "good"]
    assert data.num_labels == 2
    assert data.task == "classification"
    assert 3 <= data.median_length <= 16
    assert described["vocab_size"] == len(data.tokenizer) == 280
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape[0] == 8
    assert data.label_names[int(batch["labels"][0])] == "good"
    assert "awful dull cold grim n63" in data.tokenizer.decode(next(iter(data.test_dataloader()))["input_ids"][2])


def test_the_cache_is_used_until_content_or_arguments_change(
    reviews: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def entries() -> int:
        return len(list(cache_folder().glob("*.pt")))

    text_data(reviews).prepare_data()
    text_data(reviews, batch_size=4, limit_train=5).prepare_data()
    assert entries() == 1
    text_data(reviews, max_length=12).prepare_data()
    assert entries() == 2
    write_jsonl(Path(reviews["val_file"]), review_rows(5, offset=90))
    data = text_data(reviews)
    data.setup("fit")
    assert entries() == 3
    assert data.describe()["samples"]["val"] == 5
    for path in cache_folder().glob("*.pt"):
        path.write_bytes(b"damaged")
    again = text_data(reviews)
    again.setup("fit")
    assert again.describe() == data.describe()


def test_missing_files_are_filled_in_and_said_so(reviews: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    data = text_data({"train_file": reviews["train_file"]})
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert data.describe()["samples"] == {"train": 46, "val": 4, "test": 4}
    assert "4 of 50 training samples, held out with seed 1" in caplog.text
    assert "the test is on the validation data" in caplog.text


def test_limits_choose_samples_by_the_seed(reviews: dict[str, str]) -> None:
    def kept(**options: Any) -> list[int]:
        data = text_data(reviews, limit_train=5, limit_val=100, **options)
        data.setup("fit")
        assert data.describe()["samples"] == {"train": 5, "val": 11, "test": 7}
        return sorted(row for batch in data.train_dataloader() for row in batch["input_ids"].sum(1).tolist())

    assert kept() == kept()
    assert kept() != kept(seed=2)


def test_language_modelling_on_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"paragraph {i} says {i * i} of {i + 1}" for i in range(100)))
    data = text_data({"train_file": str(path)}, task="language_model", max_length=32)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (8, 32)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert data.num_labels == 0
    text = data.tokenizer.decode(torch.cat([b["input_ids"][b["attention_mask"] == 1] for b in data.val_dataloader()]))
    assert text.count("paragraph") == text.count("</s>") == 10


def test_the_corpus_is_ready_in_both_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CorpusDataModule(vocab_size=600, max_length=64)
    data.setup("fit")
    assert data.num_labels == 8
    assert data.describe()["samples"]["train"] > 3000
    assert "standard library of Python" in data.describe()["source"]


@pytest.mark.parametrize(
    ("precision", "multiple", "widths"),
    [
        ("bf16-mixed", "auto", {8, 14}),
        ("32-true", 4, {8, 12, 14}),
        ("bf16-mixed", None, None),
        ("32-true", "auto", None),
    ],
)
def test_lengths_of_batches_are_rounded(
    tmp_path: Path, reviews: dict[str, str], precision: str, multiple: Any, widths: set[int] | None
) -> None:
    recorder = Recorder()
    data = text_data(reviews, batch_size=2, max_length=14, pad_to_multiple_of=multiple)
    fit(tmp_path, data, recorder, precision=precision)
    seen = {len(batch[0]) for batch in recorder.batches}
    assert seen == widths if widths else any(width % 4 for width in seen - {14})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_to_multiple_of": 0}, r"data\.pad_to_multiple_of must be a whole number of at least 1, got 0"),
        ({"max_length": 0}, r"data\.max_length must be a whole number of at least 3, got 0"),
        ({"batch_size": 0}, r"data\.batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, r"data\.batch_size .*got 2\.5"),
        ({"num_workers": -1}, r"data\.num_workers .*at least 0, got -1"),
        ({"limit_train": 0}, r"data\.limit_train .*at least 1, got 0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction .*\(0, 1\), got 1\.0"),
        ({"task": "regression"}, r"data\.task must be one of classification, language_model, got 'regression'"),
    ],
)
def test_arguments_out_of_range_are_refused(reviews: dict[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        text_data(reviews, **options)


def test_nothing_to_train_on_is_refused(reviews: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.train_file=.*data\.name="):
        TextDataModule()
    with pytest.raises(ConfigurationError, match=r"without data\.train_file"):
        TextDataModule(name="some/dataset", val_file=reviews["val_file"])


def test_overfitting_takes_the_same_batches_every_epoch(tmp_path: Path, reviews: dict[str, str]) -> None:
    recorder = Recorder()
    fit(tmp_path, text_data(reviews), recorder, overfit_batches=2)
    assert recorder.batches[:2] == recorder.batches[2:]
    assert len(recorder.batches) == 4
