"""docs/sweeps.md: its YAML works, and its table of keys is the configuration."""

from __future__ import annotations

import dataclasses
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from forge_ray.config import from_mapping
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.plan import quasi_random_points
from forge_ray.sweep.resolve import check_rungs, resolve_point
from forge_ray.sweep.space import parse_space

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(one) for one in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)]
MINIMAL = {"name": "x", "space": {"sid.quantizer.levels": {"int": [2, 3]}}}
DATASET = SimpleNamespace(key="d" * 64, num_items=1000)
WHOLE = ("budget.prices",)
"""Sections with a chapter of their own on the page."""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda one: next(iter(one)))
def test_every_block_of_the_page_is_part_of_a_sweep(block: dict[str, Any]) -> None:
    config = from_mapping(SweepConfig, {**MINIMAL, **block})
    check_rungs(config)
    drawn = list(islice(quasi_random_points(parse_space(config.space), seed=0), 24))
    resolved = [resolve_point(config, point, dataset=DATASET) for point in [*config.points, *drawn]]
    assert len({one.key for one in resolved}) > 1


def test_the_page_begins_with_a_whole_sweep() -> None:
    config = from_mapping(SweepConfig, BLOCKS[0])
    assert config.data
    assert config.gr["max_steps"]


def test_the_table_has_every_key_and_its_default() -> None:
    table = PAGE.partition("## All keys\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \| ", table, re.M))
    expected = _defaults(SweepConfig(name="x", space={"a": {"value": 1}}))
    assert rows.keys() == expected.keys()
    assert rows.pop("name") == "none, required"
    assert rows.pop("budget.prices") == "all 0"
    expected["space"] = {}
    shown = {name: yaml.safe_load(text.strip("`")) for name, text in rows.items()}
    assert shown == {name: expected[name] for name in rows}


def _defaults(config: Any, above: str = "") -> dict[str, Any]:
    found = {}
    for one in dataclasses.fields(config):
        name, value = f"{above}{one.name}", getattr(config, one.name)
        if dataclasses.is_dataclass(value) and name not in WHOLE:
            found |= _defaults(value, f"{name}.")
        else:
            found[name] = value
    return found
