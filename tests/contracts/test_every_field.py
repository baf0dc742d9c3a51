"""Every field of every component's configuration changes something, seen through its stage.

A field that nothing reads is found here, and so is one that is read but decides nothing. The tables
of values are in `field_tables.py`; a class or a field that is missing there fails.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import forge_ray
from forge_ray.artifacts import ArtifactStore
from forge_ray.config import Component, load_config
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.embed.encoders.stage import encode_items
from forge_ray.embed.teachers import load_teacher
from forge_ray.embed.vectors import VectorsConfig, open_space, open_vectors
from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.metrics.config import ScoreConfig
from forge_ray.sid.metrics.inputs import load_inputs
from forge_ray.sid.score import score_table
from forge_ray.sid.storage import SidArtifact
from tests.contracts.field_tables import BASES, CASES, ELSEWHERE, SMALL, Case, Other
from tests.embed.encoders.models import clip_model, text_model, vision_model
from tests.evaluate.datasets import write_dataset

NUM_ITEMS = 120
PACKAGES = ("forge_ray.sid.", "forge_ray.embed.")
SOURCE = Path(forge_ray.__file__).parent


class World:
    """One small dataset with everything a configuration may ask for, and a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ArtifactStore(root / "store")
        self.dataset = make_dataset(self.store)
        self._seen: dict[tuple[str, ...], dict[str, Any]] = {}
        self._table: SidArtifact | None = None

    @property
    def table(self) -> SidArtifact:
        """A fitted table to score."""
        if self._table is None:
            self._table = fit_sids(
                load_config(SidConfig, overrides=SMALL), self.dataset, self.store
            )
        return self._table

    def result(self, case: Case, overrides: tuple[str, ...], *, may_refuse: bool) -> dict[str, Any]:
        """What the case's stage makes of a configuration, as text; computed once."""
        key = (case.stage, case.config.__name__, *overrides)
        if key not in self._seen:
            words = [self.resolve(word) for word in overrides]
            try:
                self._seen[key] = STAGES[case.stage](self, case.config, words)
            except (ConfigError, DataError) as error:
                if not may_refuse:
                    raise
                return {"refused": str(error)}
        return self._seen[key]

    def resolve(self, word: str) -> str:
        """Put folders in place of the names that the tables use."""
        makers: dict[str, Callable[[Path], Any]] = {
            "MODEL": text_model,
            "MODEL2": lambda folder: text_model(folder, seed=1),
            "VISION": vision_model,
            "VISION2": clip_model,
            "PICTURES": lambda folder: draw_pictures(folder, 0),
            "PICTURES2": lambda folder: draw_pictures(folder, 1),
        }
        name, _, value = word.partition("=")
        value = value.strip('"')
        if value not in makers:
            return word
        folder = self.root / value
        if not folder.exists():
            folder.mkdir()
            makers[value](folder)
        return f"{name}={folder}"


def make_dataset(store: ArtifactStore) -> Dataset:
    """Users stay inside one of eight topics; two spaces, pairs, and columns of every sort."""
    rng = np.random.default_rng(0)
    topic = np.arange(NUM_ITEMS) % 8
    vectors = rng.normal(size=(8, 10))[topic] + 0.6 * rng.normal(size=(NUM_ITEMS, 10))
    lengths = rng.integers(5, 12, size=160)
    # Squaring the draw makes some items popular.
    rows = [
        (rng.random(length) ** 2 * (NUM_ITEMS // 8)).astype(int) * 8 + user % 8
        for user, length in enumerate(lengths)
    ]
    anchor = np.arange(NUM_ITEMS)
    words = ("soap", "brush", "cream", "mask", "razor", "comb", "scarf", "towel")
    columns = {
        "title": [f"{words[one]} number {item} and more" for item, one in enumerate(topic)],
        "brand": [words[one] for one in topic[::-1]],
        "note": [None if item % 7 == 0 else "words" for item in range(NUM_ITEMS)],
        "image_path": [f"{item % 6}.png" for item in range(NUM_ITEMS)],
        "second_path": [f"{item % 5}.png" for item in range(NUM_ITEMS)],
    }
    return write_dataset(
        store,
        Ragged.from_lists(rows, dtype=np.int32),
        item_ids=np.array([f"i{item:03d}" for item in range(NUM_ITEMS)]),
        vectors=vectors.astype(np.float32),
        columns=columns,
        pairs=(
            np.tile(anchor, 3),
            np.concatenate([(anchor + 8 * n) % NUM_ITEMS for n in (1, 2, 5)]),
        ),
        spaces={"other": rng.normal(size=(NUM_ITEMS, 10)).astype(np.float32)},
    )


def draw_pictures(folder: Path, seed: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install 'forge-ray[embed]'")
    rng = np.random.default_rng(seed)
    for number in range(6):
        pixels = rng.integers(0, 255, size=(30, 40, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{number}.png")


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(
        np.ascontiguousarray(array).tobytes() + str(array.shape).encode()
    ).hexdigest()


def run_sids(world: World, _: type, overrides: list[str]) -> dict[str, Any]:
    sids = fit_sids(load_config(SidConfig, overrides=overrides), world.dataset, world.store)
    quantizer = sids.load_quantizer()
    facts = sids.quantizer_artifact.manifest.metrics
    return {
        "codes": digest(np.asarray(sids.raw.codes)),
        "table": digest(np.asarray(sids.table.codes)),
        "decoded": digest(quantizer.decode(np.asarray(sids.raw.codes))),
        "kept": json.dumps([facts.get("kept_step"), facts.get("kept_metrics")]),
    }


def run_losses(world: World, _: type, overrides: list[str]) -> dict[str, Any]:
    sids = fit_sids(load_config(SidConfig, overrides=overrides), world.dataset, world.store)
    return {"curve": sids.quantizer_artifact.manifest.metrics["loss_curve"]}


def run_vectors(world: World, _: type, overrides: list[str]) -> dict[str, Any]:
    config = load_config(VectorsConfig, overrides=overrides)
    source = open_vectors(config, world.dataset, world.store)
    return {"vectors": digest(source.take(np.arange(NUM_ITEMS)))}


def run_teacher(world: World, kind: type, overrides: list[str]) -> dict[str, Any]:
    teacher = load_teacher(load_config(kind, overrides=overrides), world.dataset, world.store)
    return {"items": digest(teacher.items), "users": digest(teacher.users)}


def run_encoder(world: World, kind: type, overrides: list[str]) -> dict[str, Any]:
    config = load_config(kind, overrides=overrides)
    artifact = encode_items(config, world.dataset, world.store)
    vectors = open_space(artifact.key, world.dataset, world.store).take(np.arange(NUM_ITEMS))
    schema = pq.read_schema(artifact.files("vectors/")[0], filesystem=artifact.filesystem)
    return {
        "name": artifact.manifest.name,
        "stored": str(schema.field("vector").type),
        "vectors": digest(vectors),
    }


def run_score(world: World, _: type, overrides: list[str]) -> dict[str, Any]:
    config = load_config(ScoreConfig, overrides=overrides)
    found = score_table(
        world.table.table,
        world.dataset,
        config=config,
        quantizer=world.table.load_quantizer(),
        inputs=load_inputs(world.dataset, config=config, split="validation"),
    )
    return {name: value for name, value in found.items() if not name.endswith("seconds")}


STAGES: dict[str, Callable[[World, type, list[str]], dict[str, Any]]] = {
    "sids": run_sids,
    "losses": run_losses,
    "vectors": run_vectors,
    "teacher": run_teacher,
    "encoder": run_encoder,
    "score": run_score,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fields"))


def own_fields(config: type) -> list[str]:
    """Fields that a table must name: all but `kind` and the sections that are walked themselves."""
    walked = {case.config for case in CASES}
    names = []
    for one in dataclasses.fields(config):
        default = (
            one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
        )
        is_section = type(default) in walked and not isinstance(default, Component)
        if one.name != "kind" and not is_section:
            names.append(one.name)
    return names


def configurations() -> list[type]:
    """Every configuration class of the packages but the roots of families."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages([str(SOURCE)], prefix="forge_ray."):
        if module.name.startswith(PACKAGES):
            for name, one in vars(importlib.import_module(module.name)).items():
                if name.endswith("Config") and dataclasses.is_dataclass(one):
                    found[f"{one.__module__}.{name}"] = one
    return [one for one in found.values() if not is_abstract(one)]


def is_abstract(config: type) -> bool:
    """Whether the class is a family or a base of several kinds: it declares no kind of its own."""
    if not issubclass(config, Component):
        return False
    root = next(one for one in config.__mro__ if Component in one.__bases__)
    return config not in root.choices().values()


def test_every_configuration_is_walked() -> None:
    walked = {case.config for case in CASES}
    known = {*walked, *BASES, *ELSEWHERE}
    missing = [one.__name__ for one in configurations() if one not in known]
    assert not missing, f"add to field_tables.py: {missing}"
    for base in BASES:
        assert any(issubclass(one, base) for one in walked)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_field_has_another_value(case: Case) -> None:
    stated = {*case.others, *case.running}
    assert stated == {*own_fields(case.config)}
    assert not {*case.others} & {*case.running}


CHANGES = [(case, name, other) for case in CASES for name, other in case.others.items()]


@pytest.mark.parametrize(
    ("case", "name", "other"), CHANGES, ids=[f"{case.name}.{name}" for case, name, _ in CHANGES]
)
def test_a_field_changes_something(world: World, case: Case, name: str, other: Other) -> None:
    path = ".".join(part for part in (case.at, other.path or name) if part)
    change = f"{path}={json.dumps(other.value)}"
    given = (*case.given, *other.given)
    before = world.result(case, given, may_refuse=other.refuses)
    after = world.result(case, (*given, change), may_refuse=other.refuses)
    assert before != after, f"{change} changes nothing"


def test_fields_that_spread_the_work_are_read() -> None:
    """Where no result may change, at least somebody has to look."""
    read = {
        node.attr
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    for case in CASES:
        unread = {*case.running} - read
        assert not unread, f"{case.name}: {unread}"


def test_a_dead_field_would_be_found(world: World) -> None:
    """The walk itself can fail: a change that does nothing is one."""
    case = next(one for one in CASES if one.name == "Random@quantizer")
    same = Other(2)
    with pytest.raises(AssertionError, match="changes nothing"):
        test_a_field_changes_something(world, case, "levels", same)
