"""Node-hours and money for a benchmark-sized log, from the figures of one measured size.

Every number that is no measurement is an assumption in `ASSUMED` and goes into the record.
"""

from __future__ import annotations

from typing import Any

from scaling.growth import READ_INTERACTIONS

NODE = "16 vCPU, 64 GiB (AWS m7i.4xlarge, us-east-1, on demand)"
ASSUMED: dict[str, float] = {
    "items": 250_000_000,
    "interactions": 14_000_000_000,
    "vector_dim": 512,
    "codebook_size": 8192,
    "levels": 3,
    "nodes": 16,
    "node_cpus": 16,
    "node_gib": 64,
    "node_usd_per_hour": 0.8064,
    "efficiency": 0.7,
    "measured_dim": 64,
    "measured_codebook": 1024,
}
"""`efficiency`: share of a node's CPU time that a stage puts to use; a core there is one here."""
# What one row of work costs more there, and whether all nodes share the stage or one does it. Fit
# works on a sample of the default size, 1 M vectors, at both ends: 122 for each code there.
_WIDER = ASSUMED["vector_dim"] / ASSUMED["measured_dim"]
_MORE_CODES = ASSUMED["codebook_size"] / ASSUMED["measured_codebook"]
_STAGES: dict[str, tuple[float, bool]] = {
    "index_and_order": (1.0, True),
    "cut": (1.0, True),
    "fit": (_WIDER * _MORE_CODES, False),
    "encode": (_WIDER * _MORE_CODES, True),
    "resolve": (1.0, False),
    "score": (1.0, False),
}
_SAMPLED = ("fit",)
# A GPU's work there: their time here says nothing of it, the memory of a process does.
_GPU_STAGES = ("train", "recommend")


def projection(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Hours, node-hours and USD of every CPU stage, and the first bottleneck.

    Args:
        runs: figures by growing size; each stage is taken from the largest that reached it.
    """
    measured = {name: run for run in runs for name in run["stages"]}
    rows = [
        {**_stage(name, measured[name]), **_memory(name, runs)}
        for name in _STAGES
        if name in measured
    ]
    short = [row for row in rows if _gib_of(row) > ASSUMED["node_gib"]]
    first = max(short or rows, key=_gib_of if short else lambda row: row["hours"])
    why = "memory of one node" if short else "time"
    held = [{"stage": name, **_memory(name, runs)} for name in _GPU_STAGES if name in measured]
    return {
        "assumed": {"node": NODE, **ASSUMED},
        "stages": rows,
        "memory_alone": held,
        "hours": round(sum(row["hours"] for row in rows), 1),
        "node_hours": round(sum(row["node_hours"] for row in rows), 1),
        "usd": round(sum(row["usd"] for row in rows), 2),
        "first_bottleneck": f"{first['stage']}: {why}",
    }


def _stage(name: str, run: dict[str, Any]) -> dict[str, Any]:
    (dearer, is_shared), grows_with = _STAGES[name], _grows_with(name)
    more = 1.0 if name in _SAMPLED else ASSUMED[grows_with] / run["rows"][grows_with]
    seen = run["stages"][name]
    core_s = seen["cpu_seconds"] * more * dearer
    nodes = ASSUMED["nodes"] if is_shared else 1
    cpus = nodes * ASSUMED["node_cpus"] * ASSUMED["efficiency"]
    hours = core_s / cpus / 3600
    return {
        "stage": name,
        "from_items": run["rows"]["items"],
        "grows_with": grows_with,
        "times_more_work": round(more * dearer, 1),
        "nodes": nodes,
        "hours": round(hours, 2),
        "node_hours": round(hours * nodes, 1),
        "usd": round(hours * nodes * ASSUMED["node_usd_per_hour"], 2),
    }


def _grows_with(name: str) -> str:
    if name in _SAMPLED:
        return "sample"
    return "interactions" if name in READ_INTERACTIONS else "items"


def _memory(name: str, runs: list[dict[str, Any]]) -> dict[str, float | None]:
    return {
        "driver_gib": _gib_there(name, runs, "driver_rss_mib"),
        "largest_worker_gib": _gib_there(name, runs, "largest_worker_own_mib"),
    }


def _gib_of(row: dict[str, Any]) -> float:
    return float(row["driver_gib"] or 0) + float(row["largest_worker_gib"] or 0)


def _gib_there(name: str, runs: list[dict[str, Any]], key: str) -> float | None:
    """Memory of a process on the straight line through two sizes; None where there is one.

    A stage on a sample stays as it is. Not counted: vectors are wider there.
    """
    seen = [run for run in runs if name in run["stages"]]
    points = [(run["rows"]["items"], run["stages"][name][key]) for run in seen]
    if len(points) == 1:
        return None
    (items_before, before), (items, mib) = points[-2:]
    slope = max(0.0, (mib - before) / max(1, items - items_before))
    more = 0.0 if name in _SAMPLED else slope * (ASSUMED["items"] - items)
    return round((mib + more) / 1024, 1)
