from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from adaptrain import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checkpoint import CHECKPOINT_KEY, replay
from adaptrain.pruning.families import find_family
from adaptrain.pruning.optimizer_state import skip_empty
from adaptrain.pruning.surgery import EmptyAttention, resize, shrink, slices
from tests.pruning.models import MODELS, batch, forward, loss_of
from tests.toys import tiny_bert, tiny_llama

OPTIMIZERS = {
    "AdamW-loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


def some_gone(match: Any) -> list[dict[str, list[int]]]:
    """One head and every third neuron gone in the first layer; half of the neurons in the second."""
    keep = structures.dense(match)
    keep[0]["heads"] = keep[0]["heads"][1:]
    keep[0]["ffn"] = [unit for unit in keep[0]["ffn"] if unit % 3]
    keep[1]["ffn"] = keep[1]["ffn"][32:]
    return keep


def everything_gone(match: Any) -> list[dict[str, list[int]]]:
    return [{"heads": [], "ffn": []} for _ in structures.dense(match)]


def masks(match: Any, keep: list[dict[str, list[int]]]) -> dict[nn.Parameter, torch.Tensor]:
    """For each parameter that is cut, 0 where it is; written by hand against the declaration's expansion."""
    found = {}
    for layer, (kept, sizes) in enumerate(zip(keep, structures.dimensions(match), strict=True)):
        for kind in ("heads", "ffn"):
            for part in slices(match, layer, kind):
                units = torch.zeros(sizes[kind])
                units[kept[kind]] = 1
                lines = units.repeat_interleave(part.size).repeat(part.fused)
                for parameter in part.parameters():
                    shaped = lines if parameter.dim() == 1 else (lines[:, None] if part.dim == 0 else lines[None, :])
                    found[parameter] = shaped.to(parameter.dtype)
    return found


def step(model: Any, optimizer: Any, seed: int) -> float:
    loss = loss_of(model, seed)
    loss.backward()
    skip_empty(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "modernbert"])
def test_training_goes_on_as_with_the_units_held_at_zero(name, optimizer) -> None:
    small, masked = MODELS[name]().double(), MODELS[name]().double()
    masked.load_state_dict(small.state_dict())
    ours, theirs = (OPTIMIZERS[optimizer](model.parameters()) for model in (small, masked))
    for seed in range(3):
        assert step(small, ours, seed) == step(masked, theirs, seed)
    match = find_family(small)
    keep = some_gone(match)
    mask = masks(find_family(masked), keep)
    parameters = list(small.parameters())
    shrink(match, keep, [ours])
    assert all(a is b for a, b in zip(parameters, small.parameters(), strict=True))
    for seed in range(3, 8):
        with torch.no_grad():
            for parameter, zero in mask.items():
                parameter.mul_(zero)
        assert step(small, ours, seed) == pytest.approx(step(masked, theirs, seed), rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("choose", [some_gone, everything_gone])
def test_every_family_computes_what_zeroed_units_would(name, choose) -> None:
    model = MODELS[name]().double().eval()
    match = find_family(model)
    keep = choose(match)
    with torch.no_grad():
        expected = copy.deepcopy(model)
        for parameter, zero in masks(find_family(expected), keep).items():
            parameter.mul_(zero)
        shrink(match, keep)
        torch.testing.assert_close(forward(model, batch()), forward(expected, batch()))
    assert structures.current(match) == keep


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("choose", [some_gone, everything_gone])
def test_every_family_is_rebuilt_from_a_checkpoint(name, choose) -> None:
    model, fresh = MODELS[name]().eval(), MODELS[name]().eval()
    match = find_family(model)
    shrink(match, choose(match))
    replay(fresh, {CHECKPOINT_KEY: structures.record(match)})
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(forward(fresh, batch()), forward(model, batch()))


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_without_heads_and_neurons_still_trains_its_bias(name) -> None:
    model = MODELS[name]()
    match = find_family(model)
    keep = everything_gone(match)
    shrink(match, keep)
    loss_of(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if name == "bert":
        assert match.layers[0].attention.output.dense.bias.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_a_layer_without_heads_survives_pickle_copy_and_putting_back() -> None:
    model = tiny_bert().eval()
    match = find_family(model)
    dense_keys = list(model.state_dict())
    keep = structures.dense(match)
    keep[1]["heads"] = []
    shrink(match, keep)
    assert isinstance(match.layers[1].attention.self, EmptyAttention)  # type: ignore[union-attr]
    assert list(model.state_dict()) == dense_keys
    with torch.no_grad():
        expected = model(**batch()).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(**batch()).logits, expected)
            assert structures.current(find_family(copied)) == keep
        resize(match, structures.dense(match))
        model.load_state_dict(tiny_bert().state_dict())
        assert torch.equal(model(**batch()).logits, tiny_bert().eval()(**batch()).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("gone", [0, 1])
def test_generation_with_a_cache_equals_generation_without(gone, name) -> None:
    model = MODELS[name]().eval()
    match = find_family(model)
    keep = structures.dense(match)
    keep[gone]["heads"] = []
    keep[1 - gone]["heads"] = [1]
    shrink(match, keep)
    prompt = batch()["input_ids"][1:]
    outputs = [
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)


def test_ties_hooks_gradients_and_groups_survive() -> None:
    model = tiny_llama()
    match = find_family(model)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "name": name} for name, p in model.named_parameters()], lr=1e-2, weight_decay=0.1
    )
    step(model, optimizer, 0)
    loss_of(model, 1).backward()
    weight = match.layers[0].mlp.down_proj.weight  # type: ignore[union-attr]
    seen = []
    weight.register_hook(lambda gradient: seen.append(gradient.shape))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.shape))
    gradient = weight.grad.clone()
    kept_loss = loss_of(model, 2)  # a graph that is alive: autograd must forget the old shapes all the same
    keep = some_gone(match)
    shrink(match, keep, [optimizer])
    assert torch.equal(weight.grad, gradient[:, keep[0]["ffn"]])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.shape == (64, 32)
    step(model, optimizer, 3)
    assert seen == [weight.shape] * 2
    assert kept_loss.requires_grad
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_groups == {id(p) for p in model.parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


class RowState(torch.optim.Optimizer):
    """Keeps one number for each row, under a name that says nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row_mean"] = p.grad.reshape(len(p), -1).mean(1)


def test_state_of_another_layout_is_refused_and_nothing_is_changed() -> None:
    model = tiny_bert()
    optimizer = RowState(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    match = find_family(model)
    shapes = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(ConfigurationError, match=r"RowState: 'row_mean' is \(32,\)"):
        shrink(match, some_gone(match), [optimizer])
    assert [parameter.shape for parameter in model.parameters()] == shapes


FACTORED = {
    "torch-foreach": (lambda p: torch.optim.Adafactor(p, lr=1e-2, foreach=True), "row_var", "col_var"),
    "torch-loop": (lambda p: torch.optim.Adafactor(p, lr=1e-2, foreach=False), "row_var", "col_var"),
    "transformers": (lambda p: Adafactor(p, beta1=0.9), "exp_avg_sq_row", "exp_avg_sq_col"),
}


@pytest.mark.parametrize("choose", [some_gone, everything_gone])
@pytest.mark.parametrize("optimizer", FACTORED)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_factors_of_adafactor_are_cut_by_row_and_by_column(name, optimizer, choose) -> None:
    build, row, column = FACTORED[optimizer]
    model = MODELS[name]()
    held = build(list(model.parameters()))
    step(model, held, 0)
    match = find_family(model)
    keep = choose(match)
    before = {}
    for layer in range(2):
        for part in slices(match, layer, "ffn"):
            state = held.state[part.weight]
            factors = state[row].flatten().clone(), state[column].flatten().clone()
            before[part.weight] = part.dim, torch.tensor(keep[layer]["ffn"], dtype=torch.long), factors
    shrink(match, keep, [held])
    for weight, (dim, kept, factors) in before.items():
        for along, (key, factor) in enumerate(zip((row, column), factors, strict=True)):
            expected = factor[kept] if along == dim else factor
            assert torch.equal(held.state[weight][key].flatten(), expected)
    for seed in range(1, 4):
        assert step(model, held, seed) > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    fresh = build([nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()])
    fresh.load_state_dict(held.state_dict())  # as a resumed run does


def test_two_cuts_equal_one() -> None:
    once, twice = tiny_bert(), tiny_bert()
    match = find_family(twice)
    keep = some_gone(match)
    first = structures.dense(match)
    first[0]["ffn"] = keep[0]["ffn"] + [0]
    first[0]["ffn"].sort()
    shrink(match, first)
    shrink(match, keep)
    shrink(find_family(once), keep)
    for (name, a), (_, b) in zip(once.state_dict().items(), twice.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
