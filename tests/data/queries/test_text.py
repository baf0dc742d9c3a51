"""What counts as a word."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.queries.text import folded, word_runs, words

SPACED = st.text(st.characters(max_codepoint=0x0DFF) | st.sampled_from("가나다 한국어 ｆｕｌｌ½—"))


@given(SPACED)
def test_scripts_with_spaces_have_runs_of_letters_and_digits(text):
    assert words(text) == re.findall(r"\w+", text.lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("红色连衣裙", ["红色", "色连", "连衣", "衣裙"]),
        ("裙", ["裙"]),
        ("2024新款iPhone壳", ["2024", "新款", "iphone", "壳"]),
        ("東京タワー・メモ", ["東京", "京タ", "タワ", "ワー", "メモ"]),
        ("ｱｲｽ", ["ｱｲ", "ｲｽ"]),
        ("𠮷野家", ["𠮷野", "野家"]),
        ("々", ["々"]),
        ("ที่นี่ ๑๒", ["ที", "ี่", "่น", "นี", "ี่", "๑๒"]),
        ("한국어", ["한국어"]),
        ("，。？ ", []),
    ],
)
def test_scripts_without_spaces_have_pairs_of_characters(text, expected):
    assert words(text) == expected


def test_runs_tell_which_pairs_overlap():
    assert word_runs("Toy 红连衣x") == [["toy"], ["红连", "连衣"], ["x"]]


@pytest.mark.parametrize(
    "text", ["red dress", "Red  Dress", "ＲＥＤ dress", "red\u00a0dress", " RED\tDRESS "]
)
def test_case_width_and_spaces_make_no_other_query(text):
    assert folded(text) == "red dress"
    assert folded("red dres") != folded(text)


def test_folding_is_that_of_unicode():
    assert folded("STRASSE") == folded("straße")
    assert folded("re\u0301sume\u0301") == folded("RÉSUMÉ")
