from __future__ import annotations

import copy

import pytest
import torch

from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.reconstruction import Reconstruction, take_over
from adaptrain.pruning.surgery import shrink
from adaptrain.pruning.watch import outputs
from tests.pruning.models import MODELS, WITHOUT_HEADS, batch, loss_of
from tests.toys import tiny_bert

KINDS = ("heads", "ffn")


def kinds_of(name):
    return ("ffn",) if name in WITHOUT_HEADS else KINDS


def watched(model, kinds=KINDS, *, seeds=range(6)):
    """A reconstruction that has seen some batches."""
    found = Reconstruction(find_family(model), kinds)
    found.start()
    for seed in seeds:
        loss_of(model, seed)
    assert found._stop is not None
    found._stop()  # the hooks go, what was seen stays
    return found


def halved(model, kinds=KINDS):
    """Every second unit of each kind."""
    keep = structures.dense(find_family(model))
    for layer in keep:
        for kind in kinds:
            layer[kind] = layer[kind][::2]
    return keep


def read_by(model, key, seeds=range(6)):
    """Reference: what an output projection reads on tokens that are not padding."""
    output = outputs(find_family(model), (key[1],))[key]
    seen = []
    handle = output.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    real = []
    for seed in seeds:
        loss_of(model, seed)
        real.append(batch(seed)["attention_mask"].bool())
    handle.remove()
    return torch.cat([read[mask] for read, mask in zip(seen, real, strict=True)])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])  # a bias, none, and a transposed weight
@pytest.mark.parametrize("kind", KINDS)
def test_it_solves_the_regularised_least_squares(name, kind):
    model = MODELS[name]().double().train()
    match, key = find_family(model), (1, kind)
    found, keep = watched(model), halved(model)
    made = found.solve(keep)[key]
    output = outputs(match, KINDS)[key]
    weight = (output.weight.detach() if output.dim else output.weight.detach().T).clone()
    read = read_by(model, key)
    # min over W' of ‖X Wᵀ − X_S W'ᵀ − b‖²/n + λ‖W' − W_S‖², as one plain least squares
    ridge = 0.01 * read.square().mean()
    basis = read[:, made.kept]
    penalty = (ridge * len(read)).sqrt() * torch.eye(len(made.kept))
    if output.projection.bias is not None:
        basis = torch.cat([basis, torch.ones(len(read), 1)], 1)
        penalty = torch.cat([penalty, torch.zeros(len(made.kept), 1)], 1)
    removed = read[:, made.removed] @ weight[:, made.removed].T
    expected = torch.linalg.lstsq(
        torch.cat([basis, penalty]), torch.cat([removed, torch.zeros(len(penalty), removed.shape[1])])
    ).solution
    bias = None if output.projection.bias is None else output.projection.bias.detach().clone()
    before = weight[:, made.kept]
    take_over(match, {key: made})
    after = (output.weight.detach() if output.dim else output.weight.detach().T)[:, made.kept]
    torch.testing.assert_close(after - before, expected[: len(made.kept)].T, rtol=1e-3, atol=1e-6)
    if bias is not None:
        torch.testing.assert_close(output.projection.bias.detach() - bias, expected[-1], rtol=1e-3, atol=1e-6)
    # What it says of itself: shares of the output's mean square.
    total = (read @ weight.T).square().sum(1).mean()
    left = (removed - basis @ expected).square().sum(1).mean() / total
    assert made.lost == pytest.approx(float(removed.square().sum(1).mean() / total), rel=1e-6)
    assert made.left == pytest.approx(float(left), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_computes_more_of_what_it_did(name):
    kinds = kinds_of(name)
    dense = MODELS[name]().train()
    with torch.no_grad():  # outputs that count, of units that are alike
        for output in outputs(find_family(dense), kinds).values():
            output.weight.mul_(5)
    hidden = hidden_states(dense)
    found = watched(dense, kinds)
    keep = halved(dense, kinds)
    errors = []
    for substitutes in ({}, found.solve(keep)):
        cut = copy.deepcopy(dense)
        match = find_family(cut)
        take_over(match, substitutes)
        shrink(match, keep)
        errors.append(float((hidden_states(cut) - hidden).square().mean()))
    assert len(substitutes) == len(kinds) * len(keep)
    assert all(made.left < made.lost for made in substitutes.values())
    assert errors[1] < errors[0]


def hidden_states(model):
    inputs = batch(0)
    with torch.no_grad():
        base = model.base_model
        half = base.encoder if model.config.is_encoder_decoder else base
        return half(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def test_a_copied_unit_is_missed_by_nobody():
    model = tiny_bert().double().train()
    match = find_family(model)
    ffn = match.layers[0].get_submodule("intermediate.dense")
    with torch.no_grad():
        ffn.weight[1], ffn.bias[1] = ffn.weight[0], ffn.bias[0]
    keep = structures.dense(match)
    keep[0]["ffn"].remove(1)
    (made,) = watched(model).solve(keep).values()
    assert made.left < 0.01 * made.lost
    before = loss_of(model)
    take_over(match, {(0, "ffn"): made})
    shrink(match, keep)
    torch.testing.assert_close(loss_of(model), before, rtol=1e-3, atol=0)


def test_of_units_that_all_go_the_mean_stays_in_the_bias():
    model = tiny_bert().double().train()
    match = find_family(model)
    output = outputs(match, KINDS)[0, "ffn"]
    mean = read_by(model, (0, "ffn")).mean(0)
    expected = output.projection.bias.detach() + output.weight.detach() @ mean
    keep = structures.dense(match)
    keep[0]["ffn"] = []
    take_over(match, watched(model).solve(keep))
    torch.testing.assert_close(output.projection.bias.detach(), expected)


def test_a_layer_that_goes_as_a_whole_needs_nothing():
    model = tiny_bert().train()
    found = watched(model)
    assert found.solve(structures.without_layer(structures.dense(find_family(model)), 0)) == {}


def test_only_real_tokens_of_training_count():
    model = tiny_bert().double().train()
    inputs = batch(size=2)
    inputs["attention_mask"][:] = 1
    longer = {key: torch.cat([value, torch.zeros(2, 20, dtype=torch.long)], 1) for key, value in inputs.items()}
    seen = []
    for given in (inputs, longer):
        found = Reconstruction(find_family(model), KINDS)
        found.start()
        model(**given)
        model.eval()(**given)
        with torch.no_grad():
            model.train()(**given)
        seen.append(found.state_dict()["moments"])
        found.stop()
    for (*one, first), (*other, second) in zip(*seen, strict=True):
        assert one == other
        assert first[-1, -1] == 24  # tokens
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_what_was_seen_lies_in_full_precision_under_autocast():
    model = tiny_bert().train()
    exact = watched(model).state_dict()["moments"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = watched(model).state_dict()["moments"]
    for (*_, first), (*_, second) in zip(exact, rough, strict=True):
        assert second.dtype == torch.float32
        torch.testing.assert_close(second, second.T)
        torch.testing.assert_close(first, second, rtol=0.05, atol=0.05 * float(first.abs().max()))
        assert torch.linalg.eigvalsh(second.double()).min() > -1e-5 * float(first.abs().max())


def test_no_more_tokens_than_it_takes():
    model = tiny_bert().train()
    found = Reconstruction(find_family(model), KINDS)
    found.start()
    model(**batch(size=90))  # 1074 real tokens
    assert [moments[-1, -1] for *_, moments in found.state_dict()["moments"]] == [537] * 4


def test_it_goes_on_from_what_it_had_seen():
    model = tiny_bert().train()
    whole = watched(model, seeds=range(4))
    first = watched(model, seeds=range(2))
    state = first.state_dict()
    second = Reconstruction(find_family(model), KINDS)
    second.load_state_dict(state)
    assert second.seen
    second.start()
    for seed in (2, 3):
        loss_of(model, seed)
    for (*one, expected), (*other, found) in zip(
        whole.state_dict()["moments"], second.state_dict()["moments"], strict=True
    ):
        assert one == other
        assert torch.equal(expected, found)


def test_without_anything_seen_nothing_stands_in():
    model = tiny_bert().train()
    found = Reconstruction(find_family(model), KINDS)
    assert found.solve(halved(model)) == {}
    found.start()
    assert found.solve(halved(model)) == {}
    found.stop()


def test_what_is_not_finite_is_left_as_it_is():
    model = tiny_bert().train()
    with torch.no_grad():
        find_family(model).layers[0].get_submodule("intermediate.dense").bias[0] = float("inf")
    assert (0, "ffn") not in watched(model, seeds=range(1)).solve(halved(model))


def test_it_leaves_no_hook():
    model = tiny_bert().train()
    found = watched(model)
    found.stop()
    assert not found.seen
    assert not any(module._forward_pre_hooks for module in model.modules())
