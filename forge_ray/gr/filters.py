"""Which items may be recommended: lists of item ids as a mask over the catalogue.

Knows files of ids and the dataset's ids. Knows nothing about SIDs or models; the mask becomes a
smaller prefix index in :class:`forge_ray.gr.decoding.SidDecoder`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forge_ray.artifacts import open_filesystem
from forge_ray.errors import ConfigError, DataError


def allowed_items(
    item_ids: pa.Array, *, allow: str | None, deny: str | None
) -> NDArray[np.bool_] | None:
    """The items that both lists let through.

    Args:
        item_ids: string or large_string [N], ids in index order.
        allow: path or URI of a text file, one id a line: only these; None allows all.
        deny: the same: none of these, even where `allow` names them.

    Returns:
        bool [N], or None where no list is given.

    Raises:
        DataError: a list is unreadable or names an item that does not exist.
        ConfigError: nothing is left.
    """
    if allow is None and deny is None:
        return None
    mask = np.ones(len(item_ids), bool)
    if allow is not None:
        mask &= _is_listed(item_ids, allow, "allow")
    if deny is not None:
        mask &= ~_is_listed(item_ids, deny, "deny")
    if not mask.any():
        raise ConfigError(
            f"allow and deny must leave at least one of {len(item_ids)} items, got none left. "
            "Shorten the deny list or lengthen the allow list."
        )
    return mask


def _is_listed(item_ids: pa.Array, path: str, name: str) -> NDArray[np.bool_]:
    listed = pa.array(_read(path, name), item_ids.type)
    is_listed = pc.is_in(item_ids, value_set=listed)
    # Searched among what was found: a hash table of all ids would take as much memory again.
    unknown = listed.filter(pc.invert(pc.is_in(listed, value_set=item_ids.filter(is_listed))))
    if len(unknown):
        raise DataError(
            f"{name} must hold item ids of the dataset, got {len(unknown)} unknown ones in {path}, "
            f"e.g. {unknown[0].as_py()!r}. Remove them."
        )
    return np.asarray(is_listed.to_numpy(zero_copy_only=False), bool)


def _read(path: str, name: str) -> list[str]:
    filesystem, inside = open_filesystem(path)
    try:
        with filesystem.open_input_stream(inside) as stream:
            text = stream.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} must be a readable text file of item ids, got {path}: {error}. Check the path."
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]
