from __future__ import annotations

import errno

import pytest
from ray.exceptions import RayTaskError

from forge_ray.sweep.patience import is_outage, last_line, outlast


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("AWS Error NETWORK_CONNECTION"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (ValueError("x"), False),
    ],
)
def test_what_passes_by_itself(error: Exception, expected: bool) -> None:
    assert is_outage(error) is expected
    # As it arrives from a Ray task.
    wrapped = RayTaskError("task", "Traceback", error).as_instanceof_cause()
    assert is_outage(wrapped) is expected


def test_an_outage_is_outlasted_within_bounds() -> None:
    said: list[str] = []
    slept: list[float] = []
    failures = [OSError("away")] * 2

    def work() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert outlast(work, say=said.append, pauses_s=(1, 2, 4), sleep=slept.append) == "done"
    assert slept == [1, 2]
    assert said[0] == "storage does not answer, again in 1 s: away"
    failures.extend([OSError("away")] * 3)
    with pytest.raises(OSError, match="away"):
        outlast(work, say=said.append, pauses_s=(1, 2), sleep=slept.append)
    assert failures == []


def test_other_errors_are_raised_at_once() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise FileNotFoundError(errno.ENOENT, "no")

    with pytest.raises(FileNotFoundError):
        outlast(work, say=print, sleep=pytest.fail)
    assert calls == [1]


def test_last_line() -> None:
    assert last_line("Traceback\n  x\nOSError: no\n\n") == "OSError: no"
    assert last_line("") == "unknown error"
