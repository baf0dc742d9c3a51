"""`forge-ray sid extend`: a published table and a grown dataset in, a table that keeps it out."""

from __future__ import annotations

import json

import numpy as np
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.sid import app
from forge_ray.sid.storage import open_sids
from tests.sid.test_extend import dataset, fitted


def test_extend_prints_who_is_old_new_and_gone(store: ArtifactStore) -> None:
    sids = fitted(store, "resolver.kind=knn_cap", "resolver.cap=2")
    grown = dataset(store, np.arange(50, 300), "grown")
    words = ["extend", sids.artifact.manifest.ref, grown.key, "--store", store.uri, "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["kept"], shown["new"], shown["gone"], shown["items"]) == (200, 50, 50, 250)
    assert shown["extends"] == sids.artifact.manifest.ref
    table = open_sids(store, shown["table"])
    assert np.array_equal(table.table.codes[:200], sids.table.codes[50:])
    command = table.artifact.manifest.command.split()
    assert command[:3] == ["forge-ray", "sid", "extend"]
    again = CliRunner().invoke(app, [*command[2:], "--store", store.uri, "--json"])
    assert json.loads(again.stdout)["table"] == shown["table"]
    assert "stored at" in CliRunner().invoke(app, words[:-1]).stderr
