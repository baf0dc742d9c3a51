"""`forge-ray sid score`: the cheap metrics of SID tables, ours or anyone's."""

from __future__ import annotations

from collections.abc import Sequence
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
    working,
)
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.sid.score import ScoreConfig, ScoreSplit, load_inputs, score_sids, score_table
from forge_ray.sid.storage import open_sids
from forge_ray.sid.table import SidTable

_COLUMNS = {
    "table": "table",
    "split": "split",
    "uniqueness": "unique",
    "gini": "gini",
    "embedding_hitrate": "hitrate",
    "embedding_hitrate_variant": "of",
    "embedding_hitrate_raw": "raw",
    "backoff_bits": "bits",
    "backoff_bits_shuffled": "shuffled",
    "backoff_gain": "gain",
}
"""Scores in the table for people, with the heading that fits a terminal; --json has them all."""


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
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score SID tables by symbol statistics, embedding hitrate and prefix-backoff bits."""
    names = [name for name in tables if not _is_override(name)]
    overrides = [name for name in tables if _is_override(name)]
    settings = load_config(ScoreConfig, path=config, overrides=overrides)
    if not names:
        raise ConfigError("tables must name at least one table, got none. Add .npz files or refs.")
    where = open_store(store)
    foreign = [name for name in names if name.endswith(".npz")]
    stored = [name for name in names if not name.endswith(".npz")]
    dataset = None if data is None else open_data(data, where, verbose=verbose)
    rows: dict[str, dict[str, Any]] = {}
    with working(f"scoring {len(names)} tables"):
        if foreign:
            rows |= _score_foreign(foreign, dataset, _split(split, "test"), settings)
        for name in stored:
            rows[name] = _score_stored(name, dataset, _split(split, "validation"), settings, where)
    _show([rows[name] for name in names], as_json=as_json)


def _score_foreign(
    names: Sequence[str], dataset: Dataset | None, split: ScoreSplit, config: ScoreConfig
) -> dict[str, dict[str, Any]]:
    if dataset is None:
        raise ConfigError(
            f"--data must name the dataset of {names[0]}, got nothing. "
            "Add --data with a prepared dataset or a folder of raw files."
        )
    item_ids = dataset.item_ids()
    loaded = {name: SidTable.from_npz(name, item_ids) for name in names}
    inputs = load_inputs(dataset, split=split, config=config)
    return {
        name: {
            "table": Path(name).stem,
            "path": name,
            **score_table(table, dataset, config=config, inputs=inputs),
        }
        for name, table in loaded.items()
    }


def _score_stored(
    name: str,
    dataset: Dataset | None,
    split: ScoreSplit,
    config: ScoreConfig,
    store: ArtifactStore,
) -> dict[str, Any]:
    sids = open_sids(store, name)
    own = sids.artifact.manifest.parents[1]
    if dataset is None:
        dataset = Dataset.open(store, own)
    elif dataset.key != own:
        raise ConfigError(
            f"--data must be the dataset {own[:12]} that {name} was fitted on, got "
            f"{dataset.key[:12]}. Leave --data out."
        )
    scores = score_sids(sids, dataset, store, config, split=split)
    return {"table": sids.artifact.manifest.ref, "path": sids.artifact.uri, **scores}


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
    shown = [{head: row[name] for name, head in _COLUMNS.items()} for row in rows]
    # One table reads better down than across.
    emit(shown if len(shown) > 1 else shown[0], title="SID scores", as_json=False)
    if any(row["split"] == "test" for row in rows):
        stderr.print(
            "Rows of split [bold]test[/] are for comparison with published tables; select on "
            "--split validation."
        )
