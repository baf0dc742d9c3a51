"""What stands in `cluster/` is what the command writes; no secret is in it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.launch.render.config import EXAMPLES, PROVIDERS, KubeRayConfig
from forge_ray.launch.render.files import RAY_VERSION, left_as_examples, render, write
from tests.launch.render.schemas import ROOT, documents

OVERRIDES = {
    "name": "other",
    "image": "registry.test/other:1",
    "gpu": "H100",
    "gpus_per_node": 8,
    "min_gpu_nodes": 1,
    "max_gpu_nodes": 3,
    "market": "on_demand",
    "driver_cpus": 16,
    "max_driver_nodes": 2,
    "idle_minutes": 3,
    "access": "direct",
    "nfs": "nfs.test:/other",
    "machine_image": "other",
    "disk_gib": 300,
    "account": "'210987654321'",
    "subnets": "[subnet-1,subnet-2]",
    "security_group": "sg-1",
    "project": "other-project",
    "subnetwork": "other",
    "namespace": "other",
    "platform": "karpenter",
    "gpu_cpus": 3,
    "gpu_memory_gib": 11,
    "claim": "other",
    "storage_class": "other",
    "claim_gib": 77,
    "queue": "other",
    "identity": "{role: other}",
    "operator_namespace": "other",
    "monitoring_namespace": "other",
    "job_retries": 1,
    "max_hours": 5,
}
"""For each setting another value."""


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_folder_shows_the_defaults(provider: str) -> None:
    """After a change of the templates: forge-ray cluster render --provider X --out cluster."""
    texts = render(load_config(PROVIDERS[provider]))
    for name, text in texts.items():
        assert (ROOT / "cluster" / name).read_text(encoding="utf-8") == text, name
    folders = {Path(name).parts[0] for name in texts if "/" in name}
    for folder in folders:
        found = {
            str(one.relative_to(ROOT / "cluster")) for one in (ROOT / "cluster" / folder).iterdir()
        }
        assert found == {name for name in texts if name.startswith(f"{folder}/")}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_setting_changes_something(provider: str) -> None:
    cls = PROVIDERS[provider]
    store = "gs://other/x" if provider == "gcp" else "s3://other/x"
    others = {**OVERRIDES, "store": store}
    if provider == "gcp":
        others |= {"region": "europe-west4", "zone": "us-central1-b"}
    if provider == "aws":
        others |= {"region": "eu-west-1"}
    default = render(load_config(cls))
    for one in fields(cls):
        overrides = [f"{one.name}={others[one.name]}"]
        if one.name == "gpu":
            overrides.append("gpus_per_node=8")
        if one.name == "region" and provider == "gcp":
            overrides.append("zone=europe-west4-a")
        changed = render(load_config(cls, overrides=overrides))
        assert changed != default, one.name


@pytest.mark.parametrize("provider", PROVIDERS)
def test_manifests_hold_no_secret(provider: str) -> None:
    """No token, key or password; the token is named, made or mounted, never written."""
    for name, text in render(load_config(PROVIDERS[provider])).items():
        # The commands of a shell and JSON have no place for one either.
        assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]", text), name
        assert not re.search(r"(?i)(password|secret_access_key|private_key)\s*[=:]", text), name
        assert not re.search(r"AKIA[0-9A-Z]{16}|[0-9a-f]{64}|BEGIN [A-Z ]*PRIVATE", text), name
        for found in documents(text) if name.endswith(".yaml") else []:
            assert found.get("kind") != "Secret", name
            assert "secretKeyRef" not in yaml.safe_dump(found)


def test_pods_are_bound() -> None:
    """Non-root, without privileges or rights in Kubernetes, and told before they go."""
    texts = render(load_config(KubeRayConfig))
    accounts = {
        one["metadata"]["name"]: one
        for one in documents(texts["kuberay/access.yaml"])
        if one["kind"] == "ServiceAccount"
    }
    (found,) = documents(texts["kuberay/raycluster.yaml"])
    spec = found["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["restartPolicy"] == "Never"
        assert pod["serviceAccountName"] in accounts
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        *command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "forge_ray.launch.drain", "--seconds"]
        assert int(seconds) < pod["terminationGracePeriodSeconds"]


def test_the_network_policy_holds_every_pod() -> None:
    texts = render(load_config(KubeRayConfig))
    (policy,) = documents(texts["kuberay/network-policy.yaml"])
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    (job,) = documents(texts["kuberay/rayjob.yaml"])
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [one["template"] for one in groups] + [job["spec"]["submitterPodTemplate"]]
    for template in templates:
        assert wanted <= template["metadata"]["labels"].items()


def test_ray_is_the_pinned_one() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={RAY_VERSION}" in pins


def test_writing_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out must be a folder, got the file"):
        write({"a.yaml": ""}, tmp_path / "file")


def test_examples_are_named_until_they_are_set() -> None:
    assert left_as_examples(load_config(PROVIDERS["aws"])) == list(EXAMPLES[:5])
    config = load_config(PROVIDERS["aws"], overrides=["account='210987654321'"])
    assert "account" not in left_as_examples(config)
