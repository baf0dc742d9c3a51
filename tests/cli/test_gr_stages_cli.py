"""What `gr stages` and `gr converge` say before they train; the chain is tested in tests/gr."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.gr import app
from forge_ray.cli.gr_stages import sid_variant
from forge_ray.data.schema import Dataset
from tests.data.test_chain import prepared


@pytest.mark.parametrize("command", [["stages"], ["converge", "--old", "no", "--new", "no"]])
def test_stages_are_shown_by_the_numbers_that_count(
    store: ArtifactStore, command: list[str]
) -> None:
    first, second = prepared(store, (3, 4))
    done = CliRunner().invoke(app, [*command, second, "--store", store.uri])
    assert done.exit_code != 0
    assert f"stages: 1 toy-s3-{first[:12]}, 2 toy-s4-{second[:12]}\n" in done.output


def test_a_file_of_sids_is_found_from_the_folder_of_a_trial(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = Dataset.open(store, prepared(store, (3, 4))[0])
    sent = pickle.dumps(sid_variant("mine.npz", first, store))
    os.chdir("/")
    assert pickle.loads(sent).source == tmp_path / "mine.npz"
