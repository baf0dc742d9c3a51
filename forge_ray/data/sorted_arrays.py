"""Looking values up in sorted arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_member(
    values: NDArray[np.integer[Any]], members: NDArray[np.integer[Any]]
) -> NDArray[np.bool_]:
    """Whether each value is in a sorted array. Same shape as `values`.

    Takes no memory for the members, which may lie in Ray's object store.
    """
    if len(members) == 0:
        return np.zeros(values.shape, dtype=bool)
    at = np.minimum(np.searchsorted(members, values), len(members) - 1)
    return np.asarray(members[at] == values)
