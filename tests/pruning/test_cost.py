from __future__ import annotations

import io
import time

import pytest
import torch
from torch import nn

from adaptrain import ConfigurationError
from adaptrain.pruning import cost
from adaptrain.pruning.cost import (
    count_flops,
    count_params,
    example_inputs,
    measure_latency,
    peak_activation_bytes,
    repeats_for,
    size_on_disk_bytes,
)
from tests.pruning.models import MODELS
from tests.toys import tiny_bert, tiny_llama


def test_flops_of_an_encoder_by_hand() -> None:
    batch, length, hidden, ffn, layers, labels = 3, 10, 32, 64, 2, 3
    tokens = batch * length
    attention = 2 * tokens * 4 * hidden * hidden + 4 * tokens * length * hidden
    feed_forward = 2 * tokens * 2 * hidden * ffn
    head = 2 * batch * hidden * hidden + 2 * batch * hidden * labels  # pooler and classifier see one token
    model = tiny_bert()
    assert count_flops(model, example_inputs(model, batch, length)) == layers * (attention + feed_forward) + head


def test_flops_of_a_decoder_with_grouped_queries_by_hand() -> None:
    tokens, length, hidden, ffn, vocab = 2 * 10, 10, 32, 64, 64
    keys_and_values = 2 * 16 * hidden
    attention = 2 * tokens * (2 * hidden * hidden + keys_and_values) + 4 * tokens * length * hidden
    feed_forward = 2 * tokens * 3 * hidden * ffn
    model = tiny_llama()
    expected = 2 * (attention + feed_forward) + 2 * tokens * hidden * vocab
    assert count_flops(model, example_inputs(model, 2, length)) == expected


def test_tied_parameters_count_once() -> None:
    assert count_params(tiny_llama(tie=False)) - count_params(tiny_llama(tie=True)) == 64 * 32


def test_size_is_what_lands_on_disk() -> None:
    model = tiny_bert()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert size_on_disk_bytes(model) == pytest.approx(len(buffer.getvalue()), rel=0.01)


class Sleeps(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.inner = seconds, nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        time.sleep(self.seconds)
        return x


def test_latency_is_in_milliseconds_and_modes_are_put_back() -> None:
    fast, slow = Sleeps(0.002), Sleeps(0.02)
    fast.train()
    fast.inner.eval()
    times = measure_latency({"fast": fast, "slow": slow}, {"x": torch.ones(1)}, repeats=3)
    assert times["slow"] >= 20
    assert times["fast"] >= 2
    assert times["fast"] < times["slow"]
    assert fast.training
    assert not fast.inner.training


def test_each_model_is_timed_as_often_as_asked() -> None:
    model = Sleeps(0.0)
    calls: list[float] = []
    model.register_forward_hook(lambda *_: calls.append(time.perf_counter()))
    times = measure_latency({"it": model}, {"x": torch.ones(1)}, repeats=4)
    assert len(calls) == 1 + 4  # after one to warm up
    assert set(times) == {"it"}


def test_how_often_follows_from_the_slowest_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(cost, "repeats_for", lambda latency: asked.append(latency) or 6)
    fast, slow = Sleeps(0.0), Sleeps(0.01)
    calls: list[float] = []
    slow.register_forward_hook(lambda *_: calls.append(time.perf_counter()))
    measure_latency({"fast": fast, "slow": slow}, {"x": torch.ones(1)})
    assert asked[0] >= 10
    assert len(calls) == (1 + 1) + (1 + 6)  # one that counts to know how often, then as often


def test_copies_are_timed_in_place_of_the_models() -> None:
    class Part(nn.Module):
        def __init__(self, shared: nn.Parameter, seconds: float) -> None:
            super().__init__()
            self.shared = shared
            self.own = nn.Parameter(torch.zeros(1))
            self.seconds = seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self)
            time.sleep(self.seconds)
            return x

    seen: list[Part] = []
    shared = nn.Parameter(torch.zeros(1))
    # Waiting for a core is left out by another clock, which may disagree by microseconds.
    models = {"slow": Part(shared, 0.011), "fast": Part(shared, 0.0)}
    times = measure_latency(models, {"x": torch.ones(1)}, repeats=6, copies=3)
    assert times["slow"] >= 10 > times["fast"]
    assert len(seen) == 3 * 2 * 2  # three copies of two models, two forwards of each
    assert len({id(part) for part in seen}) == 3 * 2
    originals = {id(part.own) for part in models.values()}
    assert not originals & {id(part.own) for part in seen}
    assert all(part.shared is shared for part in seen)  # it costs all of them the same


def test_more_repeats_for_faster_models() -> None:
    assert [repeats_for(ms) for ms in (0.0, 1, 10, 1000)] == [100, 100, 50, 8]


def test_peak_of_activations_counts_what_lives_at_once() -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                x = x + 1  # the one before is freed: two at once, the first of them the caller's
            return torch.cat([x, x])

    x = torch.zeros(1000)
    assert peak_activation_bytes(Chain(), {"x": x}) == 4000 + 8000


@pytest.mark.parametrize("name", MODELS)
def test_example_inputs_fit_every_family(name) -> None:
    model = MODELS[name]()
    inputs = example_inputs(model, 2, 60)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 60)
    assert model.config.pad_token_id not in inputs["input_ids"].unique().tolist()
    model(**inputs)


@pytest.mark.parametrize(("name", "most"), [("bert", 64), ("roberta", 62), ("llama", 64)])
def test_too_long_a_sequence_is_refused(name, most) -> None:
    model = MODELS[name]()
    model(**example_inputs(model, 1, most))
    with pytest.raises(ConfigurationError, match=f"at most {most} tokens, but {most + 1}"):
        example_inputs(model, 1, most + 1)
