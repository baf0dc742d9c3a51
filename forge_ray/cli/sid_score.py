"""`forge-ray sid score`: the cheap metrics of SID tables, ours or anyone's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    ConfigFile,
    StoreUri,
    Verbose,
    emit,
    open_store,
    stderr,
    stdout,
    working,
)
from forge_ray.cli.inputs import open_data
from forge_ray.cli.score_view import comparison
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.launch.connect import connected
from forge_ray.sid.score import (
    Control,
    ScoreConfig,
    ScoreInputs,
    ScoreSplit,
    control_table,
    load_inputs,
    score_sids,
    score_table,
)
from forge_ray.sid.storage import open_sids
from forge_ray.sid.table import SidTable


def score(
    tables: Annotated[
        list[str],
        typer.Argument(
            help="SID tables: .npz files with `item_id` and `codes`, or stored `sids/…` references;"
            " key=value items override the scoring configuration."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Prepared dataset or folder of raw files; stored tables know their own."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="validation or test. Default: test for .npz files, the form in which published "
            "tables are compared; validation for stored tables, the form that selects."
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            help="Add two rows for each table: its rows shuffled, and random SIDs with its bucket "
            "sizes. What they reach without meaning, a table earns nothing by reaching."
        ),
    ] = False,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score SID tables: collisions, levels, reconstruction, neighbours and behaviour."""
    names = [name for name in tables if not _is_override(name)]
    overrides = [name for name in tables if _is_override(name)]
    settings = load_config(ScoreConfig, path=config, overrides=overrides)
    if not names:
        raise ConfigError("tables must name at least one table, got none. Add .npz files or refs.")
    where = open_store(store)
    dataset = None if data is None else open_data(data, where, verbose=verbose)
    which: tuple[Control | None, ...] = (None, "shuffled", "random") if controls else (None,)
    rows: list[dict[str, Any]] = []
    inputs: ScoreInputs | None = None
    with _ray_for(settings, verbose=verbose), working(f"scoring {len(names)} tables"):
        for name in names:
            if not name.endswith(".npz"):
                rows += _score_stored(
                    name, dataset, _split(split, "validation"), settings, where, which
                )
                continue
            known = _known(dataset, name)
            if inputs is None:  # the same for all foreign tables
                inputs = load_inputs(
                    known, split=_split(split, "test"), config=settings, store=where
                )
            rows += _score_foreign(name, known, inputs, settings, which)
    _show(rows, as_json=as_json)


def _ray_for(config: ScoreConfig, *, verbose: bool) -> AbstractContextManager[object]:
    """A Ray for galleries of several shards; starting one takes longer than a single search."""
    is_sharded = config.hitrate_gallery > config.hitrate_shard
    return connected(verbose=verbose) if is_sharded else nullcontext()


def _known(dataset: Dataset | None, name: str) -> Dataset:
    if dataset is None:
        raise ConfigError(
            f"--data must name the dataset of {name}, got nothing. "
            "Add --data with a prepared dataset or a folder of raw files."
        )
    return dataset


def _score_foreign(
    name: str,
    dataset: Dataset,
    inputs: ScoreInputs,
    config: ScoreConfig,
    controls: Sequence[Control | None],
) -> list[dict[str, Any]]:
    table = SidTable.from_npz(name, dataset.item_ids())
    rows = []
    for control in controls:
        scored = table if control is None else control_table(table, control, seed=config.seed)
        scores = score_table(scored, dataset, config=config, inputs=inputs)
        rows.append(_labelled(Path(name).stem, name, control, scores))
    return rows


def _score_stored(
    name: str,
    dataset: Dataset | None,
    split: ScoreSplit,
    config: ScoreConfig,
    store: ArtifactStore,
    controls: Sequence[Control | None],
) -> list[dict[str, Any]]:
    sids = open_sids(store, name)
    own = sids.artifact.manifest.parents[1]
    if dataset is None:
        dataset = Dataset.open(store, own)
    elif dataset.key != own:
        raise ConfigError(
            f"--data must be the dataset {own[:12]} that {name} was fitted on, got "
            f"{dataset.key[:12]}. Leave --data out."
        )
    rows = []
    for control in controls:
        found = score_sids(sids, dataset, store, config, split=split, control=control)
        scores = dict(found.manifest.metrics)
        rows.append(_labelled(sids.artifact.manifest.ref, sids.artifact.uri, control, scores))
    return rows


def _labelled(
    table: str, path: str, control: Control | None, scores: dict[str, Any]
) -> dict[str, Any]:
    name = table if control is None else f"{table} ({control})"
    return {"table": name, "path": path, "control": control, **scores}


def _split(asked: str | None, default: ScoreSplit) -> ScoreSplit:
    if asked is None:
        return default
    if asked == "validation":
        return "validation"
    if asked == "test":
        return "test"
    raise ConfigError(f"--split must be validation or test, got {asked!r}. Name one of them.")


def _is_override(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and name.replace(".", "_").isidentifier()


def _show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        emit(rows, title="", as_json=True)
        return
    for table in comparison(rows, width=stdout.width):
        stdout.print(table)
    if any(row["split"] == "test" for row in rows):
        stderr.print(
            "Rows of split [bold]test[/] are for comparison with published tables; select on "
            "--split validation."
        )
