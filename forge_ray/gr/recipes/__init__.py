"""Published training settings as YAML, one file each; `gr train --config` takes their names.

Knows names and files; what a setting means is said by the configuration classes.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from forge_ray.errors import ConfigError


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(given: Path) -> Path:
    """A configuration file by its path or, where no such file is, by a recipe's name.

    Raises:
        ConfigError: it is neither, and does not look like a path.
    """
    names = recipe_names()
    if not given.exists() and str(given) in names:
        return _folder() / f"{given}.yaml"
    if not given.exists() and len(given.parts) == 1 and not given.suffix:
        near = difflib.get_close_matches(str(given), names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Check the name."
        raise ConfigError(
            f"--config must be a YAML file or one of {', '.join(names)}, got {given}. {hint}"
        )
    return given


def _folder() -> Path:
    return Path(str(files(__name__)))
