from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import nn

import adaptrain
from adaptrain import ConfigurationError
from adaptrain.fusion import merge
from adaptrain.fusion.merging import METHODS
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import shrink
from tests.toys import TextModule, quiet_trainer, text_loader, tiny_bert, tiny_llama


def tuned(seed: int, *, like: Any = None) -> Any:
    """The tiny BERT after what might be a fine-tuning."""
    model = tiny_bert() if like is None else like
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def mean_of(models: list[Any], name: str) -> torch.Tensor:
    return torch.stack([model.state_dict()[name] for model in models]).mean(0)


def test_a_uniform_soup_is_the_mean_of_every_weight_and_a_new_model() -> None:
    models = [tuned(1), tuned(2), tuned(3)]
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    soup = merge(models)
    for name, value in soup.state_dict().items():
        torch.testing.assert_close(value, mean_of(models, name))
    assert type(soup) is type(models[0])
    assert soup is not models[0]
    assert all(torch.equal(before[name], value) for name, value in models[0].state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_models_that_are_all_the_same_merge_into_themselves(method) -> None:
    """But for task arithmetic and its kin, which add up what each has changed."""
    base, model = tiny_bert(), tuned(1)
    count = {"wise_ft": 1}.get(method, 2)
    options: dict[str, Any] = {"greedy_soup": {"evaluate": lambda model: 1.0}}.get(method, {})
    if method in ("wise_ft", "task_arithmetic", "ties", "dare", "model_stock"):
        options = {"base": base}
    options |= {"wise_ft": {"alpha": 1.0}, "ties": {"density": 1.0}}.get(method, {})
    options |= {"task_arithmetic": {"scaling": 0.5}, "dare": {"scaling": 0.5, "density": 1.0}}.get(method, {})
    merged = merge([model] * count, method, **options)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_ties_trims_over_the_whole_model(tmp_path) -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    model = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}
    merged = merge([model], "ties", base=base, density=0.5)
    assert merged["a"].tolist() == [0.0] * 4  # the largest half lies in b
    assert merged["b"].tolist() == [5.0, 6.0, 7.0, 8.0]


def test_the_greedy_soup_takes_in_what_does_no_harm(caplog) -> None:
    """Three points on a line; the metric is the distance from 0, so that -1 balances 1 and 9 spoils it."""
    models = [{"x": torch.tensor([value])} for value in (9.0, 1.0, -1.5)]
    seen: list[float] = []

    def evaluate(model: Any) -> float:
        seen.append(float(model["x"]))
        return -abs(seen[-1])

    with caplog.at_level(logging.INFO, logger="adaptrain"):
        soup = merge(models, "greedy_soup", evaluate=evaluate)
    assert seen == [9.0, 1.0, -1.5, -0.25, pytest.approx(8.5 / 3)]
    assert float(soup["x"]) == -0.25
    assert "model 3, -1.5 alone" in caplog.text
    assert "stays out" in caplog.text
    less = merge(models, "greedy_soup", evaluate=lambda model: float(model["x"].abs()), mode="min")
    assert float(less["x"]) == -0.25


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_diverged_model_is_no_part_of_the_greedy_soup(mode: str, caplog) -> None:
    models = [{"x": torch.tensor([value])} for value in (math.nan, 0.8, math.nan, 0.9)]
    soup = merge(models, "greedy_soup", evaluate=lambda model: float(model["x"]), mode=mode)  # pyright: ignore[reportArgumentType]
    assert float(soup["x"]) == pytest.approx(0.9 if mode == "max" else 0.8)
    assert "model 3 stays out" in caplog.text
    with pytest.raises(ConfigurationError, match="nan for every model"):
        merge(models[:1], "greedy_soup", evaluate=lambda model: float(model["x"]))


def test_half_precision_is_merged_in_full_and_comes_back_as_it_was() -> None:
    models = [{"x": torch.tensor([value], dtype=torch.bfloat16)} for value in (256.0, 1.0, 1.0)]
    merged = merge(models)
    assert merged["x"].dtype == torch.bfloat16
    assert float(merged["x"]) == 86.0  # 258 / 3; in bfloat16 256 + 1 is 256


def test_folders_checkpoints_and_files_merge_alike(tmp_path) -> None:
    models = [tuned(1), tuned(2)]
    expected = {name: mean_of(models, name) for name in models[0].state_dict()}
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / f"hf{index}")
        save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / f"{index}.safetensors")
        torch.save(model.state_dict(), tmp_path / f"{index}.pt")
    for names in (["hf0", "hf1"], ["0.safetensors", "1.safetensors"], ["0.pt", "1.safetensors"]):
        merged = merge([tmp_path / name for name in names])
        state = merged.state_dict() if isinstance(merged, nn.Module) else merged
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name])
    merged = merge([str(tmp_path / "hf0"), models[1]])
    merged.save_pretrained(tmp_path / "soup")  # an ordinary model of transformers
    assert type(merged).from_pretrained(tmp_path / "soup").config.num_labels == models[0].config.num_labels


def pruned_checkpoint(folder: Path, *, seed: int) -> Path:
    torch.manual_seed(seed)
    module = TextModule(tuned(seed).train())
    callback = adaptrain.ProgressivePruning(target={"flops": 0.5}, schedule=adaptrain.OneShotSchedule(at=0.5))
    trainer = quiet_trainer(folder, callbacks=[callback], max_epochs=1)
    trainer.fit(module, text_loader())
    trainer.save_checkpoint(folder / f"{seed}.ckpt")
    return folder / f"{seed}.ckpt"


def test_pruned_checkpoints_of_other_structure_are_refused_even_of_one_shape(tmp_path) -> None:
    path = pruned_checkpoint(tmp_path, seed=1)
    merged = merge([path, path])
    loaded = torch.load(path, weights_only=True)
    assert all(torch.allclose(merged[name], value) for name, value in loaded["state_dict"].items())
    assert isinstance(loaded["adaptrain_structure"], dict)

    models = [tiny_bert(), tiny_bert()]
    for model, gone in zip(models, (3, 4), strict=True):
        match = find_family(model)
        keep = structures.dense(match)
        keep[0]["ffn"].remove(gone)
        shrink(match, keep)
    with pytest.raises(ConfigurationError, match="pruned in different ways"):
        merge(models)
    same = [models[0], models[0]]
    assert merge(same).bert.encoder.layer[0].intermediate.dense.out_features == 63


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_bert(layers=3), r"model 1 .* has no 'bert.encoder.layer.2"),
        (lambda: tiny_bert(ffn=32), r"intermediate.dense.weight' is of shape \(64, 32\) .* and \(32, 32\)"),
        (lambda: tiny_bert().double(), r"dtype torch.float32 .* and torch.float64"),
        (lambda: tiny_llama(), r"no '"),
    ],
)
def test_the_first_difference_is_named(other, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        merge([tiny_bert(), other()])


def test_values_that_are_no_weights_must_agree() -> None:
    one, two = ({"w": torch.ones(2), "ids": torch.tensor([0, last])} for last in (1, 2))
    with pytest.raises(ConfigurationError, match=r"'ids' holds torch\.int64"):
        merge([one, two])
    assert merge([one, one])["ids"].tolist() == [0, 1]


def test_tied_weights_stay_tied() -> None:
    base = tiny_llama()
    models = [tuned(seed, like=tiny_llama()) for seed in (1, 2)]
    merged = merge(models, "dare", base=base, density=0.5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    state = merge([model.state_dict() for model in models], "dare", base=base.state_dict(), density=0.5)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_statistics_of_batch_norm_are_warned_of(caplog) -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    models[0](torch.randn(4, 2))  # one has seen a batch more
    with caplog.at_level(logging.WARNING, logger="adaptrain"):
        merge(models)
    assert "update_bn" in caplog.text


@pytest.mark.parametrize(
    ("count", "method", "options", "message"),
    [
        (2, "average", {}, "method must be one of uniform_soup"),
        (0, "uniform_soup", {}, "at least 1 model, got 0"),
        (3, "slerp", {}, "merges 2 models, got 3"),
        (1, "model_stock", {}, "at least 2 models, got 1"),
        (2, "ties", {}, "needs base"),
        (2, "greedy_soup", {}, "needs evaluate"),
        (2, "slerp", {"density": 0.5}, "no argument 'density'; it takes t"),
        (2, "slerp", {"t": 1.5}, r"t must lie in \[0, 1\], got 1.5"),
        (2, "ties", {"base": {"x": torch.ones(1)}, "density": 0}, r"density must lie in \(0, 1\], got 0"),
        (2, "uniform_soup", {"weights": [1.0]}, "each of the 2 models"),
        (2, "uniform_soup", {"weights": [0, 0]}, "not all 0"),
    ],
)
def test_wrong_arguments_are_refused(count, method, options, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        merge([{"x": torch.ones(1)}] * count, method, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "There is no"),
        (lambda folder: folder, "neither config.json"),
        (lambda folder: {"x": 1.0}, "must be a state dict"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, make, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        merge([make(tmp_path)])
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        merge([tmp_path / "broken.pt"])


def test_a_soup_of_trained_models_is_of_use() -> None:
    """Fine-tuned from one start on other orders of the data: their mean has learned what they have."""
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        module = TextModule(lr=3e-3)
        loader = text_loader(shuffle=True)
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=4,
        )  # fmt: skip
        trainer.fit(module, loader)
        states.append(module.model)
    batch = next(iter(text_loader(batch_size=48)))
    with torch.no_grad():
        start = float(tiny_bert()(**batch).loss)
        soup = float(merge(states)(**batch).loss)
    assert soup < 0.5 * start
