from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptrain
from adaptrain import ConfigurationError
from adaptrain.compression import export, load
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import shrink
from tests.pruning.models import MODELS, batch
from tests.toys import tiny_bert, tiny_llama

# Reads the inputs, loads the model with the line that the export gives, and writes the outputs; in a process to which
# adaptrain does not exist.
RELOAD = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("adaptrain", "tests"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    scope = {}
    exec(job["load"], scope)
    for case in torch.load(job["cases"]):
        if "session" in scope:
            feed = {name: tensor.numpy() for name, tensor in case.items()}
            case["outputs"] = torch.from_numpy(scope["session"].run(None, feed)[0])
        else:
            with torch.no_grad():
                outputs = scope["model"](**case)
            case["outputs"] = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        job.setdefault("outputs", []).append(case["outputs"])
    torch.save(job.get("outputs"), job["cases"])
assert not any(name.partition(".")[0] == "adaptrain" for name in sys.modules)
"""


def cases(written: Any = None) -> list[dict[str, torch.Tensor]]:
    """Batches of several shapes, with padding; with the inputs that a graph asks for."""
    found = [batch(0), batch(1, size=1, length=5), batch(2, size=7, length=33)]
    for case in found:
        case["attention_mask"][:] = 1
        case["attention_mask"][-1, 3:] = 0
        if written is not None and "token_type_ids" in written.inputs:
            case["token_type_ids"] = torch.zeros_like(case["input_ids"])
            case["token_type_ids"][:, 2:] = 1
    return found


def outputs_of(model: Any, written: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**case, **decoder_inputs(model, case)).logits for case in cases(written)]


def decoder_inputs(model: Any, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": case["input_ids"]} if model.config.is_encoder_decoder else {}


def reload_elsewhere(tmp_path: Path, exports: list[Any]) -> list[list[torch.Tensor]]:
    """Loads exports in one process without adaptrain; returns the outputs of each."""
    jobs = []
    for number, written in enumerate(exports):
        path = tmp_path / f"cases-{number}.pt"
        torch.save(cases(written), path)
        jobs.append({"load": written.load, "cases": str(path)})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "jobs.json")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(job["cases"]) for job in jobs]


def pruned(name: str, choose: Any) -> Any:
    model = MODELS[name]().eval()
    match = find_family(model)
    with torch.no_grad():  # what starts at zero would hide where it is put
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    shrink(match, choose(structures.dense(match)))
    return model


def uneven(keep: Any) -> Any:
    """A head and some neurons gone in the first layer, other neurons in the second."""
    keep[0]["heads"] = keep[0]["heads"][1:]
    keep[0]["ffn"] = [unit for unit in keep[0]["ffn"] if unit % 3]
    keep[1]["ffn"] = keep[1]["ffn"][40:]
    return keep


def with_nothing_left(keep: Any) -> Any:
    """No heads in one layer, no neurons in the other."""
    keep[0]["heads"] = []
    keep[1]["ffn"] = []
    keep[0]["ffn"] = keep[0]["ffn"][::2]
    return keep


def all_gone(keep: Any) -> Any:
    return [{"heads": [], "ffn": []} for _ in keep]


def even(keep: Any) -> Any:
    """Other neurons, but as many, in each layer."""
    for index, layer in enumerate(keep):
        layer["ffn"] = layer["ffn"][index::2]
    return keep


def even_with_heads(keep: Any) -> Any:
    for index, layer in enumerate(even(keep)):
        layer["heads"] = [index]
    return keep


EVEN = [
    *((name, even) for name in ("bert", "distilbert", "roberta", "electra")),
    *((name, even_with_heads) for name in ("llama", "mistral", "qwen2")),
]


def test_uniform_layers_load_in_plain_transformers_with_the_same_weights(tmp_path: Path) -> None:
    models = [pruned(name, choose) for name, choose in EVEN]
    exports = [export(model, tmp_path / f"uniform-{index}") for index, model in enumerate(models)]
    for model, written, found in zip(models, exports, reload_elsewhere(tmp_path, exports), strict=True):
        assert written.layout == "uniform"
        again = type(model).from_pretrained(written.path)
        for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
        assert written.padding_params == 0
        assert written.params == sum(parameter.numel() for parameter in model.parameters()) < written.dense_params
        for ours, theirs in zip(outputs_of(model, written), found, strict=True):
            # Where the same weights lie in memory decides between kernels that round in another order.
            assert (ours - theirs).abs().max() <= 1e-6 * ours.abs().max(), written.model_class


PLAIN = [name for name, make in MODELS.items() if find_family(make()).family.config is not None]
UNEVEN = [(name, choose) for name in PLAIN for choose in (uneven, with_nothing_left, all_gone)]


def test_uneven_layers_load_padded_in_plain_transformers_up_to_rounding(tmp_path: Path) -> None:
    models = [pruned(name, choose) for name, choose in UNEVEN]
    exports = [export(model, tmp_path / f"padded-{index}") for index, model in enumerate(models)]
    for model, written, found in zip(models, exports, reload_elsewhere(tmp_path, exports), strict=True):
        assert written.layout == "padded"
        own = sum(parameter.numel() for parameter in model.parameters())
        assert written.params - written.padding_params == own < written.params <= written.dense_params
        for ours, theirs in zip(outputs_of(model, written), found, strict=True):
            assert (ours - theirs).abs().max() <= 2e-6 * ours.abs().max(), written.model_class


def test_models_that_no_config_can_describe_go_with_their_structure(tmp_path: Path) -> None:
    assert set(MODELS) - set(PLAIN) == {"t5", "t5-gated"}
    written = export(pruned("t5", uneven), tmp_path / "t5")
    assert written.layout == "structured"
    with pytest.raises(ConfigurationError, match="does not say where a config holds its shape"):
        export(pruned("t5", uneven), tmp_path / "padded", layout="padded")


def test_padding_is_exact_in_double_precision_and_no_wider_than_needed(tmp_path: Path) -> None:
    for name in ("bert", "llama"):
        model = pruned(name, uneven).double()
        written = export(model, tmp_path / name)
        assert written.difference is not None
        assert written.difference < 1e-15
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["intermediate_size"] == 42
        assert config["num_attention_heads"] == 4


@pytest.mark.parametrize(
    "chosen",
    [[("bert", with_nothing_left)], pytest.param([("distilbert", uneven), ("llama", uneven)], marks=pytest.mark.slow)],
)
def test_torch_export_holds_the_true_shapes(tmp_path: Path, chosen: Any) -> None:
    models = [pruned(name, choose) for name, choose in chosen]
    exports = [export(model, tmp_path / f"graph-{i}", format="torch_export") for i, model in enumerate(models)]
    for model, written, found in zip(models, exports, reload_elsewhere(tmp_path, exports), strict=True):
        assert written.layout == "structured"
        assert written.params == sum(parameter.numel() for parameter in model.parameters())
        for ours, theirs in zip(outputs_of(model, written), found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_onnx_runs_in_onnxruntime(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    models = [pruned(n, c) for n, c in (("bert", with_nothing_left), ("distilbert", all_gone), ("llama", uneven))]
    exports = [export(model, tmp_path / f"onnx-{i}", format="onnx") for i, model in enumerate(models)]
    for model, written, found in zip(models, exports, reload_elsewhere(tmp_path, exports), strict=True):
        assert written.size_bytes == (tmp_path / written.path / "model.onnx").stat().st_size
        for ours, theirs in zip(outputs_of(model, written), found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("choose", [uneven, with_nothing_left])
def test_structured_comes_back_in_the_same_shapes(tmp_path: Path, name: str, choose: Any) -> None:
    model = pruned(name, choose)
    state = torch.random.get_rng_state()
    written = export(model, tmp_path / "out", layout="structured")
    again = load(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written.layout == "structured"
    assert type(again) is type(model)
    assert structures.current(find_family(again)) == structures.current(find_family(model))
    for (key, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, written), outputs_of(again, written), strict=True))
    assert not (tmp_path / "out" / "config.json").exists()  # transformers must not take it for its own


def test_tied_embeddings_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    model = pruned("llama", uneven)
    for layout in ("padded", "structured"):
        written = export(model, tmp_path / layout, layout=layout)
        assert written.size_bytes < 4 * written.params + 4096
    again = load(tmp_path / "structured")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_lightning_module_is_exported_by_the_model_in_it_and_left_as_it_is(tmp_path: Path) -> None:
    module = nn.Module()
    module.model = tiny_bert().train()
    shrink(find_family(module), uneven(structures.dense(find_family(module))))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    written = adaptrain.compression.export(module, tmp_path / "out")
    assert written.model_class == "BertForSequenceClassification"
    assert module.model.training
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())


def test_a_dense_model_is_uniform_and_half_precision_stays(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16().eval()
    written = export(model, tmp_path / "out")
    assert (written.layout, written.params) == ("uniform", written.dense_params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    export(model, tmp_path / "structured", layout="structured")
    assert load(tmp_path / "structured").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "choose", "why"),
    [
        ("bert", uneven, r"different FFN widths \(24, 42\).*different numbers of heads \(3, 4\)"),
        ("bert", even_with_heads, r"each layer has 1 heads, and a BertConfig can only describe 4 heads"),
        ("llama", all_gone, "no FFN neurons are left"),
    ],
)
def test_uniform_says_what_prevents_it_and_what_would_do(tmp_path: Path, name: str, choose: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"(?s){why}.*layout='padded'.*uniform=True"):
        export(pruned(name, choose), tmp_path / "out", layout="uniform")
    assert not any(tmp_path.iterdir())


class OwnBert(type(tiny_bert())):
    """A subclass, which plain transformers does not know."""


def test_a_class_of_ones_own_is_exported_structured_and_loaded_into_a_dense_one(tmp_path: Path) -> None:
    model = OwnBert(tiny_bert().config).eval()
    shrink(find_family(model), uneven(structures.dense(find_family(model))))
    written = export(model, tmp_path / "out")
    assert written.layout == "structured"
    assert "OwnBert is not a class of transformers" in written.reason
    with pytest.raises(ConfigurationError, match="not a class of transformers"):
        export(model, tmp_path / "padded", layout="padded")
    with pytest.raises(ConfigurationError, match=r"load\(path, model="):
        load(tmp_path / "out")
    again = load(tmp_path / "out", model=OwnBert(tiny_bert().config))
    assert torch.equal(outputs_of(model, written)[0], outputs_of(again, written)[0])


def test_behaviour_that_a_config_does_not_describe_is_found(tmp_path: Path) -> None:
    model = pruned("bert", even)
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.Tanh()
    with pytest.raises(ConfigurationError, match="computes something else"):
        export(model, tmp_path / "out")


def test_wrong_arguments_and_occupied_folders_are_refused(tmp_path: Path) -> None:
    model = tiny_bert().eval()
    with pytest.raises(ConfigurationError, match=r"layout must be one of .*'dense'"):
        export(model, tmp_path / "out", layout="dense")
    with pytest.raises(ConfigurationError, match=r"format must be one of .*'tflite'"):
        export(model, tmp_path / "out", format="tflite")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds other files"):
        export(model, tmp_path / "used", overwrite=True)
    export(model, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="holds an export already"):
        export(model, tmp_path / "out", layout="structured")
    export(model, tmp_path / "out", layout="structured", overwrite=True)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ConfigurationError, match="no export with layout='structured'"):
        load(tmp_path / "used")


def test_onnx_without_its_packages_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs onnx and onnxscript: pip install \"adaptrain\[export\]\""):
        export(tiny_bert(), tmp_path / "out", format="onnx")
