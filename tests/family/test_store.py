from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from adaptrain import ConfigurationError
from adaptrain.family.store import FamilyStore
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import shrink
from tests.toys import tiny_bert, tiny_llama, weights

IDS = {"input_ids": torch.arange(4, 16).view(2, 6)}


@pytest.fixture
def store(tmp_path: Path) -> FamilyStore:
    store = FamilyStore(tmp_path / "family")
    store.begin()
    return store


def pruned(model):
    match = find_family(model)
    shrink(match, [{"heads": [1], "ffn": [0, 5, 9]}, {"heads": [], "ffn": []}])
    return match


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_a_member_comes_back_as_it_was(store, build):
    match = pruned(build().eval())
    with torch.no_grad():
        expected = match.model(**IDS).logits
    store.add(match, name="pruned-1", step=3)
    (member,) = store.members()
    assert (member["name"], member["step"], member["params"]) == ("pruned-1", 3, len(weights(match.model)))
    model = store.rebuild(member)
    with torch.no_grad():
        assert torch.equal(model(**IDS).logits, expected)
    assert len(weights(model)) == len(weights(match.model))  # ties are ties
    assert not model.training


def test_what_members_share_is_stored_and_loaded_once(store):
    model = tiny_bert()
    store.add(find_family(model), name="dense", step=1)
    dense = store.stored_bytes()
    with torch.no_grad():
        model.classifier.weight += 1
    store.add(find_family(model), name="final", step=2)
    added = store.stored_bytes() - dense
    assert 0 < added < 0.02 * dense
    loaded: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
    first, second = (store.rebuild(member, loaded=loaded) for member in store.members())
    embedding = "bert.embeddings.word_embeddings.weight"
    assert first.get_parameter(embedding).data_ptr() == second.get_parameter(embedding).data_ptr()
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert torch.equal(weights(second), weights(model))
    del first, second
    assert not loaded  # nothing is kept alive


def test_equal_weights_of_one_model_are_not_tied(store):
    store.add(find_family(tiny_bert()), name="dense", step=1)
    model = store.rebuild(store.members()[0])
    one, other = (model.bert.encoder.layer[i].output.LayerNorm.weight for i in range(2))
    assert torch.equal(one, other)
    assert one is not other


def test_members_that_refer_to_another_outlive_it(store):
    model = tiny_bert()
    store.add(find_family(model), name="dense", step=1)
    store.add(find_family(model), name="final", step=2)
    store.keep(["final"])
    (member,) = store.members()
    assert torch.equal(weights(store.rebuild(member)), weights(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.rand_like(parameter)
    store.replace_weights("final", find_family(model), metrics={"val/loss": 1.0})
    assert {path.name for path in store.folder.glob("*.safetensors")} == {"final.2.safetensors"}
    (member,) = store.members()
    assert member["metrics"] == {"val/loss": 1.0}
    assert torch.equal(weights(store.rebuild(member)), weights(model))


def test_a_new_run_keeps_the_older_family_aside(store):
    store.add(find_family(tiny_bert()), name="dense", step=1)
    store.begin()
    assert store.members() == []
    assert len(FamilyStore(store.folder.with_name("family.1")).members()) == 1


def test_what_is_damaged_or_missing_is_refused(store, tmp_path):
    with pytest.raises(ConfigurationError, match="no family of models in"):
        store.about()
    store.write_about({"task": "classification"})
    assert store.about()["task"] == "classification"
    (store.folder / "family.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigurationError, match="format 99"):
        store.about()
    member = store.add(find_family(tiny_bert()), name="dense", step=1)
    with pytest.raises(ConfigurationError, match="go on with the members pruned-1"):
        store.keep(["dense", "pruned-1"])
    (store.folder / "dense.safetensors").write_bytes(b"not this")
    with pytest.raises(ConfigurationError, match=r"dense\.safetensors, .* cannot be read"):
        store.rebuild(member)
    (store.folder / "dense.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is not what adaptrain writes"):
        store.members()
