"""The data modules of the app: the corpus that is always there, and text of your own or of the Hugging Face hub."""

from __future__ import annotations

import platform
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptrain.errors import ConfigurationError
from adaptrain.nlp import corpus
from adaptrain.nlp.data import Source, TokenizedDataModule
from adaptrain.nlp.sources import FilesSource, HubSource, RawText


class CorpusDataModule(TokenizedDataModule):
    """Text from the standard library of the running Python: nothing to download (see `adaptrain.nlp.corpus`).

    Args:
        task: `"classification"`: from which part of the library is a piece of text? `"language_model"`: predict the
            next token of the library's files.
        vocab_size: Tokens of the byte-level BPE that is trained where no `tokenizer` is given.
        **options: As for `TokenizedDataModule`.

    Raises:
        ConfigurationError: In `prepare_data` and `setup`: this Python comes without its source.
    """

    def __init__(self, *, task: str = "classification", vocab_size: int = 8192, **options: Any) -> None:
        super().__init__(_CorpusSource(), task=task, vocab_size=vocab_size, **options)


class TextDataModule(TokenizedDataModule):
    """Text of your own files or of the Hugging Face hub. With a `train_file` the hub is not touched.

    Args:
        name: A dataset of the hub.
        config: Its configuration, where it has several.
        train_split: Its split to train on.
        val_split: Its split to validate on; one that it lacks counts as missing.
        test_split: Its split to test on; one that it lacks, or that has no labels, counts as missing.
        train_file: A csv, tsv, jsonl, parquet or (language model) txt file to train on.
        val_file: The file to validate on; None: a share of the training file is held out.
        test_file: The file to test on; None: the test is on the validation data.
        text_column: The column with the text; None: found by its usual names.
        label_column: The column with the label; None: found by its usual names.
        **options: As for `TokenizedDataModule`.

    Raises:
        ConfigurationError: Neither files nor a dataset are given; in `prepare_data` and `setup`: they cannot be used.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        config: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        train_file: str | Path | None = None,
        val_file: str | Path | None = None,
        test_file: str | Path | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        **options: Any,
    ) -> None:
        source: Source
        if train_file is not None:
            files = {"train": train_file, "val": val_file, "test": test_file}
            source = FilesSource(
                files={split: file for split, file in files.items() if file is not None},
                text_column=text_column,
                label_column=label_column,
            )
        elif val_file is not None or test_file is not None:
            raise ConfigurationError("data.val_file or data.test_file is given without data.train_file. Give that too.")
        elif name is None:
            raise ConfigurationError(
                "There is no text to train on. Give files: data.train_file=... data.val_file=... data.test_file=...,"
                " or a dataset of the Hugging Face hub: data.name=..."
            )
        else:
            source = HubSource(
                name=name,
                config=config,
                splits={"train": train_split, "val": val_split, "test": test_split},
                text_column=text_column,
                label_column=label_column,
            )
        super().__init__(source, **options)


class _CorpusSource:
    def __str__(self) -> str:
        return f"standard library of Python {platform.python_version()}"

    @cached_property
    def _documents(self) -> list[corpus.Document]:
        return corpus.read_documents()

    def fingerprint(self) -> dict[str, Any]:
        return {"documents": corpus.fingerprint(self._documents)}

    def read(self, *, task: str, val_fraction: float, seed: int) -> RawText:
        if task == "language_model":
            documents = corpus.language_model_documents(self._documents)
            return RawText({split: [d.text for d in members] for split, members in documents.items()})
        pieces = corpus.classification_pieces(self._documents)
        names = list(corpus.PARTS)
        return RawText(
            {split: [piece.text for piece in members] for split, members in pieces.items()},
            {split: [names.index(piece.part) for piece in members] for split, members in pieces.items()},
            names,
        )
