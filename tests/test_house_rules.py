"""The rules of the house: who may import whom, and how light `import zoo` is."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _imports(file: Path, *, top_level_only: bool) -> Iterator[str]:
    """Dotted names that a file imports; with `top_level_only`, those that run on import of the module."""
    tree = ast.parse(file.read_text())
    nodes = _top_level(tree) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            yield node.module or ""


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


def _files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no python files below {folder}"
    return files


@pytest.mark.parametrize("package", ["attention", "layers"])
def test_core_imports_nothing_else_of_the_project(package: str) -> None:
    for file in _files(f"zoo/{package}"):
        for name in _imports(file, top_level_only=False):
            inside = name.startswith(("zoo.attention", "zoo.layers", "zoo.errors"))
            assert inside or name.split(".")[0] not in ("zoo", "domains"), f"{file.name} imports {name}"


def test_zoo_does_not_import_domains_at_module_level() -> None:
    for file in _files("zoo"):
        names = list(_imports(file, top_level_only=True))
        assert not [n for n in names if n.split(".")[0] == "domains"], file


def test_a_domain_imports_no_other_domain() -> None:
    for file in _files("domains"):
        parts = file.relative_to(ROOT / "domains").parts
        for name in _imports(file, top_level_only=False):
            if name.startswith("domains."):
                assert name.split(".")[1] == parts[0], f"{file} imports {name}"


def test_import_zoo_is_light() -> None:
    """`import zoo` adds less than half a second to `import torch` and no heavy library."""
    program = (
        "import json, sys, time, torch; before = set(sys.modules); start = time.perf_counter();"
        "import zoo; seconds = time.perf_counter() - start;"
        "print(json.dumps([seconds, sorted({m.split('.')[0] for m in set(sys.modules) - before})]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, modules = json.loads(out.stdout)
    assert seconds < 0.5
    heavy = {"pandas", "pytorch_lightning", "timm", "h5py", "matplotlib", "transformers", "domains", "hydra"}
    assert not heavy & set(modules)
