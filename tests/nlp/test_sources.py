from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from adaptrain import ConfigurationError
from adaptrain.nlp.sources import FilesSource, HubSource, from_columns

WHERE = {"train": "a.csv", "val": "b.csv", "test": "c.csv"}


def raw(train: list[object], **others: list[object]):
    labels = {"train": train, **others}
    texts = {split: [f"{split} {i}" for i in range(len(values))] for split, values in labels.items()}
    return from_columns(texts, labels, val_fraction=0.25, seed=3, where=WHERE)


def test_classes_are_ordered_as_numbers_or_names() -> None:
    assert raw(["10", "9", "9", "10"], val=["9"]).label_names == ["9", "10"]
    result = raw(["b", "a", "c"], val=["c", "a"])
    assert result.label_names == ["a", "b", "c"]
    assert result.labels["val"] == [2, 0]


def test_labels_may_be_integers_floats_without_fraction_and_strings_of_them() -> None:
    assert raw([0, 1, 1], val=["1"]).labels["val"] == [1]
    assert raw([0.0, 1.0, 1.0], val=[1]).labels["val"] == [1]
    with pytest.raises(ConfigurationError, match=r"label 0\.5 of type float"):
        raw([0.5, 1.0])


def test_an_empty_label_is_no_class_and_is_named_with_its_sample() -> None:
    with pytest.raises(ConfigurationError, match=r"b\.csv, sample 2, has an empty label"):
        raw(["x", "y"], val=["x", " "])


def test_empty_texts_are_kept_and_noted() -> None:
    labels = {"train": ["x", "y", "x"], "val": ["x"]}
    result = from_columns({"train": ["a", "", " "], "val": ["b"]}, labels, val_fraction=0.25, seed=3, where=WHERE)
    assert len(result.texts["train"]) == 3
    assert "a.csv: 2 of 3 texts are empty." in result.notes
    assert not any("b.csv" in note for note in result.notes)


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"a\.csv has only one class, 'x', in 3 samples"):
        raw(["x", "x", "x"])


def test_a_label_never_seen_in_training_is_named_and_counted() -> None:
    with pytest.raises(ConfigurationError, match=r"c\.csv has labels that a\.csv never has: 'z' \(2 times\)"):
        raw(["x", "y"], val=["x"], test=["x", "z", "z"])


def test_a_column_of_texts_is_no_label() -> None:
    with pytest.raises(ConfigurationError, match="300 different labels in 300 samples"):
        raw([f"text {i}" for i in range(300)])


def test_without_validation_data_a_share_of_every_class_is_held_out() -> None:
    result = raw(["x"] * 40 + ["y"] * 8 + ["z"])
    assert Counter(result.labels["val"]) == {0: 10, 1: 2}
    assert not set(result.texts["train"]) & set(result.texts["val"])
    assert len(result.texts["train"]) == 37
    assert result.texts["test"] == result.texts["val"]
    assert [note.split(":")[0] for note in result.notes] == ["Validation", "There is no labelled test data"]
    assert raw(["x"] * 40 + ["y"] * 8 + ["z"]).texts == result.texts


def test_too_little_to_split_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"2 samples, too few to hold out val_fraction=0\.25"):
        raw(["x", "y"])


def test_validation_and_test_files_follow_the_training_file_s_header(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("good\t1\nbad\t0\nfine\t1\n")
    (tmp_path / "dev.tsv").write_text("awful\t0\ngreat\t1\n")  # alone, its first line would be taken for a header
    source = FilesSource(files={"train": tmp_path / "train.tsv", "val": tmp_path / "dev.tsv"})
    result = source.read(task="classification", val_fraction=0.1, seed=0)
    assert result.texts["val"] == ["awful", "great"]


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\nfour\n\n")
    source = FilesSource(files={"train": tmp_path / "a.txt"})
    with pytest.raises(ConfigurationError, match=r"has no labels.*data\.task=language_model"):
        source.read(task="classification", val_fraction=0.25, seed=0)
    result = source.read(task="language_model", val_fraction=0.25, seed=0)
    assert {split: len(texts) for split, texts in result.texts.items()} == {"train": 3, "val": 1, "test": 1}


@pytest.fixture
def hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset that `datasets.load_dataset` loads from disk as it would from the hub; its test labels are secret."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "toy"
    folder.mkdir()
    rows = {"train": [0, 1, 0, 1], "validation": [1, 0], "test": [-1, -1]}
    for split, labels in rows.items():
        lines = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
        (folder / f"{split}.csv").write_text("sentence,label\n" + lines)
    return str(folder)


SPLITS = {"train": "train", "val": "validation", "test": "test"}


def test_a_hub_test_split_without_labels_is_replaced_by_validation(hub_dataset: str) -> None:
    result = HubSource(name=hub_dataset, splits=SPLITS).read(task="classification", val_fraction=0.1, seed=0)
    assert result.labels == {"train": [0, 1, 0, 1], "val": [1, 0], "test": [1, 0]}
    assert result.notes == ["There is no labelled test data: the test is on the validation data."]


def test_a_hub_split_that_is_not_there_is_refused(hub_dataset: str) -> None:
    source = HubSource(name=hub_dataset, splits={**SPLITS, "train": "unsupervised"})
    with pytest.raises(ConfigurationError, match="no split 'unsupervised'; it has train, validation, test"):
        source.read(task="classification", val_fraction=0.1, seed=0)


def test_a_dataset_that_cannot_be_loaded_points_to_local_files() -> None:
    source = HubSource(name="no-such-owner/no-such-dataset", splits=SPLITS)
    with pytest.raises(ConfigurationError, match=r"no-such-dataset cannot be loaded: .*data\.train_file=\.\.\."):
        source.read(task="classification", val_fraction=0.1, seed=0)
