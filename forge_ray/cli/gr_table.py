"""How item-level figures are printed: one line per metric, one column per row of the comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from forge_ray.cli.console import emit

if TYPE_CHECKING:
    from forge_ray.evaluate.config import EvaluationConfig

FAMILIES = ("ItemHit", "ItemNDCG", "HR", "ListNDCG", "SidHit")
SLICES = ("head", "tail", "cold")

Boards = Mapping[str, Mapping[str, float]]


def emit_rows(boards: Boards, dataset: str, config: EvaluationConfig, *, as_json: bool) -> None:
    """Prints one table, or a JSON list of rows.

    Args:
        boards: figures by the name of the row.
        dataset: name, for the title.
        config: what was measured.
        as_json: JSON instead of a table.
    """
    if as_json:
        rows = [{"model": name, "split": config.split, **found} for name, found in boards.items()]
        emit(rows, title="", as_json=True)
        return
    emit(lines(boards, config.ks), title=title(boards, dataset, config.split), as_json=False)


def title(boards: Boards, dataset: str, split: str) -> str:
    """Heading of a table."""
    users = int(next(iter(boards.values()))["users"])
    return f"{dataset}, {split} split, {users:,} users"


def lines(boards: Boards, ks: Sequence[int]) -> list[dict[str, Any]]:
    """One line per metric, one column per row.

    Args:
        boards: figures by the name of the row.
        ks: cut-offs.
    """
    middle = middle_cut(ks)
    names = [f"{family}@{k}" for family in FAMILIES for k in sorted(ks)]
    names += [f"{family}@{middle}/{part}" for family in FAMILIES[:2] for part in SLICES]
    names += [f"coverage@{k}" for k in sorted(ks)]
    names += ["invalid_rate", "short_rate", *(f"users/{part}" for part in SLICES), "users_per_s"]
    table: list[dict[str, Any]] = []
    for name in names:
        table.append({"metric": name, **_cells(boards, name)})
        if name in (f"ItemHit@{middle}", f"ItemNDCG@{middle}"):
            table.append({"metric": f"{name} 95 %", **_intervals(boards, name)})
    # Figures of SIDs say nothing where no row ranks SIDs.
    return [line for line in table if any(line[board] is not None for board in boards)]


def middle_cut(ks: Sequence[int]) -> int:
    """The cut-off of figures shown for one only: 10 where it was measured."""
    return 10 if 10 in ks else min(ks)


def _cells(boards: Boards, name: str) -> dict[str, float | None]:
    return {board: found.get(name) for board, found in boards.items()}


def _intervals(boards: Boards, name: str) -> dict[str, str | None]:
    return {
        board: f"{found[f'{name}_low']:.4f}–{found[f'{name}_high']:.4f}"
        if f"{name}_low" in found
        else None
        for board, found in boards.items()
    }


@contextmanager
def workers(config: EvaluationConfig, *, verbose: bool) -> Iterator[None]:
    """Ray for the length of a block, where an evaluation asks for more than this process."""
    if config.num_workers == 1:
        yield
        return
    from forge_ray.launch.connect import connected

    with connected(verbose=verbose):
        yield
