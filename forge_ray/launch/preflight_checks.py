"""What is wrong with a cluster, from what its nodes say; pure. Each fault says what to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from forge_ray.launch.preflight_node import NodeReport

Verdict = Literal["ok", "warning", "failed"]

MAX_SKEW_S = 5.0
"""Apart by more, leases (30 s) and signed requests of object stores come near their limits."""
_GIB = 1024**3
_MIN_FREE, _GOOD_FREE = 2 * _GIB, 10 * _GIB
_FULL = 0.95
"""Where Ray stops to place tasks on a node (`local_fs_capacity_threshold`)."""
_MIN_STORE = 256 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        verdict: `failed` stops a sweep, `warning` does not.
        text: What was found, and for a fault what to do.
    """

    check: str
    verdict: Verdict
    text: str


def check_nodes(
    reports: Sequence[NodeReport], *, places: Sequence[str], compiles: bool = False
) -> list[Finding]:
    """The checks that need what nodes say; the first report is the driver's own.

    Args:
        reports: At least one.
        places: What all nodes share.
        compiles: Whether the sweep sets `engine.compile`.
    """
    return [
        check_storage(reports, places),
        check_versions(reports),
        check_disk(reports),
        check_object_store(reports),
        check_gpus(reports),
        check_ops(reports, compiles=compiles),
        check_locks(reports),
    ]


def check_storage(reports: Sequence[NodeReport], places: Sequence[str]) -> Finding:
    """Whether every node reads and writes the same places."""
    broken = {one.name: one.storage for one in reports if one.storage}
    if not broken:
        return _ok("storage", f"{' and '.join(places)}: read and written from {_count(reports)}")
    return _failed(
        "storage",
        "--store and the sweep's folder must be usable from every node, got "
        f"{_by_text(broken)}. Give a folder that all nodes mount and may write to, or for --store "
        "a URI such as s3://… that the nodes' role or key may read and write.",
    )


def check_versions(reports: Sequence[NodeReport]) -> Finding:
    """Whether all nodes have the driver's versions."""
    here, *others = reports
    wrong = {}
    for one in others:
        different = [
            f"{name} {one.versions.get(name) or 'missing'} instead of {wanted or 'none'}"
            for name, wanted in here.versions.items()
            if one.versions.get(name, "") != wanted
        ]
        if different:
            wrong[one.name] = ", ".join(different)
    if wrong:
        return _failed(
            "versions",
            f"every node must have the driver's versions, got {_by_text(wrong)}. Use one image or "
            "one lock file (constraints.txt) everywhere.",
        )
    shown = ", ".join(f"{name} {one}" for name, one in here.versions.items() if one)
    return _ok("versions", shown)


def check_disk(reports: Sequence[NodeReport]) -> Finding:
    """Whether nodes have room for checkpoints, spilled objects and logs."""
    full = {
        one.name: f"{one.disk_free / _GIB:.1f} GiB free"
        for one in reports
        if one.disk_free < _MIN_FREE or one.disk_free < (1 - _FULL) * one.disk_size
    }
    if full:
        return _failed(
            "disk",
            f"the disk of temporary files must have {_MIN_FREE // _GIB} GiB free and be less than "
            f"{_FULL:.0%} full, got {_by_text(full)}. Free some, or start Ray with --temp-dir on a "
            "larger disk.",
        )
    low = {
        one.name: f"{one.disk_free / _GIB:.1f} GiB free"
        for one in reports
        if one.disk_free < _GOOD_FREE
    }
    if low:
        return _warning("disk", f"{_by_text(low)}: enough for small models only. Free some.")
    least = min(one.disk_free for one in reports)
    return _ok("disk", f"at least {least / _GIB:.0f} GiB free on {_count(reports)}")


def check_object_store(reports: Sequence[NodeReport]) -> Finding:
    """Whether Ray's object stores hold what a stage streams through them."""
    sized = [one for one in reports if one.object_store]
    small = {
        one.name: f"{one.object_store / 1024**2:.0f} MiB"
        for one in sized
        if one.object_store < _MIN_STORE
    }
    if small:
        return _warning(
            "object store",
            f"{_by_text(small)}: data will be spilled to disk. Start Ray with a larger "
            "--object-store-memory (containers: a larger /dev/shm).",
        )
    if not sized:
        return _ok("object store", "not looked at: no Ray is up")
    least = min(one.object_store for one in sized)
    return _ok("object store", f"at least {least / _GIB:.1f} GiB on {_count(sized)}")


def check_gpus(reports: Sequence[NodeReport]) -> Finding:
    """Whether torch sees the GPUs that nodes offer."""
    nodes = [(one.name, one.gpus) for one in reports if one.gpus is not None]
    blind = {
        name: gpus.error or f"{gpus.seen} of {gpus.asked} GPUs seen"
        for name, gpus in nodes
        if gpus.error or gpus.seen < gpus.asked
    }
    if blind:
        return _failed(
            "GPUs",
            f"torch must see the GPUs that a node offers to Ray, got {_by_text(blind)}. Check the "
            "driver (nvidia-smi), the container's GPU access and that torch is built for CUDA.",
        )
    seen = sum(gpus.seen for _, gpus in nodes)
    return _ok("GPUs", f"{seen} seen on {len(nodes)} nodes" if nodes else "none is offered")


def check_ops(reports: Sequence[NodeReport], *, compiles: bool) -> Finding:
    """Whether what a training compiles can be compiled.

    DeepSpeed itself compiles nothing for our trainings: the optimiser is torch's own, and its
    shared-memory op is off (see `forge_ray.gr.engine`).

    Args:
        reports: Of the nodes.
        compiles: Whether the sweep sets `engine.compile`.
    """
    if not compiles:
        return _ok("compiled ops", "none is needed: trainings take torch's own optimiser")
    lacking = {one.name: one.compiler for one in reports if one.compiler}
    if lacking:
        return _failed("compiled ops", _by_text(lacking))
    return _ok("compiled ops", f"gr.engine.compile finds a compiler on {_count(reports)}")


def check_locks(reports: Sequence[NodeReport]) -> Finding:
    """Whether a build of a torch extension is under way, or was left half-done; none is ours."""
    held = {one.name: ", ".join(one.locks.held) for one in reports if one.locks.held}
    if held:
        return _warning(
            "build locks",
            f"{_by_text(held)}: whoever builds the same extension waits for them. If nobody builds "
            "there, remove them; on a network disk set TORCH_EXTENSIONS_DIR to a local one.",
        )
    cleared = {one.name: ", ".join(one.locks.cleared) for one in reports if one.locks.cleared}
    if cleared:
        return _ok("build locks", f"removed, as nobody held them: {_by_text(cleared)}")
    return _ok("build locks", "none")


def check_clocks(skews: Mapping[str, float]) -> Finding:
    """Whether clocks agree.

    Args:
        skews: Seconds by node that its clock is surely off the driver's.
    """
    off = {name: f"{skew:+.1f} s" for name, skew in skews.items() if abs(skew) > MAX_SKEW_S}
    if off:
        return _failed(
            "clocks",
            f"clocks must agree within {MAX_SKEW_S:g} s, got {_by_text(off)}. Run an NTP client "
            "(chrony, systemd-timesyncd) on every node.",
        )
    most = max((abs(one) for one in skews.values()), default=0.0)
    return _ok("clocks", f"within {most:.1f} s" if skews else "one node")


def check_auth(mode: str) -> Finding:
    """Whether the cluster asks for a token."""
    if mode == "token":
        return _ok("auth", "token authentication is on")
    return _failed(
        "auth",
        f"RAY_AUTH_MODE must be token, got {mode}: whoever reaches the cluster's ports runs code "
        "on it. Run `ray get-auth-token --generate`, set RAY_AUTH_MODE=token on every node and "
        "start the cluster again.",
    )


def _by_text(found: Mapping[str, str]) -> str:
    """`text (node, node)`, one part per text: a thousand nodes with one fault are one line."""
    nodes: dict[str, list[str]] = defaultdict(list)
    for name, text in found.items():
        nodes[text].append(name)
    return "; ".join(f"{text} ({_some(names)})" for text, names in nodes.items())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _count(reports: Sequence[NodeReport]) -> str:
    return f"{len(reports)} nodes" if len(reports) > 1 else "this node"


def _ok(check: str, text: str) -> Finding:
    return Finding(check=check, verdict="ok", text=text)


def _warning(check: str, text: str) -> Finding:
    return Finding(check=check, verdict="warning", text=text)


def _failed(check: str, text: str) -> Finding:
    return Finding(check=check, verdict="failed", text=text)
