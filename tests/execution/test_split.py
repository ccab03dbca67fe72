from __future__ import annotations

import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from transformers import BatchEncoding

from adaptrain.execution.split import batch_size, copy_containers, layout, why_whole
from adaptrain.execution.weight import sample_weights

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Sentences:
    input_ids: torch.Tensor
    labels: torch.Tensor
    texts: list


def padded(lengths: list[int], columns: int, *, side: str = "right") -> dict[str, torch.Tensor]:
    """Ids are row * 100 + position among the real tokens, so that every token can be told."""
    ids = torch.zeros(len(lengths), columns, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(columns - length, columns)
        ids[row, place] = torch.arange(length) + 100 * (row + 1)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths))}


def cut(batch, size: int, **kwargs) -> list:
    shape = layout(batch, **({"by_length": True} | kwargs))
    ordered = shape.ordered(batch)
    return [shape.take(ordered, piece) for piece in shape.pieces(size)]


def tokens(pieces) -> list[int]:
    return sorted(int(token) for piece in pieces for token in piece["input_ids"][piece["attention_mask"] != 0])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        ({"a": {"b": [torch.zeros(3, 1)]}, "n": 7}, 3),
        (Pair(torch.zeros(2), torch.zeros(2)), 2),
        ({"x": torch.zeros(6), "scale": torch.tensor(1.0), "ids": torch.zeros(1, 8)}, 6),
        ({"x": torch.zeros(6), "class_weight": torch.zeros(3)}, None),
        (["a", "b"], None),
        (Sentences(torch.zeros(4, 2), torch.zeros(4), ["a"] * 4), 4),
        (Sentences, None),
        ({}, None),
        (torch.tensor(1.0), None),
    ],
)
def test_the_batch_size_is_found(batch, size) -> None:
    assert batch_size(batch) == size


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_token_is_in_one_piece_and_padding_is_trimmed(size: int, side: str) -> None:
    batch = padded([3, 9, 1, 5, 5, 2, 8], 12, side=side)
    pieces = cut(batch, size, trim_left=True)
    assert tokens(pieces) == tokens([batch])
    assert sorted(int(label) for piece in pieces for label in piece["labels"]) == list(range(7))
    assert max(piece["input_ids"].shape[0] for piece in pieces) <= size
    for piece in pieces:
        lengths = piece["attention_mask"].sum(1)
        assert piece["input_ids"].shape == piece["attention_mask"].shape == (len(lengths), int(lengths.max()))
        assert piece["input_ids"].is_contiguous()
        for row, label in enumerate(piece["labels"]):  # rows stay together
            assert set((piece["input_ids"][row][piece["attention_mask"][row] != 0] // 100).tolist()) == {int(label) + 1}
    assert [len(piece["labels"]) for piece in pieces] == [len(p["labels"]) for p in cut(batch, size, by_length=False)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_pieces_keep_a_multiple_of_columns_as_far_as_there_are(side: str) -> None:
    batch = padded([3, 9, 1, 5, 5, 2, 8], 10, side=side)
    pieces = cut(batch, 2, trim_left=True, multiple=4)
    assert tokens(pieces) == tokens([batch])
    assert [piece["input_ids"].shape for piece in pieces] == [(1, 10), (2, 8), (2, 8), (2, 4)]
    assert [sorted(piece["attention_mask"].sum(1).tolist()) for piece in pieces] == [[9], [5, 5], [3, 8], [1, 2]]


def test_pieces_are_even_and_longest_first() -> None:
    shape = layout(padded([3, 9, 1, 5, 5, 2, 8], 12), by_length=True)
    assert [piece.size for piece in shape.pieces(3)] == [2, 2, 3]
    assert [piece.length for piece in shape.pieces(3)] == [9, 5, 3]


def test_by_samples_keeps_order_padding_and_memory() -> None:
    batch = padded([3, 9, 1, 5], 12)
    pieces = cut(batch, 2, by_length=False)
    assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces]), batch["input_ids"])
    assert pieces[1]["input_ids"].data_ptr() == batch["input_ids"][2:].data_ptr()  # a view


def test_a_batch_in_one_piece_without_padding_is_the_batch_itself() -> None:
    batch = padded([12, 12], 12)
    assert cut(batch, 2)[0] is batch


def test_the_left_is_not_trimmed_where_positions_are_absolute() -> None:
    batch = padded([3, 9], 12, side="left")
    assert [piece["input_ids"].shape[1] for piece in cut(batch, 1)] == [12, 12]
    batch["position_ids"] = torch.arange(12).repeat(2, 1)
    pieces = cut(batch, 1)
    assert [piece["input_ids"].shape[1] for piece in pieces] == [9, 3]
    assert pieces[1]["position_ids"].tolist() == [[9, 10, 11]]


def test_the_left_is_not_trimmed_before_a_label_that_padding_predicts() -> None:
    batch = padded([3, 9], 12, side="left")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert [piece["input_ids"].shape[1] for piece in cut(batch, 1, trim_left=True)] == [12, 12]
    batch["labels"][0, :10] = -100  # a prompt: the first token is no label
    assert [piece["input_ids"].shape[1] for piece in cut(batch, 1, trim_left=True)] == [12, 3]


def test_a_label_on_padding_is_kept() -> None:
    batch = padded([3, 4], 12)
    batch["labels"] = torch.full((2, 12), -100)
    batch["labels"][0, 7] = 5
    assert [piece["input_ids"].shape[1] for piece in cut(batch, 1)] == [8, 4]


def test_every_tensor_with_the_padded_length_is_trimmed_and_no_other() -> None:
    batch = padded([3, 5], 12) | {
        "token_type_ids": torch.zeros(2, 12, dtype=torch.long),
        "embeds": torch.rand(2, 12, 4),
        "features": torch.rand(2, 12),  # as many columns by chance: values beside the tokens
        "weights": torch.rand(2, 12) * torch.tensor([[1.0] * 3 + [0] * 9, [1.0] * 5 + [0] * 7]),
        "image": torch.rand(2, 3, 12),
    }
    long, short = cut(batch, 1)
    assert long["token_type_ids"].shape == (1, 5)
    assert long["embeds"].shape == (1, 5, 4)
    assert long["features"].shape == (1, 12)
    assert long["weights"].shape == (1, 5)
    assert long["image"].shape == (1, 3, 12)
    assert torch.equal(short["embeds"][0], batch["embeds"][0, :3])


def test_an_all_padding_row_is_served() -> None:
    batch = padded([0, 4], 6)
    assert sum(len(piece["labels"]) for piece in cut(batch, 1)) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda b: BatchEncoding(b),
        lambda b: OrderedDict(b),
        lambda b: Pair(b["input_ids"], [b, "note"]),
        lambda b: (b, torch.tensor(3.0)),
        lambda b: Sentences(b["input_ids"], b["labels"], [b]),
    ],
)
def test_containers_keep_their_type(wrap) -> None:
    batch = wrap(padded([3, 9, 1, 5], 12))
    pieces = cut(batch, 2)
    assert all(type(piece) is type(batch) for piece in pieces)
    assert sum(batch_size(piece) for piece in pieces) == 4


def test_a_list_with_an_entry_per_sample_follows_its_rows() -> None:
    batch = padded([3, 9, 1, 5], 12) | {"names": ["a", "b", "c", "d"], "note": "shared"}
    pieces = cut(batch, 2)
    assert [piece["names"] for piece in pieces] == [["b", "d"], ["a", "c"]]
    assert {piece["note"] for piece in pieces} == {"shared"}


def test_a_dataclass_is_split_like_a_mapping_and_stays_as_it_is() -> None:
    batch = Sentences(torch.arange(8).view(4, 2), torch.arange(4), ["a", "b", "c", "d"])
    pieces = cut(batch, 2)
    assert [piece.texts for piece in pieces] == [["a", "b"], ["c", "d"]]
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), batch.input_ids)
    assert batch.texts == ["a", "b", "c", "d"]
    own = copy_containers({"inner": batch})
    assert own["inner"] is not batch
    assert own["inner"].input_ids is batch.input_ids
    assert sample_weights(Sentences(batch.input_ids, torch.tensor([[1, -100], [1, 1]]), []), 2, "auto") == [1, 2]


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (object(), "no tensors are found in a object"),
        ({"x": torch.zeros(6, 2), "y": [torch.zeros(3)]}, r"do not share one size.*\(x: 6, y.0: 3\)"),
        ({"x": torch.zeros(0, 2)}, "no samples"),
    ],
)
def test_it_says_why_a_batch_runs_whole(batch, why) -> None:
    assert layout(batch, by_length=False) is None
    assert re.search(why, why_whole(batch))


def test_the_batch_itself_is_not_changed() -> None:
    batch = padded([3, 9, 1, 5], 12)
    before = {name: value.clone() for name, value in batch.items()}
    cut(batch, 2)
    assert all(torch.equal(batch[name], before[name]) for name in batch)
