"""What is wrong with a cluster, planted in what its nodes say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from forge_ray.errors import ClusterError
from forge_ray.launch.preflight import logger, require_sound, sure_skew
from forge_ray.launch.preflight_checks import (
    Finding,
    check_auth,
    check_clocks,
    check_nodes,
)
from forge_ray.launch.preflight_node import Gpus, Locks, NodeReport

GIB = 1024**3
SOUND = NodeReport(
    name="driver",
    versions={"python": "3.11.7", "ray": "2.60.0", "torch": "2.9.0"},
    storage="",
    disk_free=50 * GIB,
    disk_size=100 * GIB,
    object_store=2 * GIB,
)


def examined(*changes: dict[str, Any], **options: Any) -> dict[str, Finding]:
    """Findings by check, of a sound driver and one node per change."""
    nodes = [
        dataclasses.replace(SOUND, name=f"node{place}", **change)
        for place, change in enumerate(changes)
    ]
    found = check_nodes([SOUND, *nodes], places=["/data/store"], **options)
    return {one.check: one for one in found}


def test_a_sound_cluster_passes_every_check() -> None:
    found = examined({}, {"gpus": Gpus(asked=2, seen=2)})
    assert {one.verdict for one in found.values()} == {"ok"}
    assert found["GPUs"].text == "2 seen on 1 nodes"


@pytest.mark.parametrize(
    ("change", "check", "verdict", "said"),
    [
        ({"storage": "Permission denied"}, "storage", "failed", "Permission denied (node0)"),
        (
            {"versions": {**SOUND.versions, "ray": "2.59.0", "torch": ""}},
            "versions",
            "failed",
            "ray 2.59.0 instead of 2.60.0, torch missing instead of 2.9.0 (node0)",
        ),
        ({"disk_free": GIB}, "disk", "failed", "1.0 GiB free (node0)"),
        ({"disk_free": 4 * GIB, "disk_size": 100 * GIB}, "disk", "failed", "95% full"),
        ({"disk_free": 6 * GIB, "disk_size": 90 * GIB}, "disk", "warning", "6.0 GiB free (node0)"),
        ({"object_store": 100 * 1024**2}, "object store", "warning", "100 MiB (node0)"),
        ({"gpus": Gpus(asked=8, seen=7)}, "GPUs", "failed", "7 of 8 GPUs seen (node0)"),
        ({"gpus": Gpus(asked=1, error="no driver")}, "GPUs", "failed", "no driver (node0)"),
        ({"locks": Locks(held=("/x/lock",))}, "build locks", "warning", "/x/lock (node0)"),
        ({"locks": Locks(cleared=("/x/lock",))}, "build locks", "ok", "removed"),
    ],
)
def test_a_planted_fault_is_found_and_says_where(
    change: dict[str, Any], check: str, verdict: str, said: str
) -> None:
    found = examined(change)
    assert found[check].verdict == verdict
    assert said in found[check].text
    assert {name for name, one in found.items() if one.verdict != "ok"} <= {check}
    if verdict == "failed":
        assert found[check].text.endswith(".")  # what to do


def test_a_compiler_is_wanted_by_sweeps_that_compile() -> None:
    change = {"compiler": "engine.compile must be false, got true. Install one."}
    assert examined(change)["compiled ops"].verdict == "ok"
    assert examined(change, compiles=True)["compiled ops"].verdict == "failed"
    assert examined({}, compiles=True)["compiled ops"].verdict == "ok"


def test_many_nodes_with_one_fault_are_one_line() -> None:
    text = examined(*[{"storage": "Permission denied"}] * 100)["storage"].text
    assert "Permission denied (node0, node1, node2 and 97 more)" in text
    assert "a folder that all nodes mount" in text


def test_clocks() -> None:
    assert check_clocks({"a": 0.2, "b": -4.9}).verdict == "ok"
    late = check_clocks({"a": 0.0, "b": -8.0, "c": 61.0})
    assert late.verdict == "failed"
    assert "-8.0 s (b); +61.0 s (c)" in late.text
    assert "NTP" in late.text


@pytest.mark.parametrize(
    ("there", "skew"), [(99.0, -1.0), (100.0, 0.0), (104.0, 0.0), (105.0, 0.0), (111.5, 6.5)]
)
def test_a_slow_answer_is_no_skew(there: float, skew: float) -> None:
    assert sure_skew(100.0, there, 105.0) == skew


def test_auth() -> None:
    assert check_auth("token").verdict == "ok"
    off = check_auth("disabled")
    assert off.verdict == "failed"
    assert "ray get-auth-token --generate" in off.text


def test_failures_stop_a_sweep_and_warnings_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *words: said.append(text % words))
    require_sound([Finding(check="disk", verdict="warning", text="little.")])
    assert said == ["disk: little."]
    failed = [Finding(check=name, verdict="failed", text=f"{name}!") for name in ("a", "b")]
    with pytest.raises(ClusterError, match=r"^a: a! And 1 more: b: b!$"):
        require_sound(failed)
