"""Validators of what `cluster render` writes; none asks a network."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[3]
KUBERNETES = "1.34"
"""Kubernetes' version whose schemas count."""


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a YAML file."""
    return [one for one in yaml.safe_load_all(text) if one is not None]


def validate_ray_up(config: dict[str, Any]) -> dict[str, Any]:
    """Checks a file for `ray up` as Ray would, before it asks the cloud anything."""
    prepared = prepare_config(deepcopy(config))
    validate_config(prepared)
    return prepared


def validate_kuberay(found: dict[str, Any]) -> None:
    """Checks a RayCluster or RayJob; unknown fields, which Kubernetes would drop, are errors."""
    schema = kuberay_schema(found["kind"].lower())
    jsonschema.Draft202012Validator(schema).validate(found)


def validate_kubernetes(found: dict[str, Any]) -> None:
    """Checks an object of Kubernetes itself, unknown fields included."""
    kubernetes_validate.validate(found, KUBERNETES, strict=True)


def validate_compute_instance(found: dict[str, Any]) -> None:
    """Checks the body of Compute Engine's `instances.insert`."""
    schema = {"$ref": "#/schemas/Instance", "schemas": _compute_schemas()}
    jsonschema.Draft202012Validator(schema).validate(found)


@functools.cache
def kuberay_schema(kind: str) -> dict[str, Any]:
    """Schema of KubeRay's CRD, closed; skips the test where the schemas are absent."""
    folder = Path(os.environ.get("FORGE_RAY_SCHEMAS", ROOT.parent / "shared" / "schemas"))
    path = folder / f"kuberay-v1-{kind}.schema.json"
    if not path.is_file():
        pytest.skip(f"KubeRay's schemas not found at {folder}; set FORGE_RAY_SCHEMAS")
    schema = json.loads(path.read_text())
    # Of every object alike and left open in CRDs; the rest of it is checked by hand.
    schema["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "namespace"],
        "properties": {
            "name": {"type": "string"},
            "namespace": {"type": "string"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    pods = [one for one in _objects(schema) if "containers" in one.get("properties", {})]
    assert len(pods) > 1, "the schema holds no pod"
    closed = _closed(schema)
    closed["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return closed


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from _objects(value)
    if isinstance(schema, list):
        for value in schema:
            yield from _objects(value)


def _closed(schema: Any) -> Any:
    """The schema with every object that lists its properties closed to others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _closed(value) for name, value in schema.items()}
    properties = found.get("properties")
    if found.get("type") == "object" and isinstance(properties, dict):
        found.setdefault("additionalProperties", False)
        # Pods' metadata stand in the CRDs as objects without properties.
        if "metadata" in properties and properties["metadata"] == {"type": "object"}:
            properties["metadata"] = {
                "type": "object",
                "additionalProperties": False,
                "properties": {"labels": {"type": "object"}, "annotations": {"type": "object"}},
            }
    return found


@functools.cache
def _compute_schemas() -> dict[str, Any]:
    """Google's description of Compute Engine, as JSON schema."""
    path = resources.files("googleapiclient") / "discovery_cache/documents/compute.v1.json"
    schemas = json.loads(path.read_text())["schemas"]
    return {name: _closed(_as_json_schema(one)) for name, one in schemas.items()}


def _as_json_schema(found: Any) -> Any:
    if isinstance(found, list):
        return [_as_json_schema(one) for one in found]
    if not isinstance(found, dict):
        return found
    if isinstance(found.get("$ref"), str):
        return {"$ref": f"#/schemas/{found['$ref']}"}
    kept = {name: one for name, one in found.items() if name not in ("id", "required", "default")}
    # 64-bit numbers travel as text; the API takes both.
    if kept.get("format") in ("int64", "uint64") and kept.get("type") == "string":
        return {"type": ["string", "integer"]}
    return {name: _as_json_schema(one) for name, one in kept.items()}
