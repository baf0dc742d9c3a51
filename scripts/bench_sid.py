"""Measures SID building side by side with bare libraries: one run, one machine, one JSON.

Usage: python scripts/bench_sid.py [SECTION …] [--scale 0.1] [--threads 2] [--out FILE]

Each section is a file of scripts/bench with `run(scale) -> dict`, and runs in its own process, so
that its threads and its peak memory are its own. Figures of sections that are not run are kept.
Run it on a quiet machine; `load` says how quiet it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from record import PACKAGES, ROOT, revision

BENCH = Path(__file__).parent / "bench"
SECTIONS = ("encode", "fit", "symbols", "hitrate", "rq_vae", "resolvers")


def main(doc: str, sections: tuple[str, ...], out: str) -> None:
    """Runs the sections asked for and writes the record.

    Args:
        doc: of the script.
        sections: its files of scripts/bench.
        out: the record's name in docs/results.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=sections, help=", ".join(sections))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full problem sizes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / out)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(run_here(given.sections[0], given.scale, given.threads)))
        return
    record = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for name in given.sections:
        record[name] = run_apart(name, given.scale, given.threads)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(record[name]['result'], indent=1)}", flush=True)


def run_here(name: str, scale: float, threads: int) -> dict[str, object]:
    """One section in this process."""
    import torch

    from forge_ray.threads import set_threads

    set_threads(threads)
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    if spec is None or spec.loader is None or not (BENCH / f"{name}.py").is_file():
        names = ", ".join(sorted(path.stem for path in BENCH.glob("*.py")))
        sys.exit(f"section must be one of {names}, got {name!r}. Check its name.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses of a module look their annotations up here.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    start = time.perf_counter()
    result = module.run(scale)
    return {
        "result": result,
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
    }


def run_apart(name: str, scale: float, threads: int) -> dict[str, object]:
    """One section in a fresh process, with what is needed to repeat it."""
    import importlib.metadata

    load = os.getloadavg()[0]
    command = [sys.executable, __file__, name, f"--scale={scale}", f"--threads={threads}"]
    paths = os.pathsep.join([str(ROOT), str(BENCH.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    done = subprocess.run(
        [*command, "--inside"], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "scale": scale,
        "threads": threads,
        "load": round(load, 2),
        "revision": revision(),
        "versions": {one: importlib.metadata.version(one) for one in PACKAGES},
    }


def processor() -> str:
    """The model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else 'CPU'}"


if __name__ == "__main__":
    main(__doc__, SECTIONS, "bench_sid.json")
