"""Where a pretrained model lies, and what makes two of them the same: a folder or a hub name.

Knows files and the hub's client; knows nothing about what the model computes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError

_NEEDLESS = ("*.onnx", "*.h5", "*.msgpack", "onnx/*", "openvino/*", "*.gguf")
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class ModelFolder:
    """A model that was found; picklable, found again on another node."""

    source: str
    """Folder, or name on the hub."""
    revision: str
    """Commit on the hub; empty for a folder."""
    fingerprint: str
    """Changes when the model does: the commit, or a hash of every file of the folder."""

    @property
    def path(self) -> Path:
        """The folder on this machine; a model of the hub is downloaded when it is not here."""
        if not self.revision:
            return Path(self.source)
        return _download(self.source, self.revision)


def find_model(model: str, *, revision: str = "") -> ModelFolder:
    """Find a model by folder or hub name.

    Args:
        model: folder with `config.json`, or `owner/name` on the hub.
        revision: branch, tag or commit on the hub; empty for its default.

    Raises:
        ConfigError: there is no such model, or the hub cannot be reached and it is not cached.
    """
    if not model:
        raise ConfigError("model must be a folder or a name on the hub, got none. Set --model.")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model must be a folder with config.json, got {model} without. Use the folder "
                "that save_pretrained wrote."
            )
        if revision:
            raise ConfigError(
                f"revision must be empty for a folder, got {revision!r}. Name a model of the hub."
            )
        folder = folder.resolve()
        return ModelFolder(str(folder), "", _hash_folder(folder))
    commit = _download(model, revision or None).name
    return ModelFolder(model, commit, commit)


def read_json(folder: Path, *parts: str) -> Any:
    """Read a JSON file of a model's folder; None when it is absent."""
    path = folder.joinpath(*parts)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # The snapshot's folder is named by the commit.
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(_NEEDLESS)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model must be a folder or a name on the hub, got {name!r}: {reason} "
            "Check the path, or download the model on a machine with a network."
        ) from error


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        digest.update(f"{inner.as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
