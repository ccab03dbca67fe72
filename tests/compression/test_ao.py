"""torchao is not among what tests install: where it is, transformers imports it with everything."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adaptrain import ConfigurationError, Quantization
from adaptrain.compression import load_quantized, quantize, save_quantized
from adaptrain.compression.ao import AO_METHODS
from tests.compression.test_quantization import batch, check_says_nearly_the_same, logits, pruned
from tests.pruning.models import MODELS
from tests.toys import ValidatedTextModule, quiet_trainer, text_loader, tiny_bert

pytest.importorskip("torchao", reason="needs torchao: pip install -c constraints.txt -e '.[torchao]'")

methods = pytest.mark.parametrize("method", AO_METHODS)


@methods
def test_weights_in_8_bits_give_nearly_the_product(method) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(5, 64)
    weight = model[0].weight.detach()
    steps = weight.abs().amax(1, keepdim=True) / 127.5  # of symmetric rounding by row
    expected = inputs @ ((weight / steps).round() * steps).T + model[0].bias.detach()
    with torch.no_grad():
        said = quantize(model, method).model(inputs)
    rounding = (inputs.abs().amax(1, keepdim=True) / 127) @ weight.abs().sum(1)[None]  # of inputs, a step each
    bound = 1e-3 * expected.abs().max() + (rounding if method == "torchao_int8_dynamic" else 0)
    assert ((said - expected).abs() <= bound + (inputs.abs().sum(1, keepdim=True) * steps.T)).all()
    assert float((said - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert not torch.equal(said, model(inputs))


@methods
@pytest.mark.parametrize("name", ["bert", "llama", "distilbert", "t5"])
def test_every_family_says_nearly_the_same(name, method) -> None:
    model = MODELS[name]().eval()
    none, lower = check_says_nearly_the_same(model, method)
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    assert lower.size_bytes < none.size_bytes - 2 * linear


def test_a_model_without_linear_layers_of_its_own_is_refused() -> None:
    # GPT-2's layers are Conv1D, and the output's weight is the embedding's.
    with pytest.raises(ConfigurationError, match="GPT2LMHeadModel has none of its own"):
        quantize(MODELS["gpt2"](), AO_METHODS[0])


@methods
def test_a_pruned_model_is_saved_and_loaded_in_another_process(tmp_path, method) -> None:
    quantized = quantize(pruned(), method)
    folder = save_quantized(quantized, tmp_path / "small")
    assert (folder / "model.safetensors").stat().st_size < quantized.trials[-1].size_bytes + 20_000  # and a header
    torch.save([batch(), logits(quantized.model)], tmp_path / "case.pt")
    code = """
import sys, torch
from adaptrain.compression import load_quantized
inputs, expected = torch.load(sys.argv[2])
with torch.no_grad():
    said = load_quantized(sys.argv[1])(**inputs).logits
assert torch.equal(said, expected), (said - expected).abs().max()
sys.modules["torchao"] = None
try:
    load_quantized(sys.argv[1])
except Exception as error:
    assert "pip install 'adaptrain[torchao]'" in str(error), error
else:
    raise AssertionError("loaded without torchao")
"""
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "case.pt")], check=True, timeout=120)


@methods
def test_it_pickles_and_copies(method) -> None:
    model = quantize(tiny_bert().eval(), method).model
    expected = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_it_is_tried_where_it_is_named() -> None:
    found = quantize(tiny_bert().eval(), example_inputs=batch(), candidates=["int8_weight", *AO_METHODS])
    assert [trial.method for trial in found.trials] == ["none", "int8_weight", *AO_METHODS]
    assert all(trial.latency_ms for trial in found.trials)


def test_a_run_leaves_a_copy_by_torchao(tmp_path: Path) -> None:
    callback = Quantization(method=AO_METHODS[0], max_metric_drop=1.0)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(ValidatedTextModule(), text_loader(), text_loader())
    assert [trial["method"] for trial in callback.report()] == ["none", AO_METHODS[0]]
    assert all(trial["metric"] is not None for trial in callback.report())
    (folder,) = tmp_path.rglob("quantized")
    assert torch.isfinite(logits(load_quantized(folder))).all()


def test_weights_of_another_structure_are_refused(tmp_path) -> None:
    folder = save_quantized(quantize(tiny_bert().eval(), AO_METHODS[1]), tmp_path / "small")
    other = save_quantized(quantize(tiny_bert(hidden=16).eval(), AO_METHODS[1]), tmp_path / "other")
    (other / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ConfigurationError, match="does not hold what torchao"):
        load_quantized(folder)
