"""What all figures share: colours that read on light and dark paper, and the way into the page.

Paper, text and grid have no colour here: the page's script sets them from its CSS variables, at
load and whenever the reader's colour scheme changes. Names reach plotly as text, but plotly reads
some tags in labels, so they are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup

from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.space import label_point

GREEN, AMBER, RED, GRAY, BLUE = "#2e9d78", "#d98e04", "#d4574a", "#8a929a", "#4a86c8"
STAGE_COLORS = {
    "fit": "#9cc3e6",
    "score": BLUE,
    "train": GREEN,
    "evaluate": "#a9cf9f",
    "cluster": GRAY,
}
SCALE = ((0.0, "#7a6fd0"), (0.5, "#2f9fb0"), (1.0, "#e0a030"))
"""Low to high, middle tones throughout."""
MAX_DRAWN = 200
"""Trials in a figure of one mark per trial; more are unreadable and slow on a phone."""


def name_of(record: TrialRecord) -> str:
    """A trial in a hover label."""
    return html.escape(f"trial {record.number + 1}: {label_point(record.point)}")


def fragment(
    figure: go.Figure,
    *,
    says: str,
    height: int,
    x: str = "",
    y: str = "",
    title: str = "",
    width: int = 0,
    margin: tuple[int, int] = (14, 16),
) -> Markup:
    """A figure for the page: a card that scrolls where it is wider than the page.

    Args:
        figure: The figure.
        says: What it shows, in words, for those who do not see it, and as its caption.
        height: Pixels.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        title: Title above; long ones wrap.
        width: Least width in pixels; 0 takes the page's.
        margin: Least pixels above and at the sides.
    """
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": max(56, margin[1]), "r": margin[1], "t": margin[0], "b": 46},
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(title=html.escape(x), automargin=True, zeroline=False)
    figure.update_yaxes(title=html.escape(y), automargin=True, zeroline=False)
    options = {"displayModeBar": False, "responsive": True}
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config=options, default_width="100%"
    )
    head = Markup("<h3>{}</h3>").format(title) if title else Markup("")
    return Markup(
        '<figure class="card">{}<div class="scroll" tabindex="0"><div role="img" aria-label="{}" '
        'style="min-width:{}px">{}</div></div><figcaption>{}</figcaption></figure>'
    ).format(head, says, width, Markup(drawn), says)


def capped(records: Sequence[TrialRecord], first: Sequence[TrialRecord] = ()) -> list[TrialRecord]:
    """At most `MAX_DRAWN` trials: those of `first`, then evenly spread over the rest."""
    if len(records) <= MAX_DRAWN:
        return list(records)
    kept = {one.key for one in first[: MAX_DRAWN // 2]}
    rest = [one for one in records if one.key not in kept]
    room = MAX_DRAWN - len(kept)
    kept |= {rest[int(place * len(rest) / room)].key for place in range(room)}
    return [one for one in records if one.key in kept]


def drawn_of(num_drawn: int, num_all: int) -> str:
    """A sentence where a figure leaves trials out, else nothing."""
    return "" if num_drawn == num_all else f" Drawn: {num_drawn} of {num_all}."
