"""The resizable batch sampler: every sample once an epoch, a length that is true at any time, a restart mid-epoch."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from adaptrain import ConfigurationError
from adaptrain.execution.sampler import ResizableBatchSampler

SAMPLES = list(range(53))


def random_sampler(seed: int = 0) -> tuple[RandomSampler, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return RandomSampler(SAMPLES, generator=generator), generator


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 7, 53, 60])
def test_unchanged_it_is_torchs_batch_sampler(size: int, drop_last: bool) -> None:
    sampler = ResizableBatchSampler(SequentialSampler(SAMPLES), size, drop_last)
    plain = torch.utils.data.BatchSampler(SequentialSampler(SAMPLES), size, drop_last)
    assert len(sampler) == len(plain)
    for _ in range(2):
        assert list(sampler) == list(plain)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_sample_once_and_the_length_is_true_at_any_time(seed: int, drop_last: bool) -> None:
    chance = random.Random(seed)
    sampler = ResizableBatchSampler(RandomSampler(SAMPLES), 4, drop_last)
    every = chance.choice([1, 1, 2, 3])
    for epoch in range(3):
        sampler.start(epoch)
        batches, promised, sizes = [], [], {}
        for batch in sampler:
            batches.append(batch)
            if chance.random() < 0.3:
                size = chance.randint(1, 9)
                first = sampler.resize(size, every=every)
                assert first >= len(batches)
                assert first % every == 0
                sizes = {start: s for start, s in sizes.items() if start < first} | {first: size}
            promised.append((len(batches), len(sampler)))
        assert len(sampler) == len(batches)
        seen = [index for batch in batches for index in batch]
        assert len(set(seen)) == len(seen)
        missing = len(SAMPLES) - len(seen)
        assert missing == 0 or (drop_last and missing < sampler.batch_size)
        for start, size in sizes.items():
            if start < len(batches) - 1 and not any(start < other <= len(batches) for other in sizes):
                assert len(batches[start]) == size
        # The last promise, after which nothing changed, was kept; the length did not move after the end.
        assert promised[-1][1] == len(batches)


def test_the_length_holds_when_batches_are_taken_ahead() -> None:
    sampler = ResizableBatchSampler(SequentialSampler(SAMPLES), 4)
    taken = iter(sampler)
    for _ in range(6):
        next(taken)
    assert sampler.resize(10) == 6
    assert len(sampler) == 6 + math.ceil((53 - 24) / 10)
    rest = list(taken)
    assert [len(batch) for batch in rest] == [10, 10, 9]
    sampler.resize(2)  # exhausted: holds from the next epoch on
    assert len(sampler) == 9
    sampler.start(1)
    assert len(sampler) == 27


def test_where_samples_are_reached() -> None:
    sampler = ResizableBatchSampler(SequentialSampler(SAMPLES), 10)
    assert [sampler.batches_within(samples) for samples in (9, 10, 26.5, 53)] == [0, 1, 2, 5]
    taken = iter(sampler)
    next(taken), next(taken)
    sampler.resize(5)
    assert [sampler.batches_within(samples) for samples in (9, 10, 26.5, 53)] == [0, 1, 3, 8]
    assert [sampler.position(batches) for batches in (0, 1, 2)] == [0, 10, 20]


def epochs(sampler: ResizableBatchSampler, count: int, *, begin: int = 0) -> list[list[int]]:
    found = []
    for epoch in range(begin, count):
        if epoch > begin:
            sampler.start(epoch)
        found += list(sampler)
    return found


def build(kind: str, seed: int) -> ResizableBatchSampler:
    if kind == "generator":
        order, generator = random_sampler(seed)
        return ResizableBatchSampler(order, 6, generators=[generator])
    if kind == "distributed":
        order = DistributedSampler(SAMPLES, num_replicas=2, rank=1, seed=3)
        return ResizableBatchSampler(order, 6)
    if kind == "weighted":
        return ResizableBatchSampler(WeightedRandomSampler([1.0] * 53, 53), 6)
    return ResizableBatchSampler(RandomSampler(SAMPLES), 6)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("kind", ["generator", "distributed", "weighted", "global"])
def test_a_restart_goes_on_with_exactly_the_remaining_samples(kind: str, ahead: int) -> None:
    torch.manual_seed(5)
    sampler = build(kind, 0)
    taken = iter(sampler)
    for _ in range(2):
        next(taken)
    sampler.resize(4)
    trained = 3
    batches = [next(taken) for _ in range(trained - 2 + ahead)][trained - 2 :]
    state = json.loads(json.dumps(sampler.state_dict(trained)))
    rng = torch.get_rng_state()
    rest = batches + list(taken) + epochs_after(sampler)

    torch.manual_seed(99)  # another process
    fresh = build(kind, 77)
    torch.set_rng_state(rng)
    fresh.load_state_dict(state)
    assert len(fresh) == trained + len(rest) - len(epochs_after_lengths(fresh))
    assert list(fresh) + epochs_after(fresh) == rest


def epochs_after(sampler: ResizableBatchSampler) -> list[list[int]]:
    sampler.start(1)
    getattr(sampler.sampler, "set_epoch", lambda _: None)(1)
    found = list(sampler)
    getattr(sampler.sampler, "set_epoch", lambda _: None)(0)
    return found


def epochs_after_lengths(sampler: ResizableBatchSampler) -> range:
    return range(math.ceil(sampler.samples / 4))


def test_a_change_still_to_come_survives_a_restart() -> None:
    sampler = ResizableBatchSampler(SequentialSampler(SAMPLES), 4)
    taken = iter(sampler)
    ahead = [next(taken) for _ in range(5)]
    assert sampler.resize(8, every=2) == 6
    state = sampler.state_dict(3)
    fresh = ResizableBatchSampler(SequentialSampler(SAMPLES), 4)
    fresh.load_state_dict(state)
    assert len(fresh) == len(sampler)
    assert list(fresh) == ahead[3:] + list(taken)
    taken_none_ahead = ResizableBatchSampler(SequentialSampler(SAMPLES), 4)
    next(iter(taken_none_ahead))
    taken_none_ahead.resize(8)
    fresh.load_state_dict(taken_none_ahead.state_dict(1))
    assert [len(batch) for batch in fresh] == [8] * 6 + [1]
    # The same where the change itself was already handed out.
    fresh.load_state_dict(sampler.state_dict(3))
    assert [len(batch) for batch in fresh] == [4, 4, 4, 8, 8, 8, 5]


def test_another_order_after_a_restart_is_refused() -> None:
    class Own(SequentialSampler):
        def __iter__(self):
            order = list(range(53))
            random.Random().shuffle(order)
            return iter(order)

    sampler = ResizableBatchSampler(Own(SAMPLES), 4)
    next(iter(sampler))
    fresh = ResizableBatchSampler(Own(SAMPLES), 4)
    fresh.load_state_dict(sampler.state_dict(1))
    with pytest.raises(ConfigurationError, match=r"Own gives another order.*torch\.Generator"):
        list(fresh)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_serves_a_loader(workers: int) -> None:
    sampler = ResizableBatchSampler(RandomSampler(SAMPLES), 5)
    loader = DataLoader(SAMPLES, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)  # type: ignore[arg-type]
    for _ in range(2):
        seen = []
        for number, batch in enumerate(loader):
            seen += batch.tolist()
            if number == 1:
                sampler.resize(11 if len(batch) == 5 else 5)
        assert sorted(seen) == SAMPLES
