"""What `gr stages` and `gr converge` say before they train; the chain is tested in tests/gr."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.gr import app
from tests.data.test_chain import prepared


@pytest.mark.parametrize("command", [["stages"], ["converge", "--old", "no", "--new", "no"]])
def test_stages_are_shown_by_the_numbers_that_count(
    store: ArtifactStore, command: list[str]
) -> None:
    first, second = prepared(store, (3, 4))
    done = CliRunner().invoke(app, [*command, second, "--store", store.uri])
    assert done.exit_code != 0
    assert f"stages: 1 toy-s3-{first[:12]}, 2 toy-s4-{second[:12]}\n" in done.output
