"""The files of `cluster/` that watch a sweep, and what they ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
DASHBOARD = CLUSTER / "grafana" / "forge-ray.json"
RULES = CLUSTER / "prometheus" / "rules.yaml"
SERVER = CLUSTER / "prometheus" / "prometheus.yaml"


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels() -> dict[str, str]:
    """Expressions of the panels by title, for all sweeps."""
    return {
        one["title"]: target["expr"].replace("$sweep", ".*")
        for one in dashboard()["panels"]
        for target in one["targets"]
    }


def alerts() -> dict[str, str]:
    """Expressions of the alerts by name."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {one["alert"]: one["expr"] for group in groups for one in group["rules"]}
