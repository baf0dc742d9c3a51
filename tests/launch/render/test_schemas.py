"""Rendered manifests are valid where they will be read, and the validators reject what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import kubernetes_validate
import pytest
from moto import mock_aws
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.providers import _get_node_provider_cls

from forge_ray.config import load_config
from forge_ray.launch.render.config import PROVIDERS, AwsConfig
from forge_ray.launch.render.files import render
from tests.launch.render import schemas

Found = dict[str, Any]

AWS = {
    "defaults": [],
    "bought": ["market=on_demand", "access=public", "gpu=A10G", "gpus_per_node=4"],
    "bucket": ["store=s3://shop-artifacts/forge/ray", "access=direct", "min_gpu_nodes=2"],
}
GCP = {
    "defaults": [],
    "bought": ["market=on_demand", "access=public", "gpu=A100", "gpus_per_node=8"],
    "bucket": ["store=gs://shop-artifacts/forge", "access=direct", "driver_cpus=32"],
}
KUBERAY = {
    "defaults": [],
    "kueue": ["queue=gpus", "platform=karpenter", "market=on_demand", "storage_class=''"],
    "eks": ["platform=eks", "gpu=A10G", "store=s3://shop-artifacts/forge", "job_retries=0"],
    "words": [
        "name='on'", "namespace='123'", "queue='1.0'", "claim='yes'", "storage_class='1e3'",
        "image='1:20'", "operator_namespace='0'", "monitoring_namespace='no'", "identity={'on': y}",
    ],
    "plain": ["platform=plain", "gpu=H200", "gpus_per_node=8", "gpu_cpus=180", "claim_gib=4000"],
}  # fmt: skip


def rendered(provider: str, overrides: list[str]) -> dict[str, str]:
    return render(load_config(PROVIDERS[provider], overrides=overrides))


def cluster(provider: str, overrides: list[str]) -> Found:
    (found,) = schemas.documents(rendered(provider, overrides)[f"{provider}.yaml"])
    return found


@pytest.mark.parametrize("provider", ["aws", "gcp"])
@pytest.mark.parametrize("case", ["defaults", "bought", "bucket"])
def test_ray_up_takes_the_file(provider: str, case: str) -> None:
    config = cluster(provider, {"aws": AWS, "gcp": GCP}[provider][case])
    prepared = schemas.validate_ray_up(config)
    types = prepared["available_node_types"]
    assert set(types) == {"head", "driver", "gpu"}
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    spot = case != "bought"
    assert types["gpu"]["labels"]["ray.io/market-type"] == ("spot" if spot else "on-demand")
    for name in ("head", "driver"):
        assert types[name]["labels"] == {"ray.io/market-type": "on-demand"}
        node = types[name]["node_config"]
        assert "spot" not in json.dumps(node).lower().replace("forge-ray", "")
    # Ray's own defaults would install a nightly build and serve the dashboard to everyone.
    commands = [text for name, value in prepared.items() if "commands" in name for text in value]
    assert all("pip install" not in text and "0.0.0.0" not in text for text in commands)
    starts = [text for text in commands if "ray start" in text]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in text for text in starts)
    assert "RAY_enable_autoscaler_v2=1" in starts[0]
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("case", GCP)
def test_compute_engine_takes_the_machines(case: str) -> None:
    for node in cluster("gcp", GCP[case])["available_node_types"].values():
        schemas.validate_compute_instance(node["node_config"])


def test_ec2_takes_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own launcher starts them on a simulated EC2; the real client checks each field."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    with mock_aws():
        network = simulated_network()
        for case, overrides in AWS.items():
            config = cluster("aws", [*overrides, *network])
            provider = _get_node_provider_cls(config["provider"])(config["provider"], "forge-ray")
            for name, kind in config["available_node_types"].items():
                # The simulation has no parameters of Systems Manager.
                node = kind["node_config"] | {"ImageId": "ami-12c6146b"}
                node["IamInstanceProfile"] = {"Name": "simulated"}
                (created,) = provider.create_node(node, {"ray-user-node-type": name}, 1).values()
                assert created.instance_type == node["InstanceType"], (case, name)
                # Spot machines only where they were asked for.
                is_spot = created.instance_lifecycle == "spot"
                assert is_spot == (name == "gpu" and case != "bought"), (case, name)


def test_ray_adds_no_group_and_no_role_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What `ray up` fills in where a file is silent would be open to the world, or all-powerful."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # the key pair goes to ~/.ssh
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-west-2")
        iam = boto3.client("iam", region_name="us-west-2")
        config = cluster("aws", simulated_network())
        groups = ec2.describe_security_groups()["SecurityGroups"]
        prepared = schemas.validate_ray_up(config)
        started = _get_node_provider_cls(config["provider"]).bootstrap_config(prepared)
        assert ec2.describe_security_groups()["SecurityGroups"] == groups
        assert iam.list_roles()["Roles"] == []
        for name, kind in config["available_node_types"].items():
            node = started["available_node_types"][name]["node_config"]
            assert node.items() >= kind["node_config"].items()


def simulated_network() -> list[str]:
    """A subnet and a security group of the simulation, as settings."""
    ec2 = boto3.client("ec2", region_name="us-west-2")
    iam = boto3.client("iam", region_name="us-west-2")
    iam.create_instance_profile(InstanceProfileName="simulated")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="own", Description="own", VpcId=vpc)["GroupId"]
    return [f"subnets=[{subnet}]", f"security_group={group}"]


@pytest.mark.parametrize("case", AWS)
def test_iam_takes_the_policies(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    texts = {name: text for name, text in rendered("aws", AWS[case]).items() if "iam" in name}
    assert ("aws-iam/worker.json" in texts) == (case == "bucket")
    with mock_aws():
        iam = boto3.client("iam", region_name="us-west-2")
        for name, text in texts.items():
            iam.create_policy(PolicyName=name.split("/")[1], PolicyDocument=text)


@pytest.mark.parametrize("case", AWS)
def test_policies_allow_no_more_than_named(case: str) -> None:
    for name, text in rendered("aws", AWS[case]).items():
        if "iam" not in name:
            continue
        for statement in json.loads(text)["Statement"]:
            actions = statement["Action"]
            actions = [actions] if isinstance(actions, str) else actions
            assert not any("*" in action for action in actions), (name, statement)
            if statement["Resource"] == "*":
                assert all("Describe" in action for action in actions), (name, statement)


@pytest.mark.parametrize("case", KUBERAY)
@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_takes_the_manifests(case: str, name: str) -> None:
    (found,) = schemas.documents(rendered("kuberay", KUBERAY[case])[f"kuberay/{name}.yaml"])
    schemas.validate_kuberay(found)


@pytest.mark.parametrize("case", KUBERAY)
@pytest.mark.parametrize("name", ["access", "storage", "network-policy"])
def test_kubernetes_takes_the_manifests(case: str, name: str) -> None:
    overrides = [*KUBERAY[case], "operator_namespace=ray-system"]
    for found in schemas.documents(rendered("kuberay", overrides)[f"kuberay/{name}.yaml"]):
        schemas.validate_kubernetes(found)


@pytest.mark.parametrize("case", KUBERAY)
def test_the_autoscaler_reads_the_groups(case: str) -> None:
    """Ray's autoscaler derives what each group offers, before the first pod of it exists."""
    config = load_config(PROVIDERS["kuberay"], overrides=KUBERAY[case])
    (found,) = schemas.documents(render(config)["kuberay/raycluster.yaml"])
    types = _derive_autoscaling_config_from_ray_cr(found)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    driver, gpu = types["driver"], types["gpu"]
    assert driver["resources"] | {"memory": 0} == {"CPU": 7, "driver": 1, "memory": 0}
    assert driver["labels"] == {"ray.io/market-type": "on-demand"}
    assert gpu["resources"]["GPU"] == config.gpus_per_node
    assert gpu["resources"]["memory"] == config.gpu_memory_gib * 2**30
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config.max_gpu_nodes)
    assert gpu["labels"]["ray.io/accelerator-type"] == config.gpu


def test_the_job_can_only_start_on_a_driver_node() -> None:
    texts = rendered("kuberay", [])
    (job,) = schemas.documents(texts["kuberay/rayjob.yaml"])
    groups = {one["groupName"]: one for one in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    asked = json.loads(job["spec"]["entrypointResources"])
    assert set(asked) == set(groups["driver"]["resources"])
    assert "resources" not in groups["gpu"]


def test_job_and_cluster_have_the_same_nodes() -> None:
    texts = rendered("kuberay", ["queue=gpus"])
    (job,) = schemas.documents(texts["kuberay/rayjob.yaml"])
    (stays,) = schemas.documents(texts["kuberay/raycluster.yaml"])
    assert job["spec"]["rayClusterSpec"] == stays["spec"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}


def _unknown_top(found: Found) -> None:
    found["spec"]["workerGroupSpec"] = []


def _unknown_in_a_pod(found: Found) -> None:
    pod = found["spec"]["workerGroupSpecs"][1]["template"]["spec"]
    pod["terminationGracePeriod"] = 30


def _unknown_in_a_container(found: Found) -> None:
    pod = found["spec"]["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["volumeMount"] = []


def _wrong_type(found: Found) -> None:
    found["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] = "600"


def _wrong_choice(found: Found) -> None:
    found["spec"]["authOptions"]["mode"] = "tokens"


def _number_as_parameter(found: Found) -> None:
    found["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _unknown_metadata(found: Found) -> None:
    found["metadata"]["label"] = {}


@pytest.mark.parametrize(
    "break_it",
    [
        _unknown_top, _unknown_in_a_pod, _unknown_in_a_container, _wrong_type, _wrong_choice,
        _number_as_parameter, _unknown_metadata,
    ],
)  # fmt: skip
def test_kuberay_refuses_what_is_wrong(break_it: Callable[[Found], None]) -> None:
    (found,) = schemas.documents(rendered("kuberay", [])["kuberay/raycluster.yaml"])
    schemas.validate_kuberay(found)
    break_it(found)
    with pytest.raises(jsonschema.ValidationError):
        schemas.validate_kuberay(found)


@pytest.mark.parametrize("provider", ["aws", "gcp"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout",), 5),
        (("max_workers",), "12"),
        (("available_node_types", "gpu", "min_worker"), 0),
        (("available_node_types", "gpu", "resources", "GPU"), 0.5),
        (("available_node_types", "gpu", "labels", "ray.io/market-type"), True),
        (("docker", "images"), "x"),
        (("head_node_type",), "gone"),
    ],
)
def test_ray_up_refuses_what_is_wrong(provider: str, path: tuple[str, ...], value: object) -> None:
    config = cluster(provider, [])
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        schemas.validate_ray_up(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("machineTypes", "g2-standard-8"), ("scheduling", [{"preemptible": True}]), ("disks", {})],
)
def test_compute_engine_refuses_what_is_wrong(name: str, value: object) -> None:
    node = cluster("gcp", [])["available_node_types"]["gpu"]["node_config"]
    with pytest.raises(jsonschema.ValidationError):
        schemas.validate_compute_instance(node | {name: value})


def test_kubernetes_refuses_what_is_wrong() -> None:
    (policy,) = schemas.documents(rendered("kuberay", [])["kuberay/network-policy.yaml"])
    policy["spec"]["ingres"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        schemas.validate_kubernetes(policy)


def test_ec2_refuses_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    with mock_aws():
        ec2 = boto3.resource("ec2", region_name="us-west-2")
        config = load_config(AwsConfig)
        (found,) = schemas.documents(render(config)["aws.yaml"])
        node = found["available_node_types"]["gpu"]["node_config"]
        node.pop("SubnetIds")
        with pytest.raises(Exception, match="MetadataOption"):
            ec2.create_instances(**node, MetadataOption={}, MinCount=1, MaxCount=1)
