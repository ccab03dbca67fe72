from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertModel

from adaptrain import ConfigurationError
from adaptrain.pruning import families
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checks import projections
from adaptrain.pruning.families import Attention, Family, FeedForward, find_family, register_family
from adaptrain.pruning.surgery import shrink
from tests.pruning.models import MODELS, WITHOUT_HEADS
from tests.toys import TextModule, tiny_bert


def two_models(name: object) -> nn.Module:
    module = nn.ModuleDict({"student": tiny_bert(), "teacher": tiny_bert(ffn=96)})
    module.adaptrain_model = name  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_found_inside_a_module(name) -> None:
    model = MODELS[name]()
    match = find_family(TextModule(model))
    assert match.model is model
    assert len(match.layers) == (4 if name.startswith("t5") else 2)
    grouped = name in ("llama", "mistral", "qwen2", "qwen3")
    expected = {"heads": 2, "queries": 2} if grouped else {"heads": 4, "queries": 1}
    if name in WITHOUT_HEADS:
        expected = {"heads": 0, "queries": 0}
    for sizes in structures.dimensions(match):
        assert sizes == {**expected, "head_size": 8 if expected["heads"] else 0, "ffn": 64, "hidden": 32}


def test_of_several_models_it_is_the_one_that_the_module_names() -> None:
    module = two_models("teacher")
    assert find_family(module).model is module["teacher"]
    assert structures.dimensions(find_family(copy.deepcopy(module)))[0]["ffn"] == 96


def test_a_backbone_without_a_head_is_found() -> None:
    config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=64)
    assert len(find_family(BertModel(config)).layers) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_a_compiled_model_is_found_inside_its_wrapper() -> None:
    model = tiny_bert()
    assert find_family(TextModule(torch.compile(model))).model is model


def test_the_dense_twin_stays_dense_and_leaves_the_random_state() -> None:
    match = find_family(tiny_bert())
    keep = structures.dense(match)
    keep[0]["heads"] = [1]
    keep[1]["ffn"] = []
    shrink(match, keep)
    before = torch.get_rng_state()
    twin = match.dense_twin()
    assert torch.equal(before, torch.get_rng_state())
    assert structures.widths(structures.current(find_family(twin))) == [{"heads": 4, "ffn": 64}] * 2


@pytest.mark.parametrize(
    ("build", "seen"),
    [
        (lambda: nn.Linear(2, 2), "found none"),
        (
            lambda: nn.ModuleList([tiny_bert(), tiny_bert()]),
            "BertForSequenceClassification at '0'.*Say in the module which one is meant: adaptrain_model = '0'",
        ),
        (lambda: two_models("techer"), "must be the path of a model in ModuleDict, such as 'student', got 'techer'"),
        (lambda: two_models(1), "must be the path of a model in ModuleDict, such as 'student', got 1"),
        (lambda: two_models(""), "BertForSequenceClassification at 'student'"),
        (
            lambda: AlbertForSequenceClassification(
                AlbertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=64)
            ),
            "AlbertForSequenceClassification cannot be pruned: its layers share one set of parameters",
        ),
    ],
)
def test_others_are_refused_by_name(build, seen) -> None:
    with pytest.raises(ConfigurationError, match=seen):
        find_family(build())


# peft asks transformers for it by the older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_wrapped_by_peft_is_refused_with_what_to_do() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(MODELS["bert"](), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ConfigurationError, match=r"PeftModelForSequenceClassification is peft's.*merge_and_unload"):
        find_family(model)
    assert find_family(model.merge_and_unload()).family.name == "bert"


def test_a_projection_that_is_no_plain_linear_is_refused() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].intermediate.dense = nn.Sequential(model.bert.encoder.layer[1].intermediate.dense)
    with pytest.raises(ConfigurationError, match=r"'intermediate.dense' of layer 1 is a Sequential"):
        find_family(model)


def test_a_projection_shared_with_another_part_is_refused() -> None:
    model = tiny_bert()
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    with pytest.raises(ConfigurationError, match="shared"):
        find_family(model)


class PlainBlock(nn.Module):
    """A layer that is in no way Hugging Face's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PlainBlock(), PlainBlock()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_family_of_ones_own(monkeypatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    register_family(
        Family(
            name="plain",
            matches=lambda module: isinstance(module, PlainModel),
            backbone=lambda model: model,
            layers="blocks",
            attention=None,
            ffn=FeedForward(inputs=("up",), output="down"),
            dense_twin=lambda model: PlainModel(),
            example_inputs=lambda model, batch, sequence: {"x": torch.ones(batch, sequence, 8)},
        )
    )
    model = PlainModel()
    match = find_family(nn.Sequential(model))
    keep = [{"heads": [], "ffn": list(range(0, 16, 2))}, {"heads": [], "ffn": []}]
    with torch.no_grad():
        expected = copy.deepcopy(model)
        expected.blocks[0].down.weight[:, 1::2] = 0
        expected.blocks[1].down.weight[:] = 0
    shrink(match, keep)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x), expected(x))
    assert model.blocks[0].up.out_features == 8


def test_a_declaration_needs_only_what_the_family_has() -> None:
    attention = Attention(module="a", query="a.q", key="a.k", value="a.v", output="a.o", head_size="size")
    family = Family(name="x", matches=lambda module: False, layers="layers", attention=attention, ffn=None)
    assert projections(family) == ("a.q", "a.k", "a.v", "a.o")
