"""`gr train --config` by the name of a recipe; what happens before any work is done."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from forge_ray.cli.gr import app
from forge_ray.errors import ConfigError
from forge_ray.gr.recipes import recipe_names


def train(*words: str) -> BaseException | None:
    return CliRunner().invoke(app, ["train", "no-such-table", *words]).exception


def test_help_lists_the_recipes():
    # As wide as any name, so that none is broken over two lines.
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "160"}).stdout
    assert all(name in text for name in recipe_names())


def test_an_unknown_recipe_is_refused():
    error = train("--config", "forge_t5_bas")
    assert isinstance(error, ConfigError)
    assert "Did you mean 'forge_t5_base'?" in str(error)


@pytest.mark.parametrize("name", recipe_names())
def test_overrides_stand_above_the_recipe(name):
    """A key of the recipe's own kind of model is known, another is refused with its neighbours."""
    error = train("--config", name, "model.pretraind=x")
    assert isinstance(error, ConfigError)
    assert "Known keys" in str(error)
    assert "pretrained" in str(error)
    error = train("--config", name, "engine.zero_stage=7")
    assert "engine.zero_stage must be 0..3, got 7" in str(error)
