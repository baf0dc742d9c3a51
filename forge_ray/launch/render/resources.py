"""What a sweep file says of a rendered cluster: where stages run, what its autoscaler may add."""

from __future__ import annotations

import yaml

from forge_ray.config import to_mapping
from forge_ray.launch.render.config import AwsConfig, ClusterConfig, GcpConfig, KubeRayConfig
from forge_ray.sweep.config import AutoscaledNodes

_HEADER = """\
# Into the sweep file: where its stages run, and what the autoscaler of {name} may add to the nodes
# that run already. Trainings go to the GPUs with
#   gr: {{use_gpu: true, worker_labels: {{ray.io/market-type: {market}}}}}
"""


def sweep_resources(config: ClusterConfig) -> str:
    """The section `resources` of a sweep file for this cluster, as YAML."""
    on_demand = {"ray.io/market-type": "!spot"}
    nodes = node_groups(config)
    section = {
        "driver_labels": on_demand,
        "stage_labels": dict(on_demand),
        "autoscaled": {name: _set(one) for name, one in nodes.items()},
    }
    text = yaml.safe_dump({"resources": section}, sort_keys=False)
    return _HEADER.format(name=config.name, market=config.gpu_market) + text


def node_groups(config: ClusterConfig) -> dict[str, AutoscaledNodes]:
    """The groups that scale, by the names that the manifests give them."""
    gpu = {"ray.io/market-type": config.gpu_market, "ray.io/accelerator-type": config.gpu}
    driver_cpus, driver_memory, gpu_cpus, gpu_memory = _sizes(config)
    return {
        "driver": AutoscaledNodes(
            max_nodes=config.max_driver_nodes,
            cpus=driver_cpus,
            memory_gb=driver_memory,
            labels={"ray.io/market-type": "on-demand"},
        ),
        "gpu": AutoscaledNodes(
            max_nodes=config.max_gpu_nodes,
            cpus=gpu_cpus,
            gpus=config.gpus_per_node,
            memory_gb=gpu_memory,
            labels=gpu,
        ),
    }


def _sizes(config: ClusterConfig) -> tuple[int, int, int, int]:
    """CPUs and GiB of a driver node, then of a GPU node."""
    if isinstance(config, KubeRayConfig):
        # Ray in a pod hands out all of the container's memory.
        return (
            config.driver_pod_cpus, config.driver_memory_gib,
            config.gpu_cpus, config.gpu_memory_gib,
        )  # fmt: skip
    assert isinstance(config, (AwsConfig, GcpConfig))
    driver, gpu = config.driver_machine, config.gpu_machine
    return driver.cpus, driver.ray_memory >> 30, gpu.cpus, gpu.ray_memory >> 30


def _set(node: AutoscaledNodes) -> dict[str, object]:
    return {name: value for name, value in to_mapping(node).items() if value}
