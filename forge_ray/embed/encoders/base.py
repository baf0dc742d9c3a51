"""What every encoder does: rows of the items table in, one vector per row out, misfits named.

Knows Arrow tables and the model's folder. Knows nothing about Ray, artifacts or other rows: a row's
vector depends on that row alone, up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.nn import functional

from forge_ray.config import Component
from forge_ray.embed.encoders.model import ModelFolder
from forge_ray.errors import ConfigError, DataError

FloatArray: TypeAlias = npt.NDArray[np.float32]

EMPTY = "empty"
"""Cause of rejection: nothing stands in any of the columns."""


@dataclass(kw_only=True)
class EncoderConfig(Component):
    """What every encoder needs to know; `kind` picks one."""

    kind: str = "text"
    model: str = ""
    """Folder of a model in Hugging Face's layout, or its name on the hub. Every node must see the
    folder."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty for its default."""
    name: str = ""
    """Name of the vector space that is made; empty for that of the model."""
    columns: list[str] = field(default_factory=list)
    """Columns of the items that are read."""
    normalize: bool = True
    """Make every vector one long, so that L2 distance ranks as the cosine does."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model; bfloat16 is faster where the processor has it."""
    storage: Literal["float16", "float32"] = "float16"
    """Numbers on disk; float16 keeps three decimals of a unit vector in half the space."""
    missing: Literal["fail", "zero"] = "fail"
    """Items that cannot be encoded stop the stage, or get zero vectors and are listed."""
    batch_size: int = 64
    """Rows the model sees at once."""
    shard_rows: int = 4096
    """Items per shard; a killed stage loses the shards it was working on."""
    local_items: int = 1000
    """Catalogues up to this size are encoded in the calling process: actors take longer to start.
    """
    max_actors: int = 64
    """Most encoder actors; the cluster's free CPUs bound it as well."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    """GPUs of an actor; with none it stays on the CPU, whatever the node has."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least_one = dict.fromkeys(("batch_size", "shard_rows", "max_actors"), 1)
        for name, least in {
            **at_least_one,
            "local_items": 0,
            "cpus_per_actor": 0,
            "gpus_per_actor": 0,
        }.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} must be >= {least}, got {getattr(self, name)}. Raise it."
                )
        if not self.columns:
            raise ConfigError("columns must name a column of the items, got none. Name one.")
        if "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"name must hold no / and start with no dot, got {self.name!r}. Change the name."
            )

    @property
    def space(self) -> str:
        """Name of the vector space that is made."""
        return self.name or f"{self.kind}-{self.model.rstrip('/').rpartition('/')[2]}"

    @property
    def wanted(self) -> str:
        """What a row must hold, for messages."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads")

    def absolute(self) -> EncoderConfig:
        """The same configuration, valid from any working directory."""
        return self

    def load(self, model: ModelFolder) -> Encoder:
        """Load the model, on the GPU when the actor has one.

        Raises:
            ConfigError: the folder holds no model of this kind.
        """
        raise NotImplementedError(f"{type(self).__name__} does not load an encoder")

    def is_empty(self, items: pa.Table) -> npt.NDArray[np.bool_] | None:
        """Tell without the model which rows cannot be encoded.

        Args:
            items: n rows of the columns.

        Returns:
            bool [n], or None when telling would cost as much as encoding.
        """
        raise NotImplementedError(f"{type(self).__name__} does not look at rows")

    @property
    def device(self) -> torch.device:
        """Where an actor of this configuration computes."""
        has_gpu = self.gpus_per_actor > 0 and torch.cuda.is_available()
        return torch.device("cuda" if has_gpu else "cpu")


@dataclass(frozen=True, eq=False)
class Encoded:
    """Vectors of some rows, and the rows that have none."""

    vectors: FloatArray
    """float32 [n, D]; zero where rejected."""
    rejected: Mapping[int, str]
    """Cause by row number."""


class Encoder(ABC):
    """A loaded model that turns rows into vectors."""

    dim: int
    """Width D of the vectors."""

    @abstractmethod
    def encode(self, items: pa.Table) -> Encoded:
        """Encode every row.

        Args:
            items: n rows of the configured columns.

        Raises:
            DataError: the model gives a vector that is not finite.
        """


def finish(vectors: torch.Tensor, *, normalize: bool) -> FloatArray:
    """Bring a batch of model outputs into the form that is stored.

    Args:
        vectors: float [B, D].
        normalize: make rows one long.

    Returns:
        float32 [B, D].

    Raises:
        DataError: a number is not finite.
    """
    rows = vectors.float()
    if not bool(torch.isfinite(rows).all()):
        raise DataError("vectors must be finite, got NaN from the model. Use precision=float32.")
    return (functional.normalize(rows, dim=1) if normalize else rows).cpu().numpy()


def require_columns(columns: Sequence[str], schema: pa.Schema) -> None:
    """Check that the items have the columns.

    Raises:
        ConfigError: one is absent; lists those that are there.
    """
    for column in columns:
        if column not in schema.names:
            raise ConfigError(
                f"columns must be columns of the items, got {column!r}; they have "
                f"{', '.join(schema.names)}. Prepare the dataset with this column."
            )


def autocast(device: torch.device, precision: str) -> Any:
    """Context in which the model computes in the configured precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
