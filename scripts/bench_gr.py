"""Measures training and decoding of generators side by side with bare libraries: one run, one JSON.

Usage: python scripts/bench_gr.py [SECTION …] [--scale 0.1] [--threads 2] [--out FILE]

Sections are files of scripts/bench; how they run is described in scripts/bench_sid.py.
"""

from bench_sid import main

SECTIONS = ("gr_training", "gr_decoding", "gr_compile")

if __name__ == "__main__":
    main(__doc__, SECTIONS, "bench_gr.json")
