"""What every use of Ray Tune here shares: it prints nothing of its own and leaves no pickles.

Nothing is restored from Tune's pickles, and they hold the password of the store's URI.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pyarrow import fs as pafs

from forge_ray.leases import list_entries

_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
"""Read by Tune in this process."""


@contextmanager
def quiet_tune(filesystem: pafs.FileSystem, folder: str) -> Iterator[None]:
    """A block that runs a Tuner; pickles of runs below a folder are removed before and after.

    Args:
        filesystem: the folder is on; a run that was killed left its pickles there.
        folder: that holds the folders of the runs.
    """
    os.environ.update(_ENV)
    # Failed trials have had their line; Tune's list of them says no more.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    _drop_pickles(filesystem, folder)
    try:
        yield
    finally:
        _drop_pickles(filesystem, folder)


def _drop_pickles(filesystem: pafs.FileSystem, folder: str) -> None:
    # A run keeps them beside the folders of its trials.
    for run in list_entries(filesystem, folder):
        if run.type != pafs.FileType.Directory:
            continue
        for entry in list_entries(filesystem, run.path):
            if entry.base_name.endswith(".pkl"):
                filesystem.delete_file(entry.path)
