"""Keeps passwords out of what people and files get to see."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):[^/\s]*(?=@)")
_SECRET = re.compile(
    r"(?i)(?<=[?&])([\w-]*(?:password|passwd|pwd|token|secret|key)[\w-]*)=[^&\s'\"]+"
)


def masked(text: str) -> str:
    """Text without the passwords of the URLs in it, `postgresql://user:***@host/db`."""
    return _SECRET.sub(r"\1=***", _PASSWORD.sub(r"\1:***", text))


def masked_words(words: Sequence[str]) -> list[str]:
    """A command's words, each without the passwords of its URLs."""
    return [masked(word) for word in words]


def masked_url(url: str) -> str:
    """One storage URL, perhaps a malformed one, for people to read: without its password."""
    hidden = re.sub(r"^(\w[\w+]*://[^:@/]*|(?!.*://)[^:@/]*):.*@", r"\1:***@", url)
    return masked(hidden)


def without_password(url: str) -> str:
    """A storage URL for files that others may read; the driver then asks PGPASSWORD or the like."""
    from sqlalchemy.engine import make_url  # only sweeps name databases

    if "://" not in url or make_url(url).password is None:
        return url
    return make_url(url).set(password=None).render_as_string(hide_password=False)
