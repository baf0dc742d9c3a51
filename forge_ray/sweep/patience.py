"""Outlasting short outages of storage: which errors are worth another try, and how often.

Stages are answered from the store or resume by name, so calling one again costs what was missing.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before each further try: an outage of a minute is outlasted."""
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


def is_outage(error: BaseException) -> bool:
    """Whether storage may answer again: a network file system or an object store out of reach.

    A full disk, a missing file or missing rights do not mend themselves.
    """
    # Ray wraps an error of a task in a class of its own, which loses the number.
    cause = getattr(error, "cause", error)
    # Clients of object stores raise without a number.
    return isinstance(cause, OSError) and (cause.errno is None or cause.errno in _PASSING)


def outlast(
    work: Callable[[], T],
    *,
    say: Callable[[str], None],
    pauses_s: Sequence[float] = PAUSES_S,
    outage: Callable[[BaseException], bool] = is_outage,
    caught: type[Exception] = OSError,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """What `work` returns, called again after outages; the last error is raised as it is.

    Args:
        work: May be called again at any time.
        say: Takes one line for the person watching before each pause.
        pauses_s: Seconds before each further call.
        outage: Which of the caught errors are worth another call.
        caught: Class of errors that `outage` is asked about.
        sleep: Waits.
    """
    for pause in pauses_s:
        try:
            return work()
        except caught as error:  # noqa: PERF203 - a handful of calls
            if not outage(error):
                raise
            say(f"storage does not answer, again in {pause:.0f} s: {_reason(error)}")
            sleep(pause)
    return work()


def _reason(error: BaseException) -> str:
    # Ray's and Optuna's errors are about where it happened; what they wrap says what it was.
    cause = getattr(error, "cause", None) or error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__


def last_line(text: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [one.strip() for one in text.splitlines() if one.strip()]
    return lines[-1] if lines else "unknown error"
