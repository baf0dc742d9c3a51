"""The whole path at growing sizes through the command line: time, memory and how both grow.

Usage: python scripts/scale.py FOLDER [--sizes 1000000x1000000,1000000x10000000,10000000x100000000]
       [--window 0] [--kill] [--report]                                             prints JSON

For each size (items x interactions): generate, prepare, fit, encode, resolve, score, stream to a
trainer, recommend. Every stage that ends is written to FOLDER/SIZE/figures.json at once, and the
same command goes on with the next one. With --kill every command is killed with SIGKILL, whole
process tree, at work in each stage; the same command then continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import revision
from scaling.cluster import projection
from scaling.growth import growth
from scaling.plan import CLI, PYTHON, Size, measured, plan
from scaling.watching import Peaks, Stage, Watch

SIZES = "1000000x1000000,1000000x10000000,10000000x100000000"
BASELINE_ROWS = 10_000_000


def main() -> None:
    """Runs what is not done yet, and prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default=SIZES, help="ITEMSxINTERACTIONS, by growing size")
    parser.add_argument("--window", type=int, default=0, help="of pairs; 0 counts none")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    sizes = [Size(*map(int, one.split("x"))) for one in given.sizes.split(",")]
    folders = [given.folder.resolve() / size.name for size in sizes]
    if not given.report:
        for folder, size in zip(folders, sizes, strict=True):
            run_size(folder, size, given.window, kill=given.kill)
    runs = [{**json.loads((one / "figures.json").read_text()), **measured(one)} for one in folders]
    grown = growth(runs)
    print(json.dumps({"sizes": runs, "growth": grown, "projection": projection(runs)}))


def run_size(folder: Path, size: Size, window: int, *, kill: bool) -> None:
    """Run the commands of one size that are not done."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else new_figures(folder, size, window)
    for command, stages in plan(folder, size, window):
        if not all(stage.name in figures["stages"] for stage in stages):
            figures["stages"] |= watch(folder, command, stages, kill=kill)
            file.write_text(json.dumps(figures, indent=1))
        if stages[0].name == "synthesize" and "arrow" not in figures:
            figures["arrow"] = arrow(folder / "raw")
            file.write_text(json.dumps(figures, indent=1))


def new_figures(folder: Path, size: Size, window: int) -> dict[str, Any]:
    """The head of a size's figures, with what it costs to start a command and its Ray."""
    watch, target = Watch(), folder / f"start-{time.time_ns()}"
    words = ["data", "synthesize", str(target), "num_items=64", "num_users=64"]
    stage = Stage("start", 0, "", is_done=lambda: False, is_at_work=lambda: False)
    watch.run([*CLI, *words], [stage], folder / "commands.log")
    seen = watch.peaks["start"].figures()
    head = {"items": size.items, "interactions_asked": size.interactions, "window": window}
    start = {"start_s": seen["seconds"], "start_cpu_s": seen["cpu_seconds"]}
    return {**head, **start, "stages": {}}


def watch(folder: Path, command: list[str], stages: list[Stage], *, kill: bool) -> dict[str, Any]:
    """Run one command to its end; a row for each of its stages, by name."""
    seen, targets = Watch.of(folder / "seen.json"), [one.name for one in stages] if kill else []
    try:
        while not seen.run(command, stages, folder / "commands.log", targets=targets):
            print(f"killed in {seen.killed[-1]}; the same command again", file=sys.stderr)
    finally:  # an interrupted command's stages are not repeated: what was seen of them stays
        seen.save(folder / "seen.json")
    rows = {}
    for stage in stages:
        peaks = seen.peaks.get(stage.name, Peaks())  # nothing where it was too short to be seen
        rate = round(stage.rows / peaks.seconds) if peaks.seconds else None
        row = {"rows": stage.rows, "unit": stage.unit, "rows_per_s": rate, **peaks.figures()}
        rows[stage.name] = {**row, "killed": stage.name in seen.killed, "revision": revision()}
        print(folder.name, stage.name, json.dumps(rows[stage.name]), file=sys.stderr, flush=True)
    return rows


def arrow(raw: Path) -> dict[str, Any]:
    """The yardstick of `prepare`, in a process of its own."""
    script = Path(__file__).parent / "scaling" / "arrow_baseline.py"
    command = [PYTHON, str(script), str(raw), str(BASELINE_ROWS)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, text=True))
    return found


if __name__ == "__main__":
    main()
