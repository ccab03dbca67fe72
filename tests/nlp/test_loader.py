from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptrain.nlp.loader import Collator, ResumableLoader, ShuffledSampler, TokenDataset
from adaptrain.nlp.tokenization import TokenizedTexts


def dataset(count: int = 23) -> TokenDataset:
    lengths = torch.tensor([0, *(1 + i % 5 for i in range(count))])
    ids = torch.repeat_interleave(torch.arange(count), lengths[1:]).int()
    return TokenDataset(TokenizedTexts(ids, lengths.cumsum(0)), torch.arange(count))


def loader(*, seed: int = 0, world_size: int = 1, rank: int = 0, **kwargs: Any) -> ResumableLoader:
    data = dataset()
    sampler = ShuffledSampler(data, seed=seed, world_size=world_size, rank=rank)
    return ResumableLoader(data, sampler=sampler, batch_size=4, collate_fn=Collator(99), **kwargs)


def seen(batches: Any) -> list[list[int]]:
    return [batch["labels"].tolist() for batch in batches]


def test_batches_are_padded_to_their_longest_sample() -> None:
    data = dataset()
    batch = Collator(99)([data[4], data[0]])
    assert batch["input_ids"].tolist() == [[4] * 5, [0, 99, 99, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [4, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert Collator(99, pad_to_multiple_of=8)([data[4]])["input_ids"].shape == (1, 8)
    assert Collator(99, pad_to_multiple_of=8, max_length=6)([data[4]])["input_ids"].shape == (1, 6)


def test_language_model_labels_leave_padding_out() -> None:
    data = TokenDataset(TokenizedTexts(torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([0, 2, 3])))
    batch = Collator(5)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[5, 6], [7, 5]]
    assert batch["labels"].tolist() == [[5, 6], [7, -100]]


def test_every_sample_comes_once_an_epoch_in_another_order_each() -> None:
    first = loader()
    epochs = []
    for epoch in range(2):
        first.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append([label for batch in seen(first) for label in batch])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23))
    assert epochs[0] != epochs[1]
    assert seen(loader()) == seen(loader())
    assert seen(loader()) != seen(loader(seed=1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 5, 6])
def test_a_loaded_state_leaves_exactly_the_rest(workers: int, done: int) -> None:
    whole = loader(num_workers=workers)
    whole.sampler.set_epoch(3)  # type: ignore[attr-defined]
    expected = seen(whole)
    interrupted = loader(num_workers=workers)
    interrupted.sampler.set_epoch(3)  # type: ignore[attr-defined]
    batches = iter(interrupted)
    for _ in range(done):
        next(batches)
    state = interrupted.state_dict()
    assert state == {"epoch": 3, "batches": done}
    del batches
    resumed = loader(num_workers=workers)
    resumed.load_state_dict(state)
    rest = iter(resumed)  # as Lightning does: the iterator first, then the epoch
    resumed.sampler.set_epoch(3)  # type: ignore[attr-defined]
    assert resumed.state_dict() == state
    assert len(resumed) == 6
    assert seen(rest) == expected[done:]
    assert seen(resumed) == expected  # the next time it begins at its start
    assert resumed.state_dict() == {"epoch": 3, "batches": 6}


def test_a_state_of_another_epoch_does_not_shorten_this_one() -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 4})
    resumed.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert len(seen(resumed)) == 6


def test_batches_trained_on_count_not_those_handed_out() -> None:
    trained = loader(trained=lambda: 2)
    batches = iter(trained)
    for _ in range(3):
        next(batches)
    assert trained.state_dict()["batches"] == 2


def test_ranks_share_the_samples_and_resume_alike() -> None:
    shares = [seen(loader(world_size=2, rank=rank)) for rank in range(2)]
    labels = [[label for batch in share for label in batch] for share in shares]
    assert set(labels[0]) | set(labels[1]) == set(range(23))
    assert len(labels[0]) == len(labels[1]) == 12
    for rank in range(2):
        resumed = loader(world_size=2, rank=rank)
        resumed.load_state_dict({"epoch": 0, "batches": 1})
        assert seen(resumed) == shares[rank][1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_not_touched(workers: int) -> None:
    before = torch.get_rng_state()
    list(loader(num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_can_be_iterated_and_has_an_end() -> None:
    data = dataset()
    assert [int(sample["labels"]) for sample in data] == list(range(len(data)))
    assert int(data[-1]["labels"]) == len(data) - 1
    with pytest.raises(IndexError, match=f"no sample {len(data)}"):
        data[len(data)]


def test_a_limited_dataset_serves_the_samples_it_keeps() -> None:
    data = TokenDataset(dataset().texts, torch.arange(23), keep=torch.tensor([7, 2]))
    assert len(data) == 2
    assert [int(data[i]["labels"]) for i in range(2)] == [7, 2]
    assert data.lengths.tolist() == [3, 3]
