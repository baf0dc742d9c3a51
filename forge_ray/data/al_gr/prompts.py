"""Where the SIDs stand in the prompts of GR rows.

A `user` text is prose, then all SIDs of the history without separator, then prose. Prose may hold
a lone `C12`; two tokens in a row are SIDs. Knows nothing of files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forge_ray.data.al_gr.sid_text import SidFormat
from forge_ray.data.ragged import Ragged

_RUN = r"(?:C[0-9]+){2,}"
_SPLIT = rf"(?s)^(?P<before>.*?)(?P<sids>{_RUN})(?P<after>.*)$"


@dataclass(frozen=True, slots=True)
class Prompts:
    """The parts of n user texts.

    Attributes:
        before: prose before the history.
        history: codes of the history, L per item.
        after: prose after it.
        is_valid: ``[n]`` texts with whole SIDs in one place, or with none.
    """

    before: pa.Array
    history: Ragged
    after: pa.Array
    is_valid: NDArray[np.bool_]


def split_prompts(users: pa.Array, sids: SidFormat) -> Prompts:
    """Find the SIDs in n user texts without nulls.

    Rows that share the prose of the first one, all in published files but the search rows, are cut
    by its length; the others are searched, and so are those where the cut leaves no SIDs or more:
    what is read of a row does not hang on which one comes first.
    """
    before, after = _first_prose(users)
    shares = _shares(users, before, after)
    cut = _parsed(_cut(users.filter(pa.array(shares)), before, after), sids)
    is_read = cut.is_valid & (cut.history.lengths > 0)
    if shares.all() and is_read.all():
        return cut
    fits = np.zeros(len(users), dtype=bool)
    fits[np.flatnonzero(shares)[is_read]] = True
    searched = _parsed(_search(users.filter(pa.array(~fits))), sids)
    return _merged(_taken(cut, np.flatnonzero(is_read)), searched, fits)


def join_prompts(prompts: Prompts, sids: SidFormat) -> pa.Array:
    """Write n user texts; the inverse of `split_prompts`."""
    words = sids.spell(prompts.history)
    return pc.binary_join_element_wise(prompts.before, words, prompts.after, "")


def _parsed(parts: tuple[pa.Array, pa.Array, pa.Array], sids: SidFormat) -> Prompts:
    before, middle, after = parts
    parsed = sids.parse(middle)
    again = pc.match_substring_regex(after, _RUN).to_numpy(zero_copy_only=False)
    return Prompts(before, parsed.codes, after, parsed.is_valid & ~again)


def _merged(cut: Prompts, searched: Prompts, fits: NDArray[np.bool_]) -> Prompts:
    """The rows of both in their order; ``fits`` ``[n]`` says which are of the first."""
    joined = Prompts(
        pa.concat_arrays([cut.before, searched.before]),
        Ragged.concatenate([cut.history, searched.history]),
        pa.concat_arrays([cut.after, searched.after]),
        np.concatenate([cut.is_valid, searched.is_valid]),
    )
    return _taken(joined, np.argsort(np.argsort(~fits, kind="stable")))


def _taken(prompts: Prompts, rows: NDArray[np.int64]) -> Prompts:
    return Prompts(
        prompts.before.take(pa.array(rows)),
        prompts.history.take(rows),
        prompts.after.take(pa.array(rows)),
        prompts.is_valid[rows],
    )


def _first_prose(users: pa.Array) -> tuple[str, str]:
    for text in users:
        found = re.match(_SPLIT, text.as_py())
        if found:
            return found["before"], found["after"]
    return "", ""


def _shares(users: pa.Array, before: str, after: str) -> NDArray[np.bool_]:
    if not before or not after:
        return np.zeros(len(users), dtype=bool)
    fits = pc.and_(pc.starts_with(users, before), pc.ends_with(users, after))
    least = len(before.encode()) + len(after.encode())
    return pc.and_(fits, pc.greater_equal(pc.binary_length(users), least)).to_numpy(
        zero_copy_only=False
    )


def _cut(users: pa.Array, before: str, after: str) -> tuple[pa.Array, pa.Array, pa.Array]:
    middle = pc.utf8_slice_codeunits(users, len(before), -len(after) or None)
    return pa.repeat(before, len(users)), middle, pa.repeat(after, len(users))


def _search(users: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    found = pc.extract_regex(users, _SPLIT)
    missing = found.is_null()
    before, middle, after = (found.field(number) for number in range(3))
    empty = pa.scalar("")
    return (
        pc.if_else(missing, users, before),
        pc.if_else(missing, empty, middle),
        pc.if_else(missing, empty, after),
    )
