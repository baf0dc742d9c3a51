"""Looks at a cluster before it is used: every node is asked, the answers are compared.

`examine` is the whole of it (`forge-ray cluster doctor`); `check_before_sweep` the part that costs
a sweep no time, run before each. Ray is up. Nodes that an autoscaler may add are not there yet and
not asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import ray
from ray import _raylet
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forge_ray.errors import ClusterError, ForgeError
from forge_ray.launch.preflight_checks import (
    Finding,
    check_auth,
    check_clocks,
    check_disk,
    check_nodes,
    check_storage,
    check_versions,
)
from forge_ray.launch.preflight_network import Node, check_network
from forge_ray.launch.preflight_node import NodeReport, leave_mark, look, remove_mark

logger = logging.getLogger(__name__)

_ANSWER_S, _QUICK_S = 600.0, 60.0
_PINGS = 3


class NodeProbe:
    """An actor on one node."""

    def look(self, *arguments: Any, **options: Any) -> NodeReport:
        """See `preflight_node.look`."""
        return look(*arguments, **options)

    def clock(self) -> float:
        """The node's time."""
        return time.time()


def examine(places: Sequence[str], *, compiles: bool = False) -> list[Finding]:
    """All checks of the cluster that Ray is connected to.

    Args:
        places: Paths or URIs that all nodes share: the artifact store, and a sweep's folder.
        compiles: Whether trainings compile their blocks (`gr.engine.compile`).
    """
    nodes = alive_nodes()
    with probing(nodes) as probes, marked(places) as marks:
        reports, silent = _look(nodes, probes, marks, compiles=compiles)
        reports = [_here(marks), *reports]
        skews = measure_skews(nodes, probes, silent)
    findings = [_answering(nodes, silent)]
    findings += check_nodes(reports, places=places, compiles=compiles)
    findings.append(check_clocks(skews))
    findings.append(check_network([one for one in nodes if one.name not in silent]))
    findings.append(check_auth(authentication_mode()))
    return findings


def check_before_sweep(places: Sequence[str]) -> None:
    """The quick checks: storage, versions, disk and clocks; one node is asked nothing.

    A cluster that asks for no token is warned of.

    Args:
        places: See `examine`.

    Raises:
        ClusterError: One of them failed; nothing has been computed.
    """
    nodes = alive_nodes()
    silent: dict[str, str] = {}
    with marked(places) as marks:
        reports, skews = [_here(marks)], {}
        if len(nodes) > 1:
            with probing(nodes) as probes:
                found, silent = _look(nodes, probes, marks, is_thorough=False)
                reports += found
                skews = measure_skews(nodes, probes, silent)
    auth = check_auth(authentication_mode())
    findings = [
        _answering(nodes, silent),
        check_storage(reports, places),
        check_versions(reports),
        check_disk(reports),
        check_clocks(skews),
        # A laptop's own Ray has a token; who turned that off is told, not stopped.
        auth if auth.verdict == "ok" else replace(auth, verdict="warning"),
    ]
    require_sound(findings)


def require_sound(findings: Sequence[Finding]) -> None:
    """Says what is doubtful, refuses what failed.

    Raises:
        ClusterError: See above.
    """
    for one in findings:
        if one.verdict == "warning":
            logger.warning("%s: %s", one.check, one.text)
    failed = [f"{one.check}: {one.text}" for one in findings if one.verdict == "failed"]
    if failed:
        more = "" if len(failed) == 1 else f" And {len(failed) - 1} more: {' '.join(failed[1:])}"
        raise ClusterError(f"{failed[0]}{more}")


def authentication_mode() -> str:
    """`token` or `disabled`, as this process talks to Ray."""
    # Private name: a test pins it. The environment does not say it where Ray started by itself.
    mode = _raylet.get_authentication_mode()  # type: ignore[attr-defined]
    is_on = mode != _raylet.AuthenticationMode.DISABLED  # type: ignore[attr-defined]
    return "token" if is_on else "disabled"


def alive_nodes() -> list[Node]:
    """The nodes of the cluster, this one first."""
    here = ray.get_runtime_context().get_node_id()
    found = [
        Node(
            id=one["NodeID"],
            name=f"{one['NodeManagerHostname']}/{one['NodeID'][:6]}",
            resources=one["Resources"],
        )
        for one in ray.nodes()
        if one["Alive"]
    ]
    return sorted(found, key=lambda one: (one.id != here, one.name))


@contextmanager
def probing(nodes: Sequence[Node]) -> Iterator[dict[str, Any]]:
    """An actor on each node for the length of a block, by the node's name."""
    actor = ray.remote(NodeProbe)
    probes = {
        one.name: actor.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(one.id, soft=False)
        ).remote()
        for one in nodes
    }
    try:
        yield probes
    finally:
        for probe in probes.values():
            ray.kill(probe)


@contextmanager
def marked(places: Sequence[str]) -> Iterator[dict[str, str]]:
    """Leaves a file in each place for the length of a block, for nodes to find.

    Yields:
        Their names by place; empty for a place that cannot be written to, as its check will say.
    """
    marks = {place: _try_mark(place) for place in places}
    try:
        yield marks
    finally:
        for place, mark in marks.items():
            if mark:
                remove_mark(place, mark)


def _try_mark(place: str) -> str:
    try:
        return leave_mark(place)
    except (OSError, ForgeError) as error:
        logger.debug("%s: %s", place, error)
        return ""


def _here(marks: Mapping[str, str]) -> NodeReport:
    return look(marks, name="driver", is_thorough=False)


def _look(
    nodes: Sequence[Node],
    probes: Mapping[str, Any],
    marks: Mapping[str, str],
    *,
    compiles: bool = False,
    is_thorough: bool = True,
) -> tuple[list[NodeReport], dict[str, str]]:
    """What the nodes say, and why those do not that do not."""
    asked = {
        one.name: probes[one.name].look.remote(
            dict(marks),
            name=one.name,
            object_store=int(one.resources.get("object_store_memory", 0)),
            gpus=int(one.resources.get("GPU", 0)),
            compiles=compiles,
            is_thorough=is_thorough,
        )
        for one in nodes
    }
    until = time.monotonic() + (_ANSWER_S if is_thorough else _QUICK_S)
    reports, silent = [], {}
    for name, answer in asked.items():
        found = _answer(answer, timeout_s=max(0.1, until - time.monotonic()))
        if isinstance(found, NodeReport):
            reports.append(found)
        else:
            silent[name] = found
    return reports, silent


def _answer(answer: Any, *, timeout_s: float) -> NodeReport | str:
    """A node's report, or why there is none."""
    try:
        return cast("NodeReport", ray.get(answer, timeout=timeout_s))
    except (RayError, ModuleNotFoundError) as error:
        return _last_line(error)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def measure_skews(
    nodes: Sequence[Node], probes: Mapping[str, Any], silent: dict[str, str]
) -> dict[str, float]:
    """Seconds by which clocks are surely off the driver's, whatever the way there took.

    Args:
        nodes: Of the cluster.
        probes: By node.
        silent: Why nodes do not answer, by node; those that are lost now are added.
    """
    skews = {}
    for one in nodes:
        if one.name in silent:
            continue
        probe = probes[one.name]
        try:
            skews[one.name] = min((_skew(probe) for _ in range(_PINGS)), key=abs)
        except RayError as error:
            silent[one.name] = _last_line(error)
    return skews


def _skew(probe: Any) -> float:
    before = time.time()
    there = float(ray.get(probe.clock.remote(), timeout=_QUICK_S))
    after = time.time()
    return sure_skew(before, there, after)


def sure_skew(before: float, there: float, after: float) -> float:
    """How far a clock is off that showed `there` between `before` and `after`; 0 in between."""
    return min(0.0, there - before) + max(0.0, there - after)


def _answering(nodes: Sequence[Node], silent: Mapping[str, str]) -> Finding:
    if not silent:
        text = f"{len(nodes)} nodes answer" if len(nodes) > 1 else "one node answers"
        return Finding(check="nodes", verdict="ok", text=text)
    what = "; ".join(f"{name}: {text}" for name, text in silent.items())
    return Finding(
        check="nodes",
        verdict="failed",
        text=f"every node must run a task of forge-ray, got {what}. See that node's raylet log "
        "and that forge-ray is installed there.",
    )
