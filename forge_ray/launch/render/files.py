"""Fills the templates: a configuration in, the texts of a folder's files out.

Knows no cloud's API and no network; tests validate what it writes against Ray's, KubeRay's,
Kubernetes' and the clouds' schemas.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from forge_ray.errors import ConfigError
from forge_ray.launch.render.config import (
    EXAMPLES,
    GKE_GPUS,
    PROVIDERS,
    SHARED_DISK,
    AwsConfig,
    ClusterConfig,
)
from forge_ray.launch.render.resources import sweep_resources

SWEEP_RESOURCES = "-sweep-resources.yaml"
"""Ending of the one file that is no manifest but a part of a sweep file."""
RAY_VERSION = "2.60.0"
"""Of the image; `constraints.txt` pins the same."""


def render(config: ClusterConfig) -> dict[str, str]:
    """The manifests of a cluster.

    Returns:
        Texts by path within a folder; the first is what starts the cluster.
    """
    provider = next(name for name, one in PROVIDERS.items() if one is type(config))
    files = _aws_files(config) if isinstance(config, AwsConfig) else _FILES[provider]
    return _fill(config, files, provider) | {
        f"{provider}{SWEEP_RESOURCES}": sweep_resources(config)
    }


def write(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Writes rendered files below a folder; returns their paths."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out must be a folder, got the file {folder}. Name another.")
    paths = []
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def left_as_examples(config: ClusterConfig) -> list[str]:
    """Settings that still hold their example: the manifests cannot work before they are set."""
    fresh = type(config)()
    return [
        name
        for name in EXAMPLES
        if hasattr(config, name) and getattr(config, name) == getattr(fresh, name)
    ]


def _aws_files(config: AwsConfig) -> dict[str, str]:
    files = {
        "aws.yaml": "aws.yaml.j2",
        "aws-iam/head.json": "aws-head.json.j2",
        "aws-iam/launcher.json": "aws-launcher.json.j2",
    }
    # Without a bucket the workers' role needs no policy at all.
    return files | ({"aws-iam/worker.json": "aws-worker.json.j2"} if config.bucket else {})


_FILES = {
    "gcp": {
        "gcp.yaml": "gcp.yaml.j2",
        "gcp-roles/head.yaml": "gcp-head-role.yaml.j2",
        "gcp-roles/launcher.yaml": "gcp-launcher-role.yaml.j2",
    },
    "kuberay": {
        f"kuberay/{name}.yaml": f"kuberay/{name}.yaml.j2"
        for name in ("access", "storage", "network-policy", "raycluster", "rayjob")
    },
}


def _fill(config: ClusterConfig, files: Mapping[str, str], provider: str) -> dict[str, str]:
    values = {
        "c": config,
        "provider": provider,
        "disk": SHARED_DISK,
        "ray_version": RAY_VERSION,
        "gke_gpu": GKE_GPUS.get(config.gpu, ""),
    }
    templates = _templates()
    return {name: templates.get_template(one).render(values) for name, one in files.items()}


@functools.cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("forge_ray.launch.render"),
        undefined=StrictUndefined,
        # Manifests, not pages: every value was checked when the configuration was loaded.
        autoescape=False,
        keep_trailing_newline=True,
    )
