"""Starts raylets of this machine as the nodes of an autoscaling cluster; run by Ray's monitor."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from tests.e2e.patient_ray import be_patient


class PatientNodeProvider(FakeMultiNodeProvider):
    """Ray's own provider for tests, which waits for nodes that start slowly."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        be_patient()
        super().__init__(provider_config, cluster_name)
