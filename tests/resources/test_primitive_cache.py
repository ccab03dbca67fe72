from __future__ import annotations

import os

import pytest
import torch

from adaptrain.resources.primitive_cache import FEW_PRIMITIVES, limit_primitive_cache
from tests.processes import run_python

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

PROGRAM = """
import torch
from adaptrain.resources.primitive_cache import limit_primitive_cache
if {limited}:
    limit_primitive_cache(20)
for turn in range(2):
    for rows in range(1, 31):
        torch.nn.functional.gelu(torch.ones(rows, 32))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("limited", [False, True])
def test_kernels_are_let_go(limited: bool) -> None:
    """Thirty kernels twice in a row: of the last twenty, none is the one that comes next."""
    environment = {"ONEDNN_VERBOSE": "profile_create", CAPACITY: ""}
    program = f"import os; os.environ.pop({CAPACITY!r})\n" + PROGRAM.format(limited=limited)
    done = run_python("-c", program, environment=environment)
    assert done.returncode == 0, done.stderr
    built = [line for line in done.stdout.splitlines() if "create" in line and "gelu" in line]
    hits = sum("cache_hit" in line for line in built)
    assert sum("cache_miss" in line for line in built) >= 30
    assert hits == 0 if limited else hits >= 30


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CAPACITY, "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    limit_primitive_cache()
    assert os.environ[CAPACITY] == str(FEW_PRIMITIVES)
    monkeypatch.setenv(CAPACITY, "500")
    limit_primitive_cache()
    assert os.environ[CAPACITY] == "500"
    monkeypatch.delenv(CAPACITY)
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "7")
    limit_primitive_cache()
    assert CAPACITY not in os.environ
