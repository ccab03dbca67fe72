from __future__ import annotations

from pathlib import Path

import pytest

from adaptrain import ConfigurationError
from adaptrain.nlp.files import LABEL_COLUMNS, TEXT_COLUMNS, read_table


def columns(path: Path) -> tuple[list[str], list[object]]:
    table = read_table(path, argument="data.train_file")
    return (
        table.pick(None, TEXT_COLUMNS, argument="data.text_column")[1],
        table.pick(None, LABEL_COLUMNS, argument="data.label_column")[1],
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'sentence,label\n"one, two",x\nthree,y\n'),
        ("a.csv", '\ufeffText,Labels\r\n"one, two",x\r\n\r\nthree,y\r\n'),
        ("a.csv", '"one, two",x\nthree,y\n'.replace("y", "x", 0) + ""),
        ("a.tsv", "idx\tsentence\tlabel\n0\tone, two\tx\n1\tthree\ty\n"),
        ("a.jsonl", '{"content": "one, two", "class": "x"}\n\n{"content": "three", "class": "y"}\n'),
    ],
)
def test_columns_are_found_by_their_usual_names(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    if content.startswith('"one'):  # no header, and nothing that tells so: the first line is taken for one
        with pytest.raises(ConfigurationError, match="has no column of the usual names"):
            columns(path)
        return
    assert columns(path) == (["one, two", "three"], ["x", "y"])


def test_two_columns_without_a_header_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text('one "long" string\t0\na "second\t1\nthird\t0\n', encoding="utf-8")
    assert columns(path) == (['one "long" string', 'a "second', "third"], ["0", "1", "0"])


def test_parquet_keeps_integers(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["one", "two"], "label": [3, 5]}), path)
    assert columns(path) == (["one", "two"], [3, 5])


def test_plain_text_is_paragraphs_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content, expected in [("one\ntwo\n\nthree\n", ["one\ntwo", "three\n"]), ("one\ntwo\n", ["one", "two"])]:
        path.write_text(content)
        assert read_table(path, argument="data.train_file").columns["text"] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "holds no samples"),
        ("a.csv", b"text,label\n", "holds no samples"),
        ("a.txt", b"\n \n", "holds no samples"),
        ("a.jsonl", b"\n", "holds no samples"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", "is not UTF-8 text: byte 11 is 0xff"),
        ("a.csv", b"text,label\none,two,x\n", r"line 2: 3 fields where there are 2 columns \('text', 'label'\)"),
        ("a.csv", b'text,label\n"one,x\n', "after line 1: unexpected end of data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is list, not an object"),
        ("a.parquet", b"PAR?", "is not a parquet file"),
        ("a.xlsx", b"x", r"ending in '\.xlsx' are not read.*\.csv, \.tsv"),
        ("README", b"x", "ending in 'nothing' are not read"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_table(path, argument="data.train_file")


def test_a_missing_file_and_a_folder_are_named_with_their_argument(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.val_file=.*no\.csv does not exist"):
        read_table(tmp_path / "no.csv", argument="data.val_file")
    with pytest.raises(ConfigurationError, match="is a folder"):
        read_table(tmp_path, argument="data.val_file")


def test_a_column_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("words,kind\na,x\n")
    table = read_table(path, argument="data.train_file")
    with pytest.raises(
        ConfigurationError, match=r"no column 'body'; its columns are 'words', 'kind'.*data\.text_column"
    ):
        table.pick("body", TEXT_COLUMNS, argument="data.text_column")
    assert table.pick("words", TEXT_COLUMNS, argument="data.text_column") == ("words", ["a"])


def test_a_missing_value_is_named_with_its_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(ConfigurationError, match="sample 2: column 'label' has no value"):
        columns(path)
