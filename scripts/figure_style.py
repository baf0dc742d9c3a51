"""How the figures of the docs look; import it before pyplot."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "forge-ray",
        "figure.facecolor": "white",
    }
)
