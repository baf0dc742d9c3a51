"""Every module imports alone, says what it is for, and stays a readable size."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import forge_ray

ROOT = Path(forge_ray.__file__).parent
MODULES = sorted(name for _, name, _ in pkgutil.walk_packages([str(ROOT)], prefix="forge_ray."))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_and_documents_itself(name: str) -> None:
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.stem)
def test_a_file_keeps_the_size_limits(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno <= 60, f"{node.name} is too long"
