"""Tokenizers: a byte-level BPE trained on the data, or a pretrained one; and text to token ids."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adaptrain.errors import ConfigurationError
from adaptrain.nlp.quiet import quiet_transformers

_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
_BATCH = 1000
_TRAINING_CHARACTERS = 4_000_000  # more changes few of the merges and costs seconds

# Set, or every forked loader worker prints a warning; the workers never tokenize.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of many texts, in one tensor.

    Args:
        ids: All ids one after the other, int32, shape (tokens,).
        offsets: Where each text begins, and the end of the last, int64, shape (texts + 1,).
    """

    ids: Tensor
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, shape (texts,)."""
        return self.offsets.diff()


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (Sennrich et al. 2016; on bytes, Radford et al. 2019): no text is out of vocabulary.

    Args:
        texts: The training text; of more than 4 million characters, every second, third, ... text is used.
        vocab_size: Largest number of tokens, special ones and the 256 bytes counted in.

    Returns:
        The tokenizer, which puts `<s> ... </s>` around a text when asked for special tokens.

    Raises:
        ConfigurationError: `vocab_size` has no room for the bytes.
    """
    smallest = 256 + len(_SPECIAL)
    if vocab_size < smallest:
        raise ConfigurationError(
            f"vocab_size must be at least {smallest} (256 bytes and {len(_SPECIAL)} special tokens), got {vocab_size}."
        )
    tokenizer: Any = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stride = 1 + sum(map(len, texts)) // _TRAINING_CHARACTERS
    tokenizer.train_from_iterator(texts[::stride], trainer)
    first, last = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(first, tokenizer.token_to_id(first)), (last, tokenizer.token_to_id(last))],
    )
    return wrap_tokenizer(tokenizer.to_str())


def wrap_tokenizer(serialized: str) -> PreTrainedTokenizerFast:
    """Returns the transformers tokenizer for the JSON of a trained one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(serialized),
        **_SPECIAL,
        bos_token=_SPECIAL["cls_token"],
        eos_token=_SPECIAL["sep_token"],
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(name_or_path: str) -> Any:
    """Loads a pretrained tokenizer; one without a padding token gets its end-of-text token for it.

    Args:
        name_or_path: A Hugging Face hub name or a local folder.

    Raises:
        ConfigurationError: There is none, or the hub cannot be reached.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # transformers raises many kinds here, a missing optional package among them
        raise ConfigurationError(
            f"No tokenizer can be loaded from {name_or_path!r}: {_first_line(error)}"
            " Give the name of a Hugging Face model (with network, or downloaded before) or a local folder that"
            " holds tokenizer.json; null trains a tokenizer on the data."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigurationError(
            f"The tokenizer of {name_or_path!r} has no padding, end-of-text or unknown token to pad batches with."
            " Add a pad_token to its tokenizer_config.json."
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Returns a hash of what the tokenizer does, for caches."""
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def encode(tokenizer: Any, texts: Sequence[str], *, max_length: int | None, what: str = "text") -> TokenizedTexts:
    """Tokenizes texts, with a progress bar.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts.
        max_length: Longest sample in tokens, special tokens counted in: what is over is cut off. None: no limit and
            no special tokens (a stretch of running text).
        what: Names the work in the progress bar.
    """
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if max_length is not None:
        options = {"truncation": True, "max_length": max_length}
    ids, offsets = array("i"), [0]
    batches = range(0, len(texts), _BATCH)
    console = Console(stderr=True)
    for start in track(batches, f"Tokenizing {what}", console=console, transient=True, disable=len(batches) < 3):
        batch = list(texts[start : start + _BATCH])
        for sample in tokenizer(batch, return_attention_mask=False, return_token_type_ids=False, **options)[
            "input_ids"
        ]:
            ids.extend(sample)
            offsets.append(len(ids))
    flat = torch.frombuffer(ids, dtype=torch.int32).clone() if ids else torch.zeros(0, dtype=torch.int32)
    return TokenizedTexts(flat, torch.tensor(offsets))


def chunk(texts: TokenizedTexts, *, length: int, separator: int | None) -> TokenizedTexts:
    """Joins documents into one stream and cuts it into sequences for language modelling.

    Args:
        texts: The documents.
        length: Tokens of a sequence; only the last may be shorter.
        separator: The id put after every document; None: none.
    """
    documents = texts.ids.tensor_split(texts.offsets[1:-1])
    end = torch.tensor([] if separator is None else [separator], dtype=torch.int32)
    stream = torch.cat([part for document in documents for part in (document, end)])
    if len(stream) % length == 1:  # a sequence of one token has nothing to predict
        stream = stream[:-1]
    offsets = torch.tensor([*range(0, len(stream), length), len(stream)])
    return TokenizedTexts(stream, offsets)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
