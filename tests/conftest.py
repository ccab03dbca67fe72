"""Fixtures shared by the suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network

import pytest
import torch

from adaptrain.pruning import cost

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _few_repeats() -> Iterator[None]:
    """Latencies that no test reads are measured as seldom as those of a slow model, not a hundred times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "repeats_for", lambda latency_ms: _repeats_for(max(latency_ms, 1e3)))
        yield


_repeats_for = cost.repeats_for


@pytest.fixture
def usual_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies are measured as often as for a user."""
    monkeypatch.setattr(cost, "repeats_for", _repeats_for)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What imports made stays: full collections, several in a test, would walk through it for half of the time."""
    gc.collect()
    gc.freeze()
