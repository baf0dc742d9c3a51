"""Nothing in the package executes a pickle that it reads: every load is looked at in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import forge_ray

ROOT = Path(forge_ray.__file__).parent
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "ray.cloudpickle"}
KNOWN = {
    # Reads ids and numbers by an Unpickler that finds no other class.
    "data/al_gr/archives.py": {"pickle"},
    # Names the error that torch raises for a checkpoint which holds code.
    "gr/engine.py": {"pickle"},
}
"""Modules that import such a library, and why they may."""


def faults(source: str, known: set[str]) -> list[str]:
    """Unsafe loads of a module, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [f"{node.lineno}: imports {name}" for name in imported(node) - known]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {text}" for text in of_call(node)]
    return found


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        names = {one.name for one in node.names}
    elif isinstance(node, ast.ImportFrom):
        names = {node.module or ""} | {f"{node.module}.{one.name}" for one in node.names}
    else:
        names = set()
    return names & PICKLES


def of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    options = {one.arg: ast.unparse(one.value) for one in node.keywords}
    if name == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
        yield "np.load that may unpickle"
    if name in ("pickle.load", "pickle.loads", "torch.jit.load", "pd.read_pickle", "eval", "exec"):
        yield f"{name} runs what it reads"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield f"{name} instead of yaml.safe_load"
    if name.endswith("Tuner.restore"):
        yield "Tuner.restore unpickles"
    if "trust_remote_code" in options:
        yield "trust_remote_code runs a repository's code"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_loads_what_may_run(path: Path) -> None:
    known = KNOWN.get(path.relative_to(ROOT).as_posix(), set())
    assert faults(path.read_text(encoding="utf-8"), known) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray import cloudpickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=asked)",
        "pickle.loads(content)",
        "yaml.load(text)",
        "tune.Tuner.restore(path, trainable)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_may_run_is_seen(source: str) -> None:
    assert len(faults(source, set())) == 1
