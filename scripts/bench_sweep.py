"""Measures what a sweep costs beside its trials: a gate decision, and trials that do nothing.

Usage: python scripts/bench_sweep.py [SECTION …] [--scale 0.1] [--threads 2] [--out FILE]

Sections are files of scripts/bench; how they run is described in scripts/bench_sid.py.
"""

from bench_sid import main

SECTIONS = ("gate_decision", "overhead")

if __name__ == "__main__":
    main(__doc__, SECTIONS, "bench_sweep.json")
