"""The parts may only depend on each other in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adaptrain

PACKAGE = Path(adaptrain.__file__).parent
LEAVES = {"policies", "budget", "decisions", "errors"}
# room: what of adaptrain it may import, besides itself; None: anything but what is listed in FORBIDDEN
ALLOWED = {"errors": set(), "decisions": LEAVES, "budget": LEAVES, "policies": LEAVES}
FORBIDDEN = {
    room: {"callbacks", "nlp", "app", "report"}
    for room in ("resources", "execution", "pruning", "compression", "fusion", "_lightning")
}
FORBIDDEN["family"] = {"callbacks", "nlp", "app"}
FORBIDDEN["callbacks"] = {"nlp", "app", "report"}
FORBIDDEN["report"] = {"nlp", "app"}
FORBIDDEN["nlp"] = {"app"}
LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric")
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: a relative import hides where it goes")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_flow(path):
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "adaptrain" and len(parts) > 1 and parts[1] != room:
            target = parts[1]
            assert target != "app" or room in {"app", "__main__"}, f"nothing may import app: {name}"
            assert target not in FORBIDDEN.get(room, set()), f"{room} may not import {target}"
            if room in ALLOWED:
                assert target in ALLOWED[room], f"{room} may not import {target}"
        if parts[0] in LIGHTNING:
            assert room == "_lightning", f"only _lightning may import Lightning: {name}"
        if parts[0] == "torch":
            assert room not in LEAVES, f"{room} is pure Python: {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_trainer_attributes_stay_in_one_package(path):
    if room_of(path) == "_lightning":
        pytest.skip("the one place for them")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = ast.unparse(node.value)
            private = root.startswith("trainer") or ".trainer" in root
            assert not private, f"line {node.lineno}: {root}.{node.attr}"


def test_import_is_light():
    code = (
        "import sys, adaptrain; adaptrain.Budget;"
        " print([m for m in ('torch', 'pytorch_lightning', 'hydra', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves():
    for name in adaptrain.__all__:
        assert getattr(adaptrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        adaptrain.Nothing  # noqa: B018


def test_typing_and_runtime_names_agree():
    tree = ast.parse(Path(adaptrain.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adaptrain")
        for alias in node.names
        if alias.asname
    }
    assert typed == set(adaptrain.__all__) - {"__version__"}
