"""A sweep that says of a rendered cluster what the command wrote finds its place there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from forge_ray.config import load_config
from forge_ray.launch.render.config import PROVIDERS
from forge_ray.launch.render.files import render
from forge_ray.launch.render.resources import node_groups, sweep_resources
from forge_ray.sweep.capacity import Bundle, Demand, Nodes, copies
from forge_ray.sweep.config import SweepConfig
from tests.launch.render.schemas import ROOT, documents


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_sweep_file_takes_the_section(provider: str, tmp_path: Path) -> None:
    config = load_config(PROVIDERS[provider], overrides=["max_gpu_nodes=5", "market=on_demand"])
    file = tmp_path / "sweep.yaml"
    quickstart = (ROOT / "sweeps/quickstart.yaml").read_text()
    assert "resources" not in yaml.safe_load(quickstart)
    file.write_text(quickstart + sweep_resources(config))
    sweep = load_config(SweepConfig, path=file)
    assert sweep.resources.autoscaled == node_groups(config)
    assert sweep.resources.driver_labels == {"ray.io/market-type": "!spot"}
    assert sweep.resources.autoscaled["gpu"].max_nodes == 5


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_the_numbers_are_those_of_the_manifest(provider: str) -> None:
    config = load_config(PROVIDERS[provider], overrides=["gpus_per_node=8", "driver_cpus=16"])
    (found,) = documents(render(config)[f"{provider}.yaml"])
    for name, group in node_groups(config).items():
        kind = found["available_node_types"][name]
        assert group.max_nodes == kind["max_workers"]
        assert (group.cpus, group.gpus) == (
            kind["resources"]["CPU"],
            kind["resources"].get("GPU", 0),
        )
        assert group.memory_gb * 2**30 == kind["resources"]["memory"]
        assert group.labels == kind["labels"]


def test_stages_find_their_nodes_and_no_others() -> None:
    """On the default cluster: cheap stages on demand only, trainings on all GPUs."""
    config = load_config(PROVIDERS["aws"])
    nodes = [
        Nodes(
            resources={"CPU": one.cpus, "GPU": one.gpus, "memory": one.memory_gb * 2**30},
            labels=one.labels,
            num=one.max_nodes,
            is_up=False,
        )
        for one in node_groups(config).values()
    ]
    cheap = Bundle(resources={"CPU": 1.0}, labels={"ray.io/market-type": "!spot"})
    assert copies(Demand(stage="fit", held=(cheap,)), nodes, limit=1000) == 4 * 8
    training = Bundle(
        resources={"CPU": 1.0, "GPU": 1.0}, labels={"ray.io/market-type": config.gpu_market}
    )
    assert copies(Demand(stage="train", held=(training,)), nodes, limit=1000) == 8
