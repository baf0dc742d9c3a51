"""Why a session of a sweep broke off: the error of a disk or a database, said for a user.

Tune wraps what its callbacks, its searcher and its scheduler raise into text; the error itself is
found in the chain of contexts.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError
from ray.tune import TuneError

from forge_ray.errors import ForgeError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DISK = {errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EFBIG}
"""Of files, also where an error names none, as when an open one is written to."""
_AGAIN = "The same command continues the sweep."


def is_full(text: str) -> bool:
    """Whether an error that arrived as text is that of a full disk."""
    return "No space left on device" in text or "Disk quota exceeded" in text


@contextmanager
def explaining(*, folder: Path, storage: str) -> Iterator[None]:
    """Raises what the block raises, in words where disk or database failed.

    Args:
        folder: Of the sweep.
        storage: Optuna's storage, for people.

    Raises:
        StorageError: Disk or database failed; says what to do.
    """
    try:
        yield
    except (TuneError, OSError, StorageInternalError) as error:
        found = explain(error, folder=folder, storage=storage)
        if found is None:
            raise
        raise found from error


def explain(error: BaseException, *, folder: Path, storage: str) -> ForgeError | None:
    """The first error of the chain that a user can act on, in words; None where there is none."""
    for one in _chain(error):
        if isinstance(one, ForgeError):
            return one
        if isinstance(one, OSError) and one.errno in _FULL:
            return full_disk(str(one.filename or folder), str(one.strerror))
        if isinstance(one, StorageInternalError):
            return _database(one, storage)
        if isinstance(one, OSError) and (one.filename is not None or one.errno in _DISK):
            return StorageError(
                f"{one.filename or folder} must be writable while the sweep runs, got "
                f"{one.strerror}. Bring the disk back. {_AGAIN}"
            )
    return None


def full_disk(path: str, got: str) -> StorageError:
    """The error for a disk without space left."""
    return StorageError(
        f"{path} must have free space, got: {got}. Free some on that disk. {_AGAIN}"
    )


def _database(error: StorageInternalError, storage: str) -> StorageError:
    cause = error.__cause__ or error
    got = str(cause).splitlines()[0]
    return StorageError(
        f"storage {storage} must take what the sweep writes, got: {got}. Bring the database "
        f"back, or free space on its disk. {_AGAIN}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
