"""Where texts come from: the corpus, local files, the Hugging Face hub. Each gives a `RawText`."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptrain.errors import ConfigurationError
from adaptrain.nlp.files import LABEL_COLUMNS, TEXT_COLUMNS, Table, read_table

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class RawText:
    """Text by split, with labels where the task is classification.

    Args:
        texts: The texts of each of train, val and test.
        labels: The class index of each text; empty for language modelling.
        label_names: The classes, in the order of their indices.
        notes: What a person should know about how the splits were made.
    """

    texts: dict[str, list[str]]
    labels: dict[str, list[int]] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def from_columns(
    texts: Mapping[str, Sequence[Any]],
    labels: Mapping[str, Sequence[Any]],
    *,
    val_fraction: float,
    seed: int,
    where: Mapping[str, str],
    label_names: Sequence[str] | None = None,
) -> RawText:
    """Makes a `RawText` of what files or the hub hold: checks labels, and fills in the splits that are missing.

    Without validation data a share of the training data is held out, the same share of every class; without test
    data the validation data is tested on. Both are noted.

    Args:
        texts: The texts of train and, where there are any, of val and test.
        labels: Their labels, strings or integers; empty for language modelling.
        val_fraction: The share to hold out.
        seed: Of the choice of what is held out.
        where: What each split was read from, for messages.
        label_names: The classes, where the labels are known to be indices into them.

    Raises:
        ConfigurationError: Labels cannot be used as classes, or there is too little to split.
    """
    splits = {split: [str(text) for text in values] for split, values in texts.items()}
    notes: list[str] = []
    names: list[str] = []
    indices: dict[str, list[int]] = {}
    if labels:
        for split, values in splits.items():
            if empty := sum(not text.strip() for text in values):
                notes.append(f"{where[split]}: {empty} of {len(values)} texts are empty.")
        keys = {
            split: [_label_key(value, f"{where[split]}, sample {n},") for n, value in enumerate(values, start=1)]
            for split, values in labels.items()
        }
        names, indices = _index_labels(keys, where, label_names)
    if "val" not in splits:
        groups = indices.get("train") or [0] * len(splits["train"])
        held = _hold_out(groups, val_fraction, seed)
        if not held or len(held) == len(groups):
            raise ConfigurationError(
                f"{where['train']} has {len(groups)} samples, too few to hold out val_fraction={val_fraction} of them"
                " for validation. Give data.val_file=..."
            )
        for columns in filter(None, (splits, indices)):
            rows = columns["train"]
            columns["val"] = [row for i, row in enumerate(rows) if i in held]  # type: ignore[assignment]
            columns["train"] = [row for i, row in enumerate(rows) if i not in held]  # type: ignore[assignment]
        notes.append(f"Validation: {len(held)} of {len(groups)} training samples, held out with seed {seed}.")
    if "test" not in splits:
        splits["test"] = splits["val"]
        if indices:
            indices["test"] = indices["val"]
        notes.append("There is no labelled test data: the test is on the validation data.")
    return RawText(splits, indices, names, notes)


def _label_key(value: Any, where: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and not value.strip():
        raise ConfigurationError(f"{where} has an empty label. Fill it in, or remove the sample.")
    if isinstance(value, (str, int)):  # bool is an int
        return str(value)
    raise ConfigurationError(
        f"{where} has the label {value!r} of type {type(value).__name__}. Labels must be strings or integers."
    )


def _index_labels(
    keys: Mapping[str, Sequence[str]], where: Mapping[str, str], label_names: Sequence[str] | None
) -> tuple[list[str], dict[str, list[int]]]:
    counts = Counter(keys["train"])
    if len(counts) < 2:
        raise ConfigurationError(
            f"{where['train']} has only one class, {next(iter(counts))!r}, in {sum(counts.values())} samples:"
            " there is nothing to tell apart. Check data.label_column and the file."
        )
    integers = all(key.removeprefix("-").isdigit() for key in counts)
    classes = sorted(counts, key=int) if integers else sorted(counts)
    for split, values in keys.items():
        if unseen := Counter(value for value in values if value not in counts):
            listed = ", ".join(f"{label!r} ({n} times)" for label, n in unseen.most_common(5))
            raise ConfigurationError(
                f"{where[split]} has labels that {where['train']} never has: {listed}."
                f" The training labels are {', '.join(map(repr, classes[:20]))}. Correct or remove those samples."
            )
    if len(classes) > max(100, sum(counts.values()) // 2):
        raise ConfigurationError(
            f"{where['train']} has {len(classes)} different labels in {sum(counts.values())} samples:"
            " that column is no class. Name the right one: data.label_column=..."
        )
    index = {label: i for i, label in enumerate(classes)}
    names = [label_names[int(label)] for label in classes] if label_names and integers else classes
    return names, {split: [index[value] for value in values] for split, values in keys.items()}


def _hold_out(groups: Sequence[int], fraction: float, seed: int) -> set[int]:
    chooser = random.Random(seed)
    held: set[int] = set()
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        held.update(chooser.sample(members, int(fraction * len(members))))
    return held


@dataclass(frozen=True, kw_only=True)
class FilesSource:
    """Local files.

    Args:
        files: The file of train and, where there are any, of val and test.
        text_column: The column with the text; None: find it.
        label_column: The column with the label; None: find it.
    """

    files: Mapping[str, str | Path]
    text_column: str | None = None
    label_column: str | None = None

    def __str__(self) -> str:
        return ", ".join(str(path) for path in self.files.values())

    def fingerprint(self) -> dict[str, Any]:
        """Returns a hash of every file's content, and the columns asked for. A missing file has no hash."""
        hashes: dict[str, Any] = {"columns": [self.text_column, self.label_column]}
        for split, path in self.files.items():
            path = Path(path).expanduser()
            content = path.read_bytes() if path.is_file() else b""
            hashes[split] = [path.suffix, hashlib.sha256(content).hexdigest()]
        return hashes

    def read(self, *, task: str, val_fraction: float, seed: int) -> RawText:
        """Reads and checks the files."""
        tables: dict[str, Table] = {}
        for split, path in self.files.items():
            headerless = tables["train"].headerless if "train" in tables else None
            tables[split] = read_table(path, argument=f"data.{split}_file", headerless=headerless)
        labels: dict[str, list[Any]] = {}
        if task == "classification":
            if flat := next((table for table in tables.values() if table.path.suffix.lower() == ".txt"), None):
                raise ConfigurationError(
                    f"{flat.path} is plain text, which has no labels. Classification needs csv, tsv, jsonl or parquet;"
                    " for language modelling set data.task=language_model."
                )
            labels = {
                s: t.pick(self.label_column, LABEL_COLUMNS, argument="data.label_column")[1] for s, t in tables.items()
            }
        texts = {s: t.pick(self.text_column, TEXT_COLUMNS, argument="data.text_column")[1] for s, t in tables.items()}
        where = {split: str(path) for split, path in self.files.items()}
        return from_columns(texts, labels, val_fraction=val_fraction, seed=seed, where=where)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A dataset of the Hugging Face hub.

    Args:
        name: Its name, or a folder that `datasets` can load.
        config: Its configuration, where it has several.
        splits: The dataset's own name of train, val and test; one that the dataset lacks counts as missing.
        text_column: The column with the text; None: find it.
        label_column: The column with the label; None: find it.
    """

    name: str
    config: str | None = None
    splits: Mapping[str, str]
    text_column: str | None = None
    label_column: str | None = None

    def __str__(self) -> str:
        return self.name if self.config is None else f"{self.name} ({self.config})"

    def fingerprint(self) -> dict[str, Any]:
        """Returns the dataset's name: the hub's own cache decides which version that is."""
        columns = [self.text_column, self.label_column]
        return {"name": self.name, "config": self.config, "splits": dict(self.splits), "columns": columns}

    def read(self, *, task: str, val_fraction: float, seed: int) -> RawText:
        """Downloads, or takes from the hub's cache, and checks."""
        dataset = self._load()
        if self.splits["train"] not in dataset:
            raise ConfigurationError(
                f"The dataset {self} has no split {self.splits['train']!r}; it has {', '.join(dataset)}."
                " Name the one to train on: data.train_split=..."
            )
        texts: dict[str, list[Any]] = {}
        labels: dict[str, list[Any]] = {}
        names = None
        for split, own in self.splits.items():
            if own not in dataset:
                continue
            columns = {name: list(dataset[own][name]) for name in dataset[own].column_names}
            table = Table(Path(f"{self} [{own}]"), columns)
            _, text = table.pick(self.text_column, TEXT_COLUMNS, argument="data.text_column")
            if task == "classification":
                column, label = table.pick(self.label_column, LABEL_COLUMNS, argument="data.label_column")
                if split != "train" and set(label) == {-1}:  # the hub's mark of labels that are kept secret
                    continue
                labels[split] = label
                names = names or getattr(dataset[own].features[column], "names", None)
            texts[split] = text
        where = {split: f"{self} [{own}]" for split, own in self.splits.items()}
        return from_columns(texts, labels, val_fraction=val_fraction, seed=seed, where=where, label_names=names)

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ConfigurationError(
                f"Loading {self} needs the datasets library: pip install 'adaptrain[nlp]'."
                " Or train on local files: data.train_file=..."
            ) from error
        try:
            return datasets.load_dataset(self.name, self.config)
        except Exception as error:  # datasets, the hub's client and the network each raise their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigurationError(
                f"The dataset {self} cannot be loaded: {reason} Check its name and the network, or train on local"
                " files instead: data.train_file=... data.val_file=... data.test_file=..."
            ) from error
