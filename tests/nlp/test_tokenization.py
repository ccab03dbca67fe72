from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptrain import ConfigurationError
from adaptrain.nlp.tokenization import (
    TokenizedTexts,
    chunk,
    encode,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    wrap_tokenizer,
)

TEXTS = [f"def function_{i}(self, value): return value + {i}\n" for i in range(200)]


def test_any_text_survives_the_round_trip() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    assert len(tokenizer) == 300
    for text in ["  def f(x):\n\treturn x", "Grüße, 世界 🙂", ""]:
        ids = encode(tokenizer, [text], max_length=None).ids.tolist()
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.unk_token_id not in ids


def test_training_is_deterministic_and_survives_serialization() -> None:
    first, second = train_tokenizer(TEXTS, vocab_size=320), train_tokenizer(TEXTS, vocab_size=320)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    again = wrap_tokenizer(first.backend_tokenizer.to_str())
    assert again(TEXTS[0])["input_ids"] == first(TEXTS[0])["input_ids"]
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(train_tokenizer(TEXTS, vocab_size=290))


def test_samples_have_special_tokens_and_are_cut_off() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokens = encode(tokenizer, [*TEXTS, "a"], max_length=8)
    assert tokens.lengths.max() == 8
    assert tokens.lengths[-1] == 3
    starts, ends = tokens.offsets[:-1], tokens.offsets[1:] - 1
    assert (tokens.ids[starts] == tokenizer.cls_token_id).all()
    assert (tokens.ids[ends] == tokenizer.sep_token_id).all()


def test_documents_become_one_stream_of_equal_sequences() -> None:
    texts = TokenizedTexts(torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=torch.int32), torch.tensor([0, 2, 2, 7]))
    chunks = chunk(texts, length=4, separator=0)
    assert chunks.ids.tolist() == [1, 2, 0, 0, 3, 4, 5, 6, 7, 0]
    assert chunks.lengths.tolist() == [4, 4, 2]
    # Nothing can be predicted in a last sequence of one token.
    assert chunk(texts, length=3, separator=0).lengths.tolist() == [3, 3, 3]
    assert chunk(texts, length=7, separator=None).lengths.tolist() == [7]


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at least 260 .*got 100"):
        train_tokenizer(TEXTS, vocab_size=100)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"No tokenizer can be loaded from .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_saved_tokenizer_loads_and_gets_a_padding_token(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "</s>"
    assert loaded(TEXTS[3])["input_ids"] == tokenizer(TEXTS[3])["input_ids"]
