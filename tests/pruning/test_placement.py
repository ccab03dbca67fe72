"""Tensors of a model that shrinks get pages of their own, and the model notices nothing."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from adaptrain.pruning.placement import move_out
from tests.toys import tiny_bert

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing moves elsewhere")


def wide_bert() -> Any:
    return tiny_bert(hidden=128, ffn=512)  # matrices of 64 KiB and more


def trained(model: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    return optimizer


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=torch.arange(32).view(2, 16), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()


def lies_in(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_training_goes_on_as_if_nothing_had_moved() -> None:
    model, other = wide_bert(), wide_bert()
    optimizer, same = trained(model), trained(other)
    before = dict(model.named_parameters())
    move_out([model], [optimizer])
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    for _ in range(2):
        step(model, optimizer)
        step(other, same)
    for moved, stayed in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(moved, stayed)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[moved][name], same.state[stayed][name])


def test_large_tensors_get_pages_of_their_own_once() -> None:
    model = wide_bert()
    optimizer = trained(model)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    gradient = weight.grad
    move_out([model], [optimizer])
    places = [weight.data_ptr(), *(optimizer.state[weight][name].data_ptr() for name in ("exp_avg", "exp_avg_sq"))]
    assert all(place % 4096 == 0 for place in places)
    assert weight.grad is gradient
    move_out([model], [optimizer])
    assert places[0] == weight.data_ptr()
    assert places[1] == optimizer.state[weight]["exp_avg"].data_ptr()


def test_a_loaded_file_is_let_go(tmp_path) -> None:
    wide_bert().save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if not lies_in(file):
        pytest.skip("this version of transformers reads its files instead of mapping them")
    expected = copy.deepcopy(model.state_dict())
    move_out([model])
    gc.collect()
    assert not lies_in(file)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])


def test_what_shares_memory_goes_on_sharing_it() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(2, 128, 256)
            self.first, self.second = nn.Parameter(flat[0]), nn.Parameter(flat[1])  # of one block
            self.tied = nn.Parameter(torch.randn(256, 256))
            self.alias = nn.Parameter(self.tied.data)
            self.across = nn.Parameter(torch.randn(256, 128).t())
            self.abroad = nn.Parameter(torch.randn(256, 256).share_memory_())
            self.register_buffer("table", torch.randn(256, 256))

    module = Sharing()
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    move_out([module])
    moved = {name for name, tensor in module.state_dict().items() if tensor.data_ptr() != places[name]}
    assert moved == {"table"}
    module.alias.data.fill_(1.0)
    assert bool((module.tied == 1).all())


def test_what_the_system_has_no_pages_for_stays_where_it_is() -> None:
    program = """
import resource, psutil, torch
from adaptrain.pruning.placement import move_out
module = torch.nn.Linear(2048, 2048)
place, expected = module.weight.data_ptr(), float(module.weight.sum())
mapped = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**20, resource.RLIM_INFINITY))
move_out([module])
assert module.weight.data_ptr() == place
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
move_out([module])
assert module.weight.data_ptr() != place
assert float(module.weight.sum()) == expected
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_copies_and_files_of_it_are_as_of_any_model(tmp_path) -> None:
    model = wide_bert()
    move_out([model])
    copied = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    model.save_pretrained(tmp_path)
    saved = torch.load(tmp_path / "weights.pt")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])
        assert torch.equal(value, loaded[name])
        assert torch.equal(value, copied.state_dict()[name])
    optimizer = trained(copied)
    assert optimizer.state
    assert torch.equal(model.state_dict()["classifier.weight"], saved["classifier.weight"])
