from __future__ import annotations

import json

import pytest
import torch

from adaptrain import ConfigurationError, ModelFamily
from adaptrain.family import model_family
from adaptrain.resources.device import device_name
from tests.toys import weights

CPU = torch.device("cpu")


@pytest.fixture
def family(run) -> ModelFamily:
    return ModelFamily.load(run[0])


def test_every_structure_of_the_run_is_a_member(family, run):
    assert [(member.name, member.step) for member in family] == [("dense", 8), ("pruned-1", 17), ("final", 24)]
    params = [member.params for member in family]
    assert params == sorted(params, reverse=True)
    assert len(set(params)) == 3
    assert torch.equal(weights(family["final"].model()), weights(run[1]))
    assert family["pruned-1"].widths != family["dense"].widths
    assert all({"val/loss", "val/accuracy"} <= set(member.metrics) for member in family)
    assert (family.metric, family.mode) == ("val/accuracy", "max")


def test_members_are_measured_where_they_were_trained(family):
    assert family.shapes == {"batch": (8, 16), "single": (1, 16)}
    for member in family:
        costs = member.costs[device_name(CPU)]
        assert set(costs) == {"8x16", "1x16"}
        assert costs["8x16"]["flops"] > 4 * costs["1x16"]["flops"]
        assert costs["8x16"]["peak_memory_bytes"] > 4 * member.params
        assert costs["8x16"]["latency_ms"] > 0
    flops = [member.costs[device_name(CPU)]["8x16"]["flops"] for member in family]
    assert flops == sorted(flops, reverse=True)


def test_select_takes_the_best_that_fits(family):
    smallest = family["final"]
    assert family.select(params_m=smallest.params / 1e6) is smallest
    best = max(member.metric for member in family)
    assert family.select().metric == best
    memory = {name: cost["peak_memory_bytes"] / 2**20 for name, cost in family.measure().items()}
    assert family.select(memory_mib=memory["final"]) is smallest
    with pytest.raises(ConfigurationError, match=r"latency_ms=1e-06 cannot be met: the fastest.* at 8 x 16 tokens on"):
        family.select(latency_ms=1e-6)


def test_another_shape_is_measured_and_kept(family, run):
    assert family.select(batch_size=2, sequence_length=5) in family.members
    known = json.loads((run[0] / "family" / "dense.json").read_text())
    assert "2x5" in known["costs"][device_name(CPU)]


def test_another_device_is_measured_anew(family, run, monkeypatch, caplog):
    monkeypatch.setattr(model_family, "device_name", lambda device: "another processor, 64 threads")
    with caplog.at_level("INFO"):
        again = ModelFamily.load(run[0])
        again.select(params_m=1)
    assert "Measuring 3 models at 8 samples of 16 tokens on another processor, 64 threads; they were" in caplog.text
    assert "8x16" in again["dense"].costs["another processor, 64 threads"]
    caplog.clear()
    ModelFamily.load(run[0]).select(params_m=1)
    assert "Measuring" not in caplog.text


def test_a_family_that_cannot_be_written_is_measured_all_the_same(family, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(family._store, "update", refuse)
    assert set(family.measure(batch_size=3)) == {"dense", "pruned-1", "final"}
    assert "3x16" in family["dense"].costs[device_name(CPU)]


def test_the_table_names_members_and_costs(family):
    text = str(family.table())
    assert all(word in text for word in ("dense", "pruned-1", "final", "accuracy", "ms", device_name(CPU)))
    assert "1x16" in " ".join(family.table().columns())
    assert "4x6" in " ".join(family.table(batch_size=4, sequence_length=6).columns())


def test_members_share_memory_for_inference_and_can_be_had_alone(family):
    member = family["dense"]
    assert member.model() is member.model()
    assert not any(parameter.requires_grad for parameter in member.model().parameters())
    own = member.model(share=False)
    assert all(parameter.requires_grad for parameter in own.parameters())
    with torch.no_grad():
        own.classifier.weight += 1
    assert not torch.equal(own.classifier.weight, member.model().classifier.weight)
    held = member.model()
    member.release()
    assert member.model() is not held


def test_wrong_arguments_are_refused(family, tmp_path):
    for arguments in (
        {"latency_ms": 0},
        {"memory_mib": "much"},
        {"params_m": -1},
        {"metric_at_least": float("nan")},
        {"batch_size": 0},
        {"batch_size": 1.5},
    ):
        name, value = next(iter(arguments.items()))
        with pytest.raises(ConfigurationError, match=rf"{name} must be .*, got {value!r}"):
            family.select(**{name: value})
    with pytest.raises(ConfigurationError, match=r"no member 'tiny'\. It has: dense, pruned-1, final"):
        family["tiny"]
    with pytest.raises(ConfigurationError, match="device 'cuda:99' cannot be used"):
        family.select(device="cuda:99")
    with pytest.raises(ConfigurationError, match="no folder"):
        ModelFamily.load(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="no family of models"):
        ModelFamily.load(tmp_path)
    with pytest.raises(ConfigurationError, match="has no tokenizer"):
        family["dense"].predict("some text")
    with pytest.raises(ConfigurationError, match="batch_size must be"):
        family["dense"].predict("some text", batch_size=0)
