"""What counts as a word of a text, and which texts ask the same. Knows only strings."""

from __future__ import annotations

import re
import unicodedata

_HAN = "\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RARE_HAN = "\U00020000-\U0003fffd"
_KANA = "\u3041-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
# With its vowel signs and tones, which are no letters to `re`.
_THAI = "\u0e01-\u0e3a\u0e40-\u0e4e"
_UNSPACED = _HAN + _RARE_HAN + _KANA + _THAI
_UNSPACED_START = re.compile(f"[{_UNSPACED}]")
_RUN = re.compile(rf"(?P<unspaced>[{_UNSPACED}]+)|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Words of a text in lower case, in their order: runs of letters and digits.

    A run of a script that puts no space between words (Han, Hiragana and Katakana, Thai) is no
    word: every two characters that stand side by side are one, or the only one of a run. So any
    part of such a text finds it, and no dictionary is needed.

    Source: the bigrams of Lucene's CJKBigramFilter, which leaves Thai to a dictionary.
    """
    return [word for run in word_runs(text) for word in run]


def is_unspaced(word: str) -> bool:
    """Whether a word is of a script that puts no space between words."""
    return _UNSPACED_START.match(word) is not None


def folded(text: str) -> str:
    """What texts have in common that ask the same in another case, width or spacing.

    Source: Unicode's NFKC and full case folding; runs of white space become one space.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def word_runs(text: str) -> list[list[str]]:
    """`words`, those of one run together; those of a run without spaces overlap by a character."""
    return [_words_of(run) for run in _RUN.finditer(text.lower())]


def _words_of(run: re.Match[str]) -> list[str]:
    found = run[0]
    if run["unspaced"] is None or len(found) == 1:
        return [found]
    return [found[at : at + 2] for at in range(len(found) - 1)]
