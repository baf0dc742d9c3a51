"""Codes of every item of a catalogue: shard by shard, on one process or as Ray Data actors.

Shards are independent. The codes of a finished shard are kept in the build's scratch folder, so a
killed encoding continues with the shards that are missing. Memory: the codes of all items, 2 or 4
bytes each, and one batch of vectors per actor.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyarrow.fs import FileSystem

from forge_ray.artifacts import ArtifactWriter
from forge_ray.embed.vectors import VectorSet
from forge_ray.errors import DataError
from forge_ray.leases import list_entries
from forge_ray.sid.config import EncodeConfig
from forge_ray.sid.quantizers.base import Quantizer
from forge_ray.sid.storage import QuantizerState
from forge_ray.sid.table import code_dtype
from forge_ray.threads import set_threads

Codes = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Encoding:
    """The codes of a catalogue, and how much of them an earlier, killed build had made."""

    codes: Codes
    """uint16 or uint32 [N, L], row i belonging to `item_index` i."""
    shards: int
    shards_resumed: int


def encode_catalogue(
    state: QuantizerState, source: VectorSet, config: EncodeConfig, writer: ArtifactWriter
) -> Encoding:
    """Encode every item once. A Ray must be up when there are more than `config.local_items`.

    Args:
        state: the fitted quantizer.
        source: vectors of the catalogue, in shards.
        config: how to spread the work.
        writer: its scratch folder keeps finished shards.

    Raises:
        DataError: when the shards do not hold each item exactly once.
    """
    quantizer = state.load()
    if source.num_items <= config.local_items:
        parts = iter([_encode_shards(quantizer, source, config.batch_rows)])
        return Encoding(_assemble(parts, quantizer, source.num_items), len(source.files), 0)
    folder = _Parts(writer.filesystem, writer.scratch)
    finished = folder.finished()
    names = [_part_name(number) for number in range(len(source.files))]
    pending = [number for number, name in enumerate(names) if name not in finished]
    if pending:
        _encode_on_ray(state, source, config, folder, pending)
    codes = _assemble((folder.read(name) for name in names), quantizer, source.num_items)
    return Encoding(codes, len(names), len(names) - len(pending))


@dataclass(frozen=True)
class _Part:
    """Codes of one shard's items."""

    items: npt.NDArray[np.int64]
    codes: Codes


@dataclass(frozen=True)
class _Parts:
    """The folder of finished shards."""

    filesystem: FileSystem
    folder: str

    def finished(self) -> set[str]:
        """Names of the complete files."""
        self.filesystem.create_dir(self.folder, recursive=True)
        return {entry.base_name for entry in list_entries(self.filesystem, self.folder)}

    def write(self, name: str, part: _Part) -> None:
        """Write a file that appears under its name only when complete."""
        partial = f"{self.folder}/.{name}-{uuid.uuid4().hex[:8]}"
        with self.filesystem.open_output_stream(partial) as stream:
            np.savez(stream, items=part.items, codes=part.codes)
        self.filesystem.move(partial, f"{self.folder}/{name}")

    def read(self, name: str) -> _Part:
        """Read a finished file."""
        with self.filesystem.open_input_file(f"{self.folder}/{name}") as stream:
            arrays = np.load(stream, allow_pickle=False)
            return _Part(arrays["items"], arrays["codes"])


def _part_name(number: int) -> str:
    return f"codes-{number:05d}.npz"


def _encode_shards(quantizer: Quantizer, source: VectorSet, batch_rows: int) -> _Part:
    dtype = code_dtype(quantizer.codebook_sizes)
    items = [np.zeros(0, dtype=np.int64)]
    codes = [np.zeros((0, quantizer.num_levels), dtype=dtype)]
    for batch in source.batches(batch_rows):
        items.append(batch.indices)
        codes.append(quantizer.encode(batch.vectors).astype(dtype))
    return _Part(np.concatenate(items), np.concatenate(codes))


def _assemble(parts: Iterator[_Part], quantizer: Quantizer, num_items: int) -> Codes:
    codes = np.zeros((num_items, quantizer.num_levels), code_dtype(quantizer.codebook_sizes))
    seen = np.zeros(num_items, dtype=bool)
    rows = 0
    for part in parts:
        codes[part.items] = part.codes
        seen[part.items] = True
        rows += len(part.items)
    if rows != num_items or not seen.all():
        raise DataError(
            f"vectors must hold each of {num_items} items once, got {rows} rows and "
            f"{int((~seen).sum())} items without any. Run `forge-ray data validate`."
        )
    order = quantizer.item_order(num_items)
    return codes if order is None else codes[order]


class _Encoder:
    """A Ray Data actor that reads vector shards and writes their codes."""

    quantizer: Quantizer

    def __init__(
        self, state: QuantizerState, source: VectorSet, config: EncodeConfig, parts: _Parts
    ) -> None:
        set_threads(config.cpus_per_actor)
        self.source = source
        self.batch_rows = config.batch_rows
        self.parts = parts
        self.quantizer = state.load()
        if config.gpus_per_actor and torch.cuda.is_available():
            self.quantizer.to("cuda")

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        number = int(row["shard"])
        shard = replace(self.source, files=(self.source.files[number],))
        part = _encode_shards(self.quantizer, shard, self.batch_rows)
        self.parts.write(_part_name(number), part)
        return {"items": len(part.items)}


def _encode_on_ray(
    state: QuantizerState,
    source: VectorSet,
    config: EncodeConfig,
    parts: _Parts,
    pending: Sequence[int],
) -> None:
    import ray.data

    # Actors read the shards themselves: with a reading step before them, one free CPU would hold
    # either the reader or the encoder, and each would wait for the other.
    # Ray Data schedules with SPREAD, which keeps its actors out of the placement group of a trial
    # that calls this: there, a one-CPU actor would wait for ever for the CPU the trial holds.
    shards = ray.data.from_items(
        [{"shard": number} for number in pending], override_num_blocks=len(pending)
    )
    encoded = shards.map(
        _Encoder,
        fn_constructor_args=(state, source, config, parts),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=min(config.max_actors, len(pending))
        ),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    for _ in encoded.iter_batches(batch_size=None):
        pass
