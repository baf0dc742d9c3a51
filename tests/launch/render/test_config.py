"""Settings of clusters: what is refused, and how it is said."""

from __future__ import annotations

import pytest

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.launch.render.config import PROVIDERS, AwsConfig, GcpConfig, KubeRayConfig


@pytest.mark.parametrize(
    ("provider", "override", "message"),
    [
        ("aws", "name=Forge_Ray", r"name must be 1 to 40 of a-z, 0-9 and -, a letter first, got"),
        ("aws", "name='x: {y}'", "name must be"),
        ("aws", "image=forge-ray", "image must be an image with a tag or digest, got"),
        ("aws", "image=forge-ray:latest", "image must name a version, got"),
        ("aws", "gpu=GTX", "gpu must be one of A100, .*, got 'GTX'"),
        ("aws", "gpus_per_node=3", "gpu and gpus_per_node must be a machine .* got 3 x L4"),
        ("aws", "max_gpu_nodes=0", "max_gpu_nodes must be >= 1, got 0"),
        ("aws", "min_gpu_nodes=9", "min_gpu_nodes must be between 0 and max_gpu_nodes=8, got 9"),
        ("aws", "market=cheap", "market must have the declared type"),
        ("aws", "max_gpu_nodes=lots", "max_gpu_nodes must have the declared type"),
        ("aws", "gpu_nodes=3", "gpu_nodes must be a known key"),
        ("aws", "driver_cpus=7", "driver_cpus must be one of 4, 8, 16, 32, got 7"),
        ("aws", "store=relative/store", "store must be an absolute path"),
        ("aws", "store=/mnt/forge-ray/../etc", r"store must not climb with '\.\.', got"),
        ("aws", "store=gs://shop", "store must be a folder or this cloud's own bucket, got gs://"),
        ("gcp", "store=s3://shop", "store must be a folder or this cloud's own bucket, got s3://"),
        ("aws", "subnets=[]", "subnets must name a subnet, got none"),
        ("aws", "subnets=[subnet-1,vpc-2]", "subnets.1 must be subnet-…, got 'vpc-2'"),
        ("aws", "security_group=default", "security_group must be sg-…, got 'default'"),
        ("aws", "account=1", "account must be the 12 digits of an account, got '1'"),
        ("aws", "region=mars", "region must be a region such as us-west-2, got 'mars'"),
        ("aws", "nfs=nowhere", "nfs must be host:/path, got 'nowhere'"),
        ("aws", "nfs='x:/y; reboot'", "nfs must be host:/path, got"),
        ("aws", "disk_gib=20", "disk_gib must be >= 100, got 20"),
        ("gcp", "zone=europe-west4-a", "zone must lie in region us-central1, got europe-west4-a"),
        ("gcp", "gpu=H200", "gpu and gpus_per_node must be a machine that this cloud rents"),
        ("gcp", "project=x", "project must be a project id, got 'x'"),
        ("kuberay", "gpu=A10G", "gpu must be one of T4, L4, .* on GKE, got A10G"),
        ("kuberay", "queue='a b'", "queue must be a name, or empty, got 'a b'"),
        ("kuberay", "namespace=A", "namespace must be a name, got 'A'"),
        ("kuberay", "gpu_cpus=0", "gpu_cpus must be >= 1, got 0"),
        ("kuberay", "job_retries=-1", "job_retries must be >= 0, got -1"),
        ("kuberay", "identity={role: 'a\"b'}", "identity.role must be one line without spaces"),
        ("kuberay", "identity={'a b': c}", "identity: the key a b must be an annotation's name"),
    ],
)
def test_wrong_settings_are_refused(provider: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PROVIDERS[provider], overrides=[override])


def test_eks_knows_machines_by_their_gpus() -> None:
    with pytest.raises(ConfigError, match="gpu and gpus_per_node must be a machine"):
        load_config(KubeRayConfig, overrides=["platform=eks", "gpus_per_node=2"])


def test_a_bucket_has_a_folder() -> None:
    config = load_config(AwsConfig, overrides=["store=s3://shop/forge/ray/"])
    assert (config.bucket, config.bucket_prefix) == ("shop", "forge/ray")
    whole = load_config(GcpConfig, overrides=["store=gs://shop"])
    assert (whole.bucket, whole.bucket_prefix) == ("shop", "")
    assert load_config(AwsConfig).bucket == ""


def test_a_machine_offers_less_memory_than_it_has() -> None:
    machine = load_config(AwsConfig).gpu_machine
    assert 0.5 < machine.ray_memory / (machine.memory_gib * 2**30) < 0.7
