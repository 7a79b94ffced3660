from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.report import numbers


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_less_than_all_is_never_written_as_all(share):
    assert numbers.exact_share(share) != "100%"


@pytest.mark.parametrize(("value", "text"), [(1.0, "100%"), (0.99998, "99.998%"), (0.5, "50%"), (0.0, "0%")])
def test_shares_are_written_without_spare_zeros(value, text):
    assert numbers.exact_share(value) == text


@given(st.text(), st.integers(2, 40))
def test_shortened_text_fits_and_keeps_both_ends(text, length):
    short = numbers.shortened(text, length)
    assert len(short) <= length
    assert len(text) > length or short == text


@given(st.text())
def test_plain_text_is_one_printable_line(text):
    plain = numbers.plain_text(text)
    assert plain.isprintable()
    assert plain == numbers.plain_text(plain)


@pytest.mark.parametrize(("value", "text"), [(123.44, "123.4 ms"), (24.4, "24.40 ms"), (0.0336, "0.0336 ms")])
def test_times_keep_about_four_digits(value, text):
    assert numbers.milliseconds(value) == text
