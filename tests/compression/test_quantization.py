from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from adaptrain import ConfigurationError
from adaptrain.compression import load_quantized, quantize, save_quantized
from adaptrain.compression.int4 import GROUP, Int4Embedding, Int4Linear, round_groups, rounded_to_groups
from adaptrain.compression.int8 import Int8Embedding, Int8Linear, round_rows
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import shrink
from tests.processes import run_python
from tests.pruning.models import MODELS
from tests.toys import text_loader, tiny_bert, tiny_llama


def batch() -> dict[str, torch.Tensor]:
    inputs = dict(next(iter(text_loader())))
    del inputs["labels"]
    return inputs


def logits(model: Any, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or batch())).logits


def test_rounded_rows_are_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 40) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 0.0])[:, None]
    multiples, steps = round_rows(weight)
    assert multiples.dtype == torch.int8
    assert ((multiples * steps[:, None] - weight).abs() <= steps[:, None] / 2 * (1 + 1e-5)).all()
    assert multiples.abs().amax(1).tolist() == [127] * 5 + [0]


def test_weights_in_8_bits_give_the_product_of_their_rounded_values() -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(24, 10), torch.randn(3, 5, 24)
    rounded = Int8Linear(*round_rows(linear.weight), linear.bias, dynamic=False)
    multiples, steps = round_rows(linear.weight)
    expected = inputs @ (multiples * steps[:, None]).T + linear.bias
    torch.testing.assert_close(rounded(inputs), expected.detach())
    assert rounded(inputs.bfloat16()).dtype == torch.bfloat16


def test_integer_arithmetic_rounds_the_inputs_by_their_range() -> None:
    """Against a plain model of it: inputs to 8 bits between their least and greatest, then the exact product."""
    torch.manual_seed(0)
    linear, inputs = nn.Linear(24, 10), torch.randn(4, 24)
    dynamic = Int8Linear(*round_rows(linear.weight), linear.bias, dynamic=True)
    low, high = min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))
    step = (high - low) / 127  # one bit of headroom, so that sums of two products fit 16 bits
    said = dynamic(inputs)
    exact = inputs @ dynamic.weight.T + linear.bias.detach()
    assert not torch.equal(said, exact)
    bound = dynamic.weight.abs().sum(1) * step  # each input is off by at most a step
    assert ((said - exact).abs() <= bound).all()
    assert float((said - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_an_embedding_in_8_bits_gives_its_rounded_entries() -> None:
    embedding = nn.Embedding(9, 16, padding_idx=0)
    rounded = Int8Embedding(*round_rows(embedding.weight), 0)
    ids = torch.tensor([[0, 3], [8, 1]])
    torch.testing.assert_close(rounded(ids), embedding(ids).detach(), rtol=0, atol=0.02)
    torch.testing.assert_close(rounded(ids), rounded.weight[ids])


@pytest.mark.parametrize("columns", [8, GROUP, 70])
def test_four_bits_are_within_half_a_step_of_each_group(columns) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, columns) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 0.0])[:, None]
    packed, steps, held = round_groups(weight)
    groups = -(-columns // GROUP)
    assert (packed.dtype, packed.shape, steps.shape, held) == (torch.uint8, (5, 16 * groups), (5, groups), columns)
    layer = Int4Linear(packed, steps, held, None)
    assert torch.equal(layer.weight, rounded_to_groups(weight))
    by_weight = steps.float().repeat_interleave(GROUP, 1)[:, :columns]
    # bfloat16 keeps a step within 1/256, so that the seventh multiple may fall short of the greatest weight by that.
    assert ((layer.weight - weight).abs() <= by_weight * (0.5 + 7 / 256)).all()
    assert len(layer.weight[1].unique()) <= 15 * groups


def test_a_layer_in_four_bits_gives_the_product_of_its_rounded_values() -> None:
    torch.manual_seed(0)
    linear, embedding = nn.Linear(24, 10), nn.Embedding(9, 40, padding_idx=0)
    inputs, ids = torch.randn(3, 5, 24), torch.tensor([[0, 3], [8, 1]])
    rounded = Int4Linear(*round_groups(linear.weight), linear.bias)
    expected = inputs @ rounded_to_groups(linear.weight).T + linear.bias
    torch.testing.assert_close(rounded(inputs), expected.detach())
    assert rounded(inputs.bfloat16()).dtype == torch.bfloat16
    entries = Int4Embedding(*round_groups(embedding.weight), 0)
    assert torch.equal(entries(ids), rounded_to_groups(embedding.weight)[ids])
    assert torch.equal(entries(ids), entries.weight[ids])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "distilbert", "t5"])
def test_every_family_in_four_bits(name) -> None:
    model = MODELS[name]().eval()
    inputs = find_family(model).example_inputs(4, 12)
    expected = logits(model, inputs)
    quantized = quantize(model, "int4_weight")
    assert float((logits(quantized.model, inputs) - expected).abs().max()) < 0.5 * float(expected.abs().max())
    assert quantized.trials[1].size_bytes < 0.45 * quantized.trials[0].size_bytes  # biases and norms count here


def check_says_nearly_the_same(model: Any, method: str) -> tuple[Any, Any]:
    """Checks a quantized model's logits beside the model's, which is to stay as it is; returns the two trials."""
    before = copy.deepcopy(model.state_dict())
    inputs = find_family(model).example_inputs(4, 12)
    expected = logits(model, inputs)
    quantized = quantize(model, method)
    said = logits(quantized.model, inputs).float()
    assert float((said - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    none, lower = quantized.trials
    assert none.method == "none"
    return none, lower


@pytest.mark.parametrize("method", ["bf16", "int8_dynamic", "int8_weight"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "distilbert", "t5"])
def test_every_family_in_lower_precision_says_nearly_the_same(name, method) -> None:
    none, lower = check_says_nearly_the_same(MODELS[name]().eval(), method)
    assert lower.size_bytes < (0.55 if method == "bf16" else 0.5) * none.size_bytes  # biases and norms count here


@pytest.mark.parametrize("method", ["bf16", "int8_dynamic", "int8_weight", "int4_weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_a_model_keeps_the_precision_of_its_other_layers(make, dtype, method, tmp_path) -> None:
    model = make().eval().to(dtype)
    quantized = quantize(model, method=method)
    said = logits(quantized.model)
    assert said.dtype == (torch.bfloat16 if method == "bf16" else dtype)
    expected = logits(quantize(copy.deepcopy(model).float(), method=method).model)
    torch.testing.assert_close(said.float(), expected.float(), rtol=0.05, atol=0.05)
    assert torch.equal(logits(load_quantized(save_quantized(quantized, tmp_path))), said)


def test_a_model_in_bfloat16_is_not_tried_in_bfloat16_again() -> None:
    tried = quantize(tiny_bert().eval().to(torch.bfloat16), "auto", example_inputs=batch()).trials
    assert [trial.method for trial in tried] == ["none", "int8_dynamic", "int8_weight", "int4_weight"]


@pytest.mark.parametrize("method", ["int8_dynamic", "int8_weight", "int4_weight"])
def test_another_dtype_changes_what_is_computed_and_not_what_is_held(method) -> None:
    quantized = quantize(tiny_bert().eval(), method).model
    logits(quantized)  # packs the weights
    steps = {name: value.clone() for name, value in quantized.state_dict().items() if "steps" in name}
    halved = copy.deepcopy(quantized).to(torch.bfloat16)
    assert logits(halved).dtype == torch.bfloat16
    torch.testing.assert_close(logits(halved).float(), logits(quantized), rtol=0.05, atol=0.05)
    assert steps
    assert all(torch.equal(halved.state_dict()[name], value) for name, value in steps.items())
    assert all(halved.state_dict()[name].dtype == value.dtype for name, value in steps.items())


@pytest.mark.parametrize(("method", "held"), [("int8_weight", "multiples"), ("int4_weight", "packed")])
def test_what_is_shared_is_held_once(method, held) -> None:
    quantized = quantize(tiny_llama(), method).model
    assert getattr(quantized.lm_head, held).data_ptr() == getattr(quantized.model.embed_tokens, held).data_ptr()


def test_auto_measures_evaluates_and_keeps_what_loses_little() -> None:
    model, seen = tiny_bert().eval(), []

    def evaluate(candidate: Any) -> float:
        seen.append(type(candidate.classifier).__name__)
        return {"Linear": 0.9, "Int8Linear": 0.85, "Int4Linear": 0.7}[seen[-1]] - 0.001 * (
            candidate.dtype == torch.bfloat16
        )

    found = quantize(model, example_inputs=batch(), evaluate=evaluate, minimize="size", max_metric_drop=0.01)
    trials = {trial.method: trial for trial in found.trials}
    assert set(trials) == {"none", "bf16", "int8_dynamic", "int8_weight", "int4_weight"}
    assert found.method == "bf16"
    assert "loses 0.05, more than max_metric_drop=0.01" in str(trials["int8_dynamic"].refused)
    assert "loses 0.2" in str(trials["int4_weight"].refused)
    assert all(trials[name].latency_ms > 0 for name in ("none", "bf16", "int8_weight"))
    table = found.table()
    assert "chosen" in next(line for line in table.splitlines() if line.startswith("bf16"))
    assert "0.5" in table
    loose = quantize(model, example_inputs=batch(), evaluate=evaluate, minimize="size", max_metric_drop=0.1)
    assert loose.method in ("int8_dynamic", "int8_weight")


def test_a_metric_that_is_to_fall_and_one_that_is_no_number() -> None:
    def loss(candidate: Any) -> float:
        return 1.0 if type(candidate.classifier) is nn.Linear else float("nan")

    found = quantize(
        tiny_bert().eval(),
        example_inputs=batch(),
        evaluate=loss,
        mode="min",
        minimize="size",
        candidates=["int8_weight", "bf16"],
    )
    assert found.method == "bf16"


def test_a_method_that_does_not_run_is_listed_with_its_error() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.linear.weight.dtype != torch.float32:
                raise RuntimeError("only in full precision")
            return self.linear(x)

    found = quantize(Picky(), example_inputs={"x": torch.randn(2, 8)}, candidates=["bf16", "int8_weight"])
    refused = {trial.method: trial.refused for trial in found.trials}
    assert refused["bf16"] == "RuntimeError: only in full precision"
    assert "only in full precision" in found.table()
    with pytest.raises(ConfigurationError, match="'bf16' does not run here: RuntimeError: only"):
        quantize(Picky(), "bf16", example_inputs={"x": torch.randn(2, 8)})


def test_torchao_is_refused_where_it_is_missing() -> None:
    code = """
import sys
sys.modules["torchao"] = None  # as if it was not installed
from adaptrain import ConfigurationError, Quantization
from adaptrain.compression import quantize
from tests.toys import tiny_bert
for refused in (
    lambda: quantize(tiny_bert(), "torchao_int8_weight"),
    lambda: quantize(tiny_bert(), example_inputs={}, candidates=["torchao_int8_dynamic"]),
    lambda: Quantization(method="torchao_int8_dynamic"),
    lambda: Quantization(candidates=["none", "torchao_int8_dynamic"]),
):
    try:
        refused()
    except ConfigurationError as error:
        assert "pip install 'adaptrain[torchao]'" in str(error), error
    else:
        raise AssertionError("not refused")
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def pruned() -> Any:
    model = tiny_bert(layers=3)
    match = find_family(model)
    keep = structures.dense(match)
    keep[0] = {"heads": [1], "ffn": list(range(20))}
    keep[1] = {"heads": [], "ffn": []}
    shrink(match, keep)
    return model.eval()


@pytest.mark.parametrize("method", ["none", "bf16", "int8_dynamic", "int8_weight", "int4_weight"])
def test_a_pruned_model_is_quantized_saved_and_loaded_in_another_process(tmp_path, method) -> None:
    model = pruned()
    quantized = quantize(model, method)
    folder = save_quantized(quantized, tmp_path / "small")
    torch.save([batch(), logits(quantized.model)], tmp_path / "case.pt")
    code = (
        "import sys, torch; from adaptrain.compression import load_quantized\n"
        "inputs, expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): said = load_quantized(sys.argv[1])(**inputs).logits\n"
        "assert torch.equal(said, expected), (said - expected).abs().max()"
    )
    done = run_python("-c", code, folder, tmp_path / "case.pt")
    assert done.returncode == 0, done.stderr
    size = (folder / "model.safetensors").stat().st_size
    assert size < quantized.trials[-1].size_bytes + 20_000  # and a header


def test_quantized_models_pickle_and_copy() -> None:
    model = quantize(tiny_bert().eval(), "int8_dynamic").model
    expected = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "int3"}, "int3"),
        ({"method": "auto"}, "needs example_inputs"),
        ({"method": "none", "max_metric_drop": -1}, "max_metric_drop"),
        ({"method": "none", "minimize": "joy"}, "joy"),
        ({"method": "auto", "candidates": ["int3"]}, "candidates names 'int3'"),
        ({"method": "auto", "candidates": "bf16"}, "candidates must be a list"),
        ({"method": "auto", "candidates": None}, "candidates must be a list"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantize(tiny_bert(), **arguments)


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="holds no quantized model"):
        load_quantized(tmp_path)
    with pytest.raises(ConfigurationError, match="Linear is of no family"):
        save_quantized(quantize(nn.Linear(2, 2), "bf16"), tmp_path / "x")
