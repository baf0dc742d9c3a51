"""Weights that a training begins with, taken from a published model, also across a change of SIDs.

Three ways (`initial.codes`): `keep` continues on the same SID table. `fresh` keeps what does not
depend on SIDs and draws the vectors of codes anew (FORGE, arXiv 2509.20904, public code: load path
`dense`). `mapped` is ours: the vector of a new code begins as the mean of the old vectors of its
items, weighted by how often each occurred in the old model's training, at the same level of the
SID; a level that the old table lacks reads its last one. Prefixes and (prefix, code) pairs with
vectors of their own are mapped likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import to_mapping
from forge_ray.data.examples import last_items
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.gr.checkpoint import (
    MODEL_KIND,
    build_generator,
    load_generator,
    model_config,
    table_key,
)
from forge_ray.gr.config import GrConfig, InitialConfig
from forge_ray.gr.models.base import Generator, GeneratorConfig
from forge_ray.gr.models.code_tables import CodeTable
from forge_ray.gr.run_folder import RunFolder
from forge_ray.gr.source import ModelSource
from forge_ray.gr.vocab import Vocab
from forge_ray.sid.table import SidTable

INITIAL_FILE = "initial.safetensors"
_ITEMS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Speaker:
    """A generator and the SIDs that it speaks.

    Attributes:
        generator: on the CPU.
        codes: integer [num_items, L].
    """

    generator: Generator
    codes: NDArray[np.unsignedinteger[Any]]


_FREE = {
    *("dropout", "attention", "softmax", "label_smoothing", "targets", "packing"),
    *("pretrained", "revision", "checkpoint", "fresh", "prompt", "end_token"),
}
"""Fields of a generator that its weights do not depend on: how it learns, where it came from."""


def resolved_initial(
    config: InitialConfig, store: ArtifactStore, table: SidTable, generator: GeneratorConfig
) -> InitialConfig:
    """The choice with the model's key in it, as it was where training begins afresh.

    Raises:
        ArtifactError: there is no such model.
        ConfigError: its vectors of codes are to be kept, and it speaks another SID table; or the
            generators differ in more than their SIDs.
    """
    if not config.model:
        return config
    model = store.open(config.model, kind=MODEL_KIND)
    old, new = (to_mapping(one) for one in (model_config(model).model, generator))
    for name in sorted({*old, *new} - _FREE):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"model.{name} must be {old.get(name)!r} as that of initial.model, got "
                f"{new.get(name)!r}. Give model.* the values of that model."
            )
    theirs, ours = str(model.manifest.config["table_key"]), table_key(table)
    if config.codes == "keep" and theirs != ours:
        raise ConfigError(
            f"initial.codes must be fresh or mapped for another SID table, got keep: the model "
            f"speaks {theirs[:12]}, this training {ours[:12]}. Codes of two tables have nothing in "
            "common."
        )
    return replace(config, model=model.key)


def write_initial(
    folder: RunFolder, config: GrConfig, store: ArtifactStore, dataset: Dataset, table: SidTable
) -> None:
    """Puts the weights of the model that a run begins with where its workers find them, once.

    Args:
        folder: of the run.
        config: of the run; `initial.model` names a model of the store.
        store: holds that model with its SID table, unless `initial.sids` is that table.
        dataset: what the run trains on; its items are looked up in the model's own dataset.
        table: SIDs of its items.

    Raises:
        ArtifactError: the model's SID table or dataset is not there.
        ConfigError: the generators differ in more than their SIDs.
    """
    if not config.initial.model or folder.exists(INITIAL_FILE):
        return
    weights = initial_generator(config, store, dataset, table).state_dict()
    folder.write(save({name: one.contiguous() for name, one in weights.items()}), INITIAL_FILE)


def initial_generator(
    config: GrConfig, store: ArtifactStore, dataset: Dataset, table: SidTable
) -> Generator:
    """The generator as training begins, on the CPU; see `write_initial`.

    Raises:
        ArtifactError: the SID table or dataset of `initial.model` is not there.
        ConfigError: the generators differ in more than their SIDs.
    """
    torch.manual_seed(config.seed)
    if not config.initial.model:
        return config.model.start(Vocab(table.codebook_sizes))
    new = Speaker(build_generator(config.model, table), np.asarray(table.codes))
    if config.initial.codes == "keep":
        model = store.open(config.initial.model, kind=MODEL_KIND)
        weights = _checked(load_generator(model, table).state_dict(), new.generator)
    else:
        weights = _of_other_sids(config.initial, store, new, dataset)
    new.generator.load_state_dict(weights)
    return new.generator


def _checked(given: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    for name, fresh in generator.state_dict().items():
        if name not in given or given[name].shape != fresh.shape:
            raise _unlike(name, given.get(name), fresh)
    return given


def _of_other_sids(
    config: InitialConfig, store: ArtifactStore, new: Speaker, dataset: Dataset
) -> dict[str, Tensor]:
    source = ModelSource.open(store, config.model, sids=config.sids or None)
    loaded = source.load()
    rows = _rows_of(dataset, source.dataset)
    old = Speaker(
        cast(Generator, loaded.generator), np.asarray(loaded.table.codes)[np.maximum(rows, 0)]
    )
    # The old model's own events: those to be trained on have not happened yet. Items that never
    # occurred count a little: their codes would stay fresh otherwise.
    counts = trained_counts(source)[np.maximum(rows, 0)]
    weights = np.where(rows >= 0, counts + 1.0, 0.0)
    return transplant(old, new, is_mapped=config.codes == "mapped", weights=weights)


def trained_counts(source: ModelSource) -> NDArray[np.int64]:
    """How often each item of a model's dataset occurred in its training, int64 [num_items].

    Args:
        source: the model; with rows for the last items alone the train sequences are read.
    """
    dataset, config = source.dataset, model_config(source.artifact)
    if config.data.targets == "all":
        return dataset.train_counts()
    # Events before the newest `max_history` and sequences of one item were in no row.
    counts = np.zeros(dataset.num_items, dtype=np.int64)
    for batch in dataset.sequence_batches("train"):
        rows = last_items(batch.items, config.plan.max_items)
        read = rows.take(np.arange(len(rows)))
        counts += np.bincount(read.values, minlength=len(counts))
    return counts


def _rows_of(dataset: Dataset, other: Dataset) -> NDArray[np.int64]:
    """Row of each item in another dataset, int64 [num_items]; -1 where it is not there."""
    if dataset.key == other.key:
        return np.arange(dataset.num_items, dtype=np.int64)
    ids, known = (one.items(["item_id"])["item_id"].cast(pa.string()) for one in (dataset, other))
    found = pc.index_in(ids, value_set=pa.array(known))
    return np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)


def transplant(
    old: Speaker, new: Speaker, *, is_mapped: bool, weights: NDArray[np.float64]
) -> dict[str, Tensor]:
    """Weights of the new generator from those of the old one; see the module docstring.

    Memory: both state dicts, and float64 sums of the largest table of codes.

    Args:
        old: what is known.
        new: freshly made, for another SID table; row i of both tables is the same item.
        is_mapped: whether code vectors are means of old ones; otherwise they stay fresh.
        weights: float64 [num_items] >= 0, weight of each item in those means; 0 leaves it out.

    Raises:
        ConfigError: the generators differ in more than their SIDs.
    """
    given, found = old.generator.state_dict(), dict(new.generator.state_dict())
    theirs, ours = old.generator.code_tables(), new.generator.code_tables()
    with torch.no_grad():
        for name, fresh in found.items():
            table, source = ours.get(name), theirs.get(name)
            if table is None:
                found[name] = _shared(name, fresh, given)
            elif source is not None:
                known = _around(fresh, table, given[name], source)
                found[name] = (
                    _mapped(known, table, given[name], source, new=new, old=old, weights=weights)
                    if is_mapped
                    else known
                )
    return found


def _shared(name: str, fresh: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """A parameter that knows no codes; where it has a row per level, the levels both have."""
    old = given.get(name)
    if old is None or old.shape[1:] != fresh.shape[1:] or old.dim() != fresh.dim():
        raise _unlike(name, old, fresh)
    if old.shape == fresh.shape:
        return old.clone()
    known = min(len(old), len(fresh))
    return torch.cat([old[:known], fresh[known:]])


def _unlike(name: str, old: Tensor | None, fresh: Tensor) -> ConfigError:
    return ConfigError(
        f"initial.model must have the settings of model.*, got {name} of shape "
        f"{None if old is None else tuple(old.shape)} where {tuple(fresh.shape)} is built. "
        "Give model.* the values of that model."
    )


def _around(fresh: Tensor, table: CodeTable, given: Tensor, source: CodeTable) -> Tensor:
    """A fresh table with the old rows that belong to no code: special tokens, text."""
    start, end = table.before, table.before + table.num_rows
    old_end = source.before + source.num_rows
    return torch.cat([given[: source.before], fresh[start:end], given[old_end:]])


def _mapped(
    known: Tensor,
    table: CodeTable,
    given: Tensor,
    source: CodeTable,
    *,
    new: Speaker,
    old: Speaker,
    weights: NDArray[np.float64],
) -> Tensor:
    """Rows as weighted means over the items that touch them; rows of no item stay as they are."""
    columns = [_nearest(level, source.levels) for level in table.levels]
    sums = torch.zeros(known.shape, dtype=torch.float64)
    totals = torch.zeros(len(known), dtype=torch.float64)
    for start in range(0, len(new.codes), _ITEMS_AT_ONCE):
        part = slice(start, start + _ITEMS_AT_ONCE)
        rows, old_rows = _rows(table.rows, new.codes[part]), _rows(source.rows, old.codes[part])
        share = torch.from_numpy(weights[part])
        for column, old_column in enumerate(columns):
            vectors = given[old_rows[:, old_column]].double()
            shaped = share.view(-1, *[1] * (vectors.dim() - 1))
            sums.index_add_(0, rows[:, column], vectors * shaped)
            totals.index_add_(0, rows[:, column], share)
    is_touched = totals > 0
    mapped = known.clone()
    divisor = totals[is_touched].view(-1, *[1] * (known.dim() - 1))
    mapped[is_touched] = (sums[is_touched] / divisor).to(known.dtype)
    return mapped


def _rows(rows: Callable[[Tensor], Tensor], codes: NDArray[np.unsignedinteger[Any]]) -> Tensor:
    return rows(torch.from_numpy(codes.astype(np.int64)))


def _nearest(level: int, levels: tuple[int, ...]) -> int:
    """Column of the old table whose level is this one, or the nearest that it has."""
    return min(range(len(levels)), key=lambda column: abs(levels[column] - level))
