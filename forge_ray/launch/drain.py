"""This node is about to go: trainings on it save and move, then Ray leaves it.

Runs on the node itself: before a pod ends, or beside Ray on a machine of the spot market, where it
watches for the notice. What a drain does to a training is in `forge_ray.gr.train`; here a cloud's
notice becomes one. `GcsClient` and node records are private names of Ray; a test pins them.

Usage, in manifests; no command of `forge-ray`, whose start takes seconds that a node may not have:
  python -m forge_ray.launch.drain --seconds 15                            # then waits for it
  python -m forge_ray.launch.drain --watch aws --address HEAD:6379         # after its notice
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import AuthenticationError, RpcError

from forge_ray.errors import ClusterError, ConfigError, ForgeError

logger = logging.getLogger(__name__)

METADATA = "http://169.254.169.254"
"""Where both clouds tell a machine about itself."""
GCP_NOTICE_S = 30
"""Seconds that Google leaves between its notice and the end."""
POLL_S = 2.0
"""Seconds between two looks for a notice."""
SILENCE_S = 300.0
"""Seconds without an answer of the cluster after which it counts as gone."""
_ANSWER_S = 10.0
"""How long the cluster may take for one answer: meanwhile nobody looks for a notice."""
_LOOK_AT_RAY = 15
"""Looks for a notice between two looks whether the node is still there."""
_REASON = "its machine is taken away"


class ThisNode:
    """The node of a Ray cluster that this process runs on.

    Args:
        address: of the cluster's GCS, `host:port`; None asks RAY_ADDRESS, then this machine's Ray.

    Raises:
        ConfigError: There is no such cluster, it wants another token, or this machine is no node
            of it.
    """

    node_id: str
    _silent_since: float | None
    """When the cluster was first asked in vain; None where it answered last."""

    def __init__(self, address: str | None = None) -> None:
        self._silent_since = None
        try:
            found = services.canonicalize_bootstrap_address_or_die(address)
            # Ray tries for 40 seconds; a pod whose head is gone has no more than that.
            host, _, port = found.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            self._gcs = GcsClient(address=found)
            self.node_id = self._find()
        except AuthenticationError as error:
            raise ConfigError(
                f"the token must be that of the cluster at {found}, got none or another. Set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token as on its nodes."
            ) from error
        except (OSError, RpcError) as error:
            where = address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise ConfigError(
                f"--address must be a Ray cluster that answers, got {where}: {error}. "
                "Name the head, host:6379."
            ) from error

    def _find(self) -> str:
        # Autoscaler v2 tells each node the name of its machine or pod; without one, the address.
        instance = os.environ.get("RAY_CLOUD_INSTANCE_ID", "")
        own = services.get_node_ip_address()
        for node_id, node in self._alive().items():
            if node.instance_id == instance if instance else node.node_manager_address == own:
                return node_id
        raise ConfigError(
            f"this machine must be a node of the cluster, got none named {instance or own}. "
            "Run this where `ray start` ran."
        )

    def _alive(self, timeout_s: float | None = None) -> dict[str, Any]:
        nodes = self._gcs.get_all_node_info(timeout=timeout_s).items()
        return {one.hex(): node for one, node in nodes if node.state == GcsNodeInfo.ALIVE}

    def has_left(self) -> bool:
        """Whether Ray has left this node: the cluster says so, or said nothing for `SILENCE_S`."""
        try:
            is_alive = self.node_id in self._alive(_ANSWER_S)
        except RpcError as error:
            now = time.monotonic()
            if self._silent_since is None:
                self._silent_since = now
                logger.warning("the cluster does not answer (%s); asking again", error)
            return now - self._silent_since >= SILENCE_S
        self._silent_since = None
        return not is_alive

    def drain(self, seconds: float) -> None:
        """Tells the cluster that this node goes in so many seconds; asks until then.

        Raises:
            ClusterError: The cluster refused, or did not answer in time.
        """
        deadline = time.time() + seconds
        while (error := self._try_to_drain(deadline)) is not None:
            left = deadline - time.time()
            if left <= 0:
                raise ClusterError(
                    f"the cluster must answer until this node goes, got: {error}. Trainings here "
                    "continue from their last checkpoint, elsewhere."
                ) from error
            logger.warning("the cluster did not hear of the drain (%s); telling it again", error)
            time.sleep(min(1.0, left))
        logger.info("node %s drains: %.0f seconds to save and move", self.node_id, seconds)

    def _try_to_drain(self, deadline: float) -> RpcError | None:
        """Why the cluster did not hear it; None where it did."""
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        try:
            is_accepted, why = self._gcs.drain_node(
                self.node_id, reason, _REASON, int(deadline * 1000), timeout=_ANSWER_S
            )
        except RpcError as error:
            return error
        if not is_accepted:
            raise ClusterError(f"the cluster must accept the drain, got: {why}. It stays as it is.")
        return None

    def wait_until_gone(self, seconds: float) -> bool:
        """Waits until Ray has left this node, or the time is over; returns whether it left."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.has_left():
                return True
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        return False


Notice = Callable[[], float | None]
"""Seconds until the machine goes, None while it stays."""


def aws_notice(url: str = METADATA) -> float | None:
    """What EC2 says of this machine's spot request; on demand there never is a notice."""
    token = _ask(
        f"{url}/latest/api/token",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
        method="PUT",
    )
    text = _ask(
        f"{url}/latest/meta-data/spot/instance-action",
        headers={"X-aws-ec2-metadata-token": token or ""},
    )
    if text is None:
        return None
    ends = datetime.strptime(json.loads(text)["time"], "%Y-%m-%dT%H:%M:%SZ")
    left = (ends.replace(tzinfo=timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, left)


def gcp_notice(url: str = METADATA) -> float | None:
    """What Compute Engine says of this machine."""
    text = _ask(
        f"{url}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
    )
    return GCP_NOTICE_S if text == "TRUE" else None


NOTICES: dict[str, Notice] = {"aws": aws_notice, "gcp": gcp_notice}
"""How to learn of a notice, by cloud."""


def watch(node: ThisNode, notice: Notice, *, poll_s: float = POLL_S) -> bool:
    """Waits for a notice and drains the node; returns False when Ray left without one."""
    looks, is_reachable = 0, True
    while True:
        try:
            left = notice()
            is_reachable = True
        except OSError as error:
            if is_reachable:
                logger.warning("no metadata service (%s); asking again", error)
            is_reachable, left = False, None
        if left is not None:
            node.drain(left)
            return True
        looks += 1
        if looks % _LOOK_AT_RAY == 0 and node.has_left():
            return False
        time.sleep(poll_s)


def _ask(url: str, *, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer of the metadata service; None where it knows no such thing."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def main(words: Sequence[str] | None = None) -> int:
    """The module as a program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m forge_ray.launch.drain", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="until this node goes")
    parser.add_argument("--watch", choices=NOTICES, help="wait for this cloud's notice instead")
    parser.add_argument("--address", help="the head, host:6379; default RAY_ADDRESS")
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        node = ThisNode(options.address)
        if options.watch:
            watch(node, NOTICES[options.watch])
        else:
            node.drain(options.seconds)
            node.wait_until_gone(options.seconds)
    except ForgeError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
