"""Grafana's dashboard and Prometheus's rules ask only for what is exported, and load."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import combinations
from typing import Any

import pytest

from forge_ray.config import load_config
from forge_ray.gr.config import GrConfig
from forge_ray.gr.meters import TRAIN_COUNTERS
from forge_ray.sweep.config import BudgetConfig
from forge_ray.sweep.metrics import GAUGES
from tests.launch.monitoring import RULES, SERVER, alerts, dashboard, panels

# Of Ray 2.60 itself; test_prometheus.py sees them scraped, the GPU's aside.
OF_RAY = {
    "ray_cluster_active_nodes",
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_object_store_used_memory",
}
OURS = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in TRAIN_COUNTERS}


def asked() -> set[str]:
    text = " ".join([*panels().values(), *alerts().values()])
    return set(re.findall(r"\bray_\w+", text))


def test_only_exported_names_are_asked_for_and_all_of_ours_are() -> None:
    assert asked() == OURS | OF_RAY


def test_selected_and_grouped_labels_exist() -> None:
    """A label that no metric has makes an expression silently empty."""
    known = {"sweep", "instance", "GpuIndex", "node_type"}
    known |= {tag for one in GAUGES.values() for tag in one.tags}
    text = " ".join([*panels().values(), *alerts().values()])
    grouped = {
        name.strip() for inner in re.findall(r"by \(([^)]*)\)", text) for name in inner.split(",")
    }
    selected = set(re.findall(r"[{,]\s*(\w+)\s*[=!]", text))
    assert grouped | selected <= known


def test_no_tag_carries_a_hyper_parameter() -> None:
    closed = {"state", "reason", "stage", "proxy", "metric", "limit"}
    assert {tag for one in GAUGES.values() for tag in one.tags} <= closed


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    """Its own reader for 10.1 keeps every key that is in the file: none is unknown there."""
    pytest.importorskip("grafana_foundation_sdk", reason="needs Python 3.11 and the dev extra")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    ours = dashboard()
    read = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(dashboard())))
    assert list(lost(ours, read)) == []
    assert ours["schemaVersion"] == Dashboard().schema_version == 36


def lost(ours: Any, read: Any, path: str = "") -> list[str]:
    """Paths of `ours` that `read` does not hold as they are."""
    if isinstance(ours, dict) and isinstance(read, dict):
        return [
            one for key in ours for one in lost(ours[key], read.get(key, "gone"), f"{path}/{key}")
        ]
    if isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        pairs = enumerate(zip(ours, read, strict=True))
        return [one for place, pair in pairs for one in lost(*pair, f"{path}/{place}")]
    return [] if ours == read else [path]


def test_panels_have_ids_titles_and_room_of_their_own() -> None:
    found = dashboard()["panels"]
    assert len({one["id"] for one in found}) == len({one["title"] for one in found}) == len(found)
    for one, other in combinations([one["gridPos"] for one in found], 2):
        is_apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_apart_x or is_apart_y
        assert one["x"] + one["w"] <= 24
    assert {one["datasource"]["uid"] for one in found} == {"${datasource}"}


def test_the_server_reads_the_rules_and_no_token_is_in_a_file() -> None:
    text = SERVER.read_text(encoding="utf-8")
    assert f"rule_files: [{RULES.name}]" in text
    assert "credentials_file:" in text
    assert "credentials:" not in text


def test_alerts_name_settings_that_exist() -> None:
    text = RULES.read_text(encoding="utf-8")
    gr = load_config(GrConfig)
    for path in re.findall(r"\bgr\.([\w.]+\w)", text):
        value: Any = gr
        for name in path.split("."):
            value = getattr(value, name)
    limits = {one.name for one in dataclasses.fields(BudgetConfig)}
    assert {"max_cost", "max_hours"} <= limits
    assert "budget.max_{{ $labels.limit }}" in text
