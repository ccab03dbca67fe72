"""Real text that is always there: the standard library of the Python that runs this, source and prose.

Two tasks are made from it. *Classification*: from which part of the standard library does a piece of a few hundred
characters come? *Language modelling*: the same library, file by file. Splits are by file, near-duplicates are left
out, and for classification the names of all parts are masked in every piece, so that no piece names its answer.

Tests and installed packages are left out, and the parts are those that no distribution packages apart, so that the
same Python version gives the same classification task everywhere. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from adaptrain.errors import ConfigurationError

SPLITS = ("train", "val", "test")

PARTS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email", "mailbox", "smtplib", "imaplib", "poplib"),
    "http": ("http", "urllib", "wsgiref", "socketserver", "cgi"),
    "importlib": ("importlib", "pkgutil", "runpy", "zipimport", "modulefinder", "compileall", "sysconfig", "site"),
    "numbers": (
        *("numbers", "decimal", "pydecimal", "fractions", "statistics", "random", "colorsys", "pylong"),
        *("datetime", "pydatetime", "calendar", "strptime", "zoneinfo"),
    ),
    "pathlib": (
        *("pathlib", "posixpath", "ntpath", "genericpath", "glob", "fnmatch", "filecmp", "fileinput", "shutil"),
        *("tempfile", "tarfile", "zipfile", "gzip", "bz2", "lzma", "compression"),
    ),
    "unittest": (
        *("unittest", "doctest", "pdb", "bdb", "trace", "traceback", "tracemalloc"),
        *("profile", "cProfile", "pstats", "timeit"),
    ),
    "xml": ("xml", "html"),
}
"""The parts to tell apart: a package, with top-level modules on the same subject (a leading `_` is ignored)."""

MASK = "□"
PIECE_CHARACTERS = 512
MAX_PIECES_PER_PART = 1200
_HELD_OUT = {"test": 0.15, "val": 0.15}
_SHINGLE_WORDS = 6
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
_SKIPPED_FILES = re.compile(r"entities\.py|_sysconfigdata.*")  # tables, and what this machine was built with
_SUFFIXES = {".py", ".txt", ".rst", ".md"}


@dataclass(frozen=True)
class Document:
    """One file of the standard library.

    Args:
        path: Relative to the library's folder, with `/`.
        text: Its content.
    """

    path: str
    text: str


@dataclass(frozen=True)
class Piece:
    """One sample of the classification task.

    Args:
        path: The file it is from.
        text: At most `PIECE_CHARACTERS` characters of it, masked.
        part: Its label, a key of `PARTS`.
    """

    path: str
    text: str
    part: str


def read_documents(folder: str | Path | None = None) -> list[Document]:
    """Reads the standard library's source and prose.

    Args:
        folder: Its folder; None: that of the running Python.

    Returns:
        The documents, ordered by path.

    Raises:
        ConfigurationError: There is no source in the folder, as in zipped, frozen or stripped Pythons.
    """
    root = Path(folder if folder is not None else sysconfig.get_paths()["stdlib"])
    documents = [
        Document(path.relative_to(root).as_posix(), text)
        for path in _walk(root)
        if (text := _decode(path)) and _is_prose(text)
    ]
    found = {_top_level(document.path) for document in documents}
    if missing := [part for part, modules in PARTS.items() if not found & set(modules)]:
        raise ConfigurationError(
            f"The corpus is made from the source of Python's standard library, but {root} holds none of"
            f" {', '.join(missing)}: this Python ships it zipped, frozen or stripped."
            " Run a CPython with its .py files (python.org, pyenv, conda, a distribution's package),"
            " or train on files of your own: data=files data.train_file=..."
        )
    return documents


def classification_pieces(documents: Iterable[Document]) -> dict[str, list[Piece]]:
    """Makes the classification task.

    Args:
        documents: What `read_documents` returns.

    Returns:
        The pieces of each of `SPLITS`. No file is in two of them, no piece nearly repeats another, and no part has
        more than `MAX_PIECES_PER_PART`.
    """
    part_of = {module: part for part, modules in PARTS.items() for module in modules}
    by_part: dict[str, list[Document]] = {part: [] for part in PARTS}
    for document in documents:
        if part := part_of.get(_top_level(document.path)):
            by_part[part].append(document)
    splits: dict[str, list[Piece]] = {split: [] for split in SPLITS}
    for part, members in by_part.items():
        pieces = [Piece(d.path, text, part) for d in members for text in cut(mask(d.text))]
        kept = sorted(pieces, key=lambda piece: _digest(piece.path + piece.text))[:MAX_PIECES_PER_PART]
        sizes = Counter(piece.path for piece in kept)
        split_of = assign_splits(sizes)
        for piece in kept:
            splits[split_of[piece.path]].append(piece)
    seen: set[int] = set()
    for split in reversed(SPLITS):  # of two near-duplicates the one held out stays
        splits[split] = [piece for piece in splits[split] if _is_new(piece.text, seen)]
    return splits


def language_model_documents(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Splits whole documents for language modelling.

    Args:
        documents: What `read_documents` returns.

    Returns:
        The documents of each of `SPLITS`, without near-duplicates.
    """
    seen: set[int] = set()
    unique = [document for document in documents if _is_new(document.text, seen)]
    split_of = assign_splits({document.path: len(document.text) for document in unique})
    return {split: [d for d in unique if split_of[d.path] == split] for split in SPLITS}


def assign_splits(sizes: dict[str, int]) -> dict[str, str]:
    """Gives every file a split: in the order of a hash of their paths, files fill test, then val, up to their share.

    Args:
        sizes: The size of each file in any unit.

    Returns:
        The split of each file.
    """
    total = sum(sizes.values())
    room = {split: share * total for split, share in _HELD_OUT.items()}
    largest = {split: share / 2 for split, share in room.items()}  # several files are held out, not one large one
    assigned = {}
    for path in sorted(sizes, key=_digest):
        split = next((split for split in room if sizes[path] <= min(largest[split], room[split])), "train")
        assigned[path] = split
        if split != "train":
            room[split] -= sizes[path]
    return assigned


def cut(text: str) -> Iterator[str]:
    """Cuts a text at line ends into pieces of at most `PIECE_CHARACTERS`; those under half of that are left out."""
    piece: list[str] = []
    size = 0
    for line in [*text.splitlines(), None]:
        if line is None or size + len(line) + 1 > PIECE_CHARACTERS:
            joined = "\n".join(piece)
            if len(joined) >= PIECE_CHARACTERS // 2 and _is_prose(joined):
                yield joined
            piece, size = [], 0
        if line is not None and line.strip():
            piece.append(line.rstrip()[:PIECE_CHARACTERS])
            size += len(piece[-1]) + 1


_NAMES = frozenset(name.lower() for part, modules in PARTS.items() for name in (part, *modules))
# A long name is masked wherever it occurs, a short one only as a word of an identifier: `site` is not in "website".
_ANYWHERE = re.compile("|".join(sorted((n for n in _NAMES if len(n) > 5 or n in PARTS), key=len, reverse=True)), re.I)
_LETTERS = re.compile(r"[A-Za-z][A-Za-z0-9]{2,}")
_WORD = re.compile(r"([A-Z]+(?![a-z])|[A-Z]?[a-z]+)(\d*)")


def mask(text: str) -> str:
    """Replaces the names of all parts and their modules, in whatever case and also inside identifiers.

    The names of every part are masked in the pieces of every part: a name that is missing tells nothing.
    """
    return _LETTERS.sub(lambda match: _masked(match.group()), text)


@cache
def _masked(letters: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return MASK if _NAMES & {match[0].lower(), match[1].lower()} else match[0]

    return _WORD.sub(replace, _ANYWHERE.sub(MASK, letters))


def fingerprint(documents: Sequence[Document]) -> str:
    """Returns a hash of the content, for caches."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.path}\0{len(document.text)}\0".encode())
        digest.update(document.text.encode())
    return digest.hexdigest()


def _walk(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.is_dir():
            if path.name not in _SKIPPED_FOLDERS and not path.is_symlink():
                yield from _walk(path)
        elif path.suffix in _SUFFIXES and not _SKIPPED_FILES.match(path.name):
            yield path


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""  # a few files are in other encodings, on purpose


def _is_prose(text: str) -> bool:
    """Whether most of it is words: not a table of code points."""
    sample = text[:20000]
    return sum(map(str.isalpha, sample)) + sample.count(" ") > 0.65 * len(sample)


def _top_level(path: str) -> str:
    return path.split("/")[0].removesuffix(".py").lstrip("_")


def _digest(text: str) -> bytes:
    return hashlib.sha1(text.encode(), usedforsecurity=False).digest()


def _is_new(text: str, seen: set[int]) -> bool:
    """Whether less than half of the text's word shingles (Broder 1997) were seen; if so they are remembered."""
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - _SHINGLE_WORDS + 1))
    shingles = {zlib.crc32(" ".join(words[i : i + _SHINGLE_WORDS]).encode()) for i in starts}
    if 2 * len(shingles & seen) >= len(shingles):
        return False
    seen |= shingles
    return True
