from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adaptrain import ConfigurationError
from adaptrain.nlp import corpus


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return corpus.read_documents()


@pytest.fixture(scope="module")
def pieces(documents: list[corpus.Document]) -> dict[str, list[corpus.Piece]]:
    return corpus.classification_pieces(documents)


def test_every_part_has_enough_text_from_several_files_in_every_split(pieces: dict[str, list[corpus.Piece]]) -> None:
    smallest = {"train": (300, 3), "val": (60, 2), "test": (60, 2)}
    for split, (count, files) in smallest.items():
        for part in corpus.PARTS:
            members = [piece for piece in pieces[split] if piece.part == part]
            assert len(members) >= count, (split, part)
            assert len({piece.path for piece in members}) >= files, (split, part)
    sizes = [sum(piece.part == part for piece in pieces["train"]) for part in corpus.PARTS]
    assert max(sizes) < 3 * min(sizes)


def test_no_file_is_in_two_splits(documents: list[corpus.Document], pieces: dict[str, list[corpus.Piece]]) -> None:
    whole = corpus.language_model_documents(documents)
    for splits in (pieces, whole):
        paths = [{item.path for item in splits[split]} for split in corpus.SPLITS]
        assert all(paths)
        assert sum(map(len, paths)) == len(set().union(*paths))


def test_no_piece_names_a_part_or_a_module_of_one(pieces: dict[str, list[corpus.Piece]]) -> None:
    text = "\n".join(piece.text for split in corpus.SPLITS for piece in pieces[split])
    for part, modules in corpus.PARTS.items():
        assert not re.search(part, text, re.IGNORECASE), part
        for module in modules:
            assert not re.search(rf"\b{module}\b", text, re.IGNORECASE), module


def test_text_is_kept_as_it_was_but_for_the_names() -> None:
    masked = corpus.mask(
        "from email.message import EmailMessage  # last_site, website\nXMLParser, HTTPServer, gzip2, _bz2"
    )
    assert masked == "from □.message import □Message  # last_□, website\n□Parser, □Server, □, _□"


def test_near_duplicates_are_kept_once_and_the_held_out_one_stays() -> None:
    def text(seed: int) -> str:
        return "\n".join(f"value {seed * 7919 + i * i} of {seed}" + " and so on" * (i % 3) for i in range(60))

    documents = [
        corpus.Document(f"{part}/{name}{i}.py", text(hash_) + f"\ntrailer{name}")
        for p, part in enumerate(corpus.PARTS)
        for i in range(12)
        for hash_ in [p * 100 + i]
        for name in ("original", "copied")
    ]
    pieces = corpus.classification_pieces(documents)
    texts = [piece.text for split in corpus.SPLITS for piece in pieces[split]]
    alone = corpus.classification_pieces([d for d in documents if "original" in d.path])
    assert len(texts) == sum(len(alone[split]) for split in corpus.SPLITS)


def test_the_order_and_the_content_are_the_same_in_another_process(pieces: dict[str, list[corpus.Piece]]) -> None:
    code = (
        "import hashlib; from adaptrain.nlp import corpus;"
        "p = corpus.classification_pieces(corpus.read_documents());"
        "print(hashlib.sha256(repr(p).encode()).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == hashlib.sha256(repr(pieces).encode()).hexdigest()


def test_tests_tables_and_installed_packages_are_left_out(documents: list[corpus.Document]) -> None:
    folders = {part for document in documents for part in document.path.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}
    paths = {document.path for document in documents}
    assert not paths & {"encodings/cp037.py", "html/entities.py"}
    assert not any("_sysconfigdata" in path for path in paths)


def test_a_python_without_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "asyncio").mkdir()
    (tmp_path / "asyncio" / "tasks.py").write_text("async def gather(): ...\n" * 20)
    with pytest.raises(ConfigurationError, match=r"holds none of email, http.*data\.train_file"):
        corpus.read_documents(tmp_path)
    with pytest.raises(ConfigurationError, match="zipped, frozen or stripped"):
        corpus.read_documents(tmp_path / "python311.zip")


def test_pieces_end_at_line_ends_and_long_lines_are_cut() -> None:
    text = "a line of words\n" * 100 + "x" * 2000
    pieces = list(corpus.cut(text))
    assert all(256 <= len(piece) <= 513 for piece in pieces)
    assert pieces[0].splitlines() == ["a line of words"] * 32
